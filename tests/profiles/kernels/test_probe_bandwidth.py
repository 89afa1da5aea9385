"""Bandwidth is measured on this machine, and agrees with STREAM's triad in C."""

from __future__ import annotations

import ctypes
import shutil
import statistics
import subprocess
from pathlib import Path

import numpy as np
import pytest

from edgeq.errors import SessionError, UsageError
from edgeq.profiles.kernels import probe_bandwidth
from edgeq.profiles.kernels.cost_measure import undisturbed
from edgeq.profiles.kernels.probe_bandwidth import _Team, _Worker, default_buffer_bytes, measure_bandwidth

# As McCalpin's: arrays touched first by the threads that use them. Huge pages, as numpy asks for.
STREAM = r"""
#define _GNU_SOURCE
#include <omp.h>
#include <stdlib.h>
#include <sys/mman.h>
static double *make(size_t n) {
    void *p = 0;
    if (posix_memalign(&p, 1 << 21, n * sizeof(double))) return 0;
    madvise(p, n * sizeof(double), MADV_HUGEPAGE);
    return p;
}
int triad(size_t n, int threads, int runs, double *seconds) {
    double *a = make(n), *b = make(n), *c = make(n);
    if (!a || !b || !c) return 0;
    omp_set_num_threads(threads);
    #pragma omp parallel for schedule(static)
    for (size_t i = 0; i < n; i++) { a[i] = 0; b[i] = 1; c[i] = 2; }
    for (int r = 0; r < runs; r++) {
        double start = omp_get_wtime();
        #pragma omp parallel for schedule(static)
        for (size_t i = 0; i < n; i++) a[i] = b[i] + 3.0 * c[i];
        seconds[r] = omp_get_wtime() - start;
    }
    double check = a[n / 2];
    free(a); free(b); free(c);
    return check == 7;
}
"""


@pytest.mark.parametrize("block", [7, 64, 1000, 4096])
def test_the_triad_is_one_whatever_the_block(block: int) -> None:
    worker = _Worker(1000)
    worker.allocate()
    worker.b[:] = np.arange(1000)
    worker.c[:] = np.arange(1000) ** 2
    worker.triad(block)
    assert np.array_equal(worker.a, worker.b + 3 * worker.c)


def test_points_are_of_the_sizes_that_were_asked_for() -> None:
    told: list[tuple[int, int]] = []
    found = measure_bandwidth(
        (1, 2, 1),
        buffer_bytes=default_buffer_bytes(),
        progress=lambda done, total, _: told.append((done, total)),
        budget_s=0,
    )
    assert [p.threads for p in found] == [1, 2]
    for p in found:
        assert p.n == 6
        assert default_buffer_bytes() - 16 <= p.buffer_bytes <= default_buffer_bytes()
        # Reading moves what it counts, the triad a third more; and half a machine cannot be that uneven.
        assert 0.5 < p.read_bytes_per_s / p.triad_bytes_per_s < 10
    assert told[0] == (0, 2)
    assert told[-1] == (2, 2)
    assert told == sorted(told)


def test_the_default_is_beyond_the_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_bandwidth, "last_level_cache_bytes", lambda: 64 << 20)
    assert default_buffer_bytes() == 256 << 20
    monkeypatch.setattr(probe_bandwidth, "last_level_cache_bytes", lambda: None)
    assert default_buffer_bytes() == 32 << 20


def test_little_memory_makes_smaller_arrays_and_the_point_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_bandwidth, "last_level_cache_bytes", lambda: 16 << 20)
    monkeypatch.setattr(probe_bandwidth, "free_bytes", lambda: 12 * (20 << 20))
    (point,) = measure_bandwidth((1,), budget_s=0)
    assert point.buffer_bytes == 20 << 20
    assert point.buffer_bytes < default_buffer_bytes()
    monkeypatch.setattr(probe_bandwidth, "free_bytes", lambda: 12 * (15 << 20))
    with pytest.raises(SessionError, match="too few to measure"):
        measure_bandwidth((1,), budget_s=0)


def test_a_thread_without_memory_is_one_line() -> None:
    def fail(_: _Worker) -> None:
        raise MemoryError

    with _Team([_Worker(8), _Worker(8)]) as team, pytest.raises(SessionError, match="too little memory"):
        team.time(fail)


def test_an_interrupt_ends_the_threads() -> None:
    team = _Team([_Worker(8)])
    with pytest.raises(KeyboardInterrupt), team:
        team.time(_Worker.allocate)
        raise KeyboardInterrupt
    assert not any(thread.is_alive() for thread in team._threads)


def test_nonsense_is_refused() -> None:
    with pytest.raises(UsageError, match="threads"):
        measure_bandwidth((0,))


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_stream_in_c_agrees(tmp_path: Path, threads: int) -> None:
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("no gcc to compile STREAM with")
    source, binary = tmp_path / "stream.c", tmp_path / "stream.so"
    source.write_text(STREAM, encoding="utf-8")
    options = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
    subprocess.run([compiler, *options, source, "-o", binary], check=True)
    triad = ctypes.CDLL(str(binary)).triad
    triad.argtypes = (ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.POINTER(ctypes.c_double))
    words, runs = default_buffer_bytes() // 8, 12
    seconds = (ctypes.c_double * runs)()
    ratios = []
    for _ in range(9):
        (point,) = measure_bandwidth((threads,), budget_s=0.8)
        assert triad(words, threads, runs, seconds)
        stream = 24 * words / undisturbed(list(seconds))[0]
        ratios.append(point.triad_bytes_per_s / stream)
    assert 0.75 < statistics.median(ratios) < 1.25, ratios
