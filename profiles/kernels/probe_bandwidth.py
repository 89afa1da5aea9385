"""Measuring memory bandwidth by number of threads: STREAM's triad, and reading alone.

J. D. McCalpin, "Memory Bandwidth and Machine Balance in Current High Performance Computers", 1995: ``a = b + s * c``
over arrays of at least four times the last-level cache, counted as three words an element; that a processor may read
the line that it is about to overwrite is not counted. numpy is all that is needed: its loops run without Python's lock,
so threads work at once, each on arrays of its own that it touches first. A block of ``a`` is still in the caches when
``b`` is added to it, so memory moves what it would in one loop.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from edgeq.errors import SessionError
from edgeq.llama_library import check_threads
from edgeq.probe_points import BandwidthPoint
from edgeq.profiles.kernels.cost_measure import free_bytes, last_level_cache_bytes, undisturbed

__all__ = ["default_buffer_bytes", "measure_bandwidth"]

Floats = npt.NDArray[np.float64]
Progress = Callable[[int, int, str], None]

_CACHES = 4  # an array is at least so many last-level caches
_SMALLEST_BUFFER = 32 << 20
_MEMORY_SHARE = 4  # the three arrays hold at most this fraction of the free memory
_WORD = 8
_SCALE = 3.0
# Words of a block. A small one drowns in Python's own time, a large one leaves the caches between its two passes:
# both make it slower and never faster, so the fastest is the truest. Which one that is depends on the processor.
_BLOCKS = (1 << 12, 1 << 14, 1 << 16, 1 << 17, 1 << 18)
_TRIALS = 2  # of each block
_PASSES = 2  # each number of threads comes so often, so that a slow phase of the machine hits no one alone
_FEWEST_ROUNDS = 3
_MOST_ROUNDS = 20


def default_buffer_bytes() -> int:
    """Bytes of each of the triad's arrays: four times the last-level cache, 32 MiB at least."""
    return max(_SMALLEST_BUFFER, _CACHES * (last_level_cache_bytes() or 0))


def measure_bandwidth(
    threads: Sequence[int],
    *,
    buffer_bytes: int | None = None,
    progress: Progress | None = None,
    budget_s: float = 8.0,
) -> tuple[BandwidthPoint, ...]:
    """Measure what so many threads together move, for each number of threads.

    Args:
        threads: the numbers, each at least one.
        buffer_bytes: of each of three arrays, shared out among the threads; None for `default_buffer_bytes`. Where
            the three would take more than a quarter of the free memory they are made smaller: a point whose
            ``buffer_bytes`` is below the default may have been served by caches.
        progress: told numbers of threads done, in all, and what is in work.
        budget_s: about how long it may take; each is timed at least six times whatever it takes.

    Raises:
        UsageError: no thread, or more than any session has.
        SessionError: too little memory for arrays that would tell anything.
    """
    counts = list(dict.fromkeys(threads))
    for count in counts:
        check_threads(count)
    wanted = buffer_bytes or default_buffer_bytes()
    size = min(wanted, free_bytes() // _MEMORY_SHARE // 3)
    if size < min(wanted, last_level_cache_bytes() or _SMALLEST_BUFFER):
        raise SessionError(
            f"{3 * size} bytes of memory are too few to measure its bandwidth", "Close other programs and try again"
        )
    found: dict[int, tuple[list[float], list[float], int]] = {count: ([], [], 0) for count in counts}
    seconds = budget_s / (_PASSES * max(1, len(counts)))
    for turn in range(_PASSES):
        for index, count in enumerate(counts):
            if progress is not None:
                progress((turn * len(counts) + index) // _PASSES, len(counts), f"memory with {count} threads")
            triads, reads, moved = _measure_team(count, size, seconds)
            found[count] = (found[count][0] + triads, found[count][1] + reads, moved)
    if progress is not None:
        progress(len(counts), len(counts), "done")
    return tuple(_point(count, *found[count]) for count in counts)


def _point(threads: int, triads: Sequence[float], reads: Sequence[float], size: int) -> BandwidthPoint:
    (triad_ns, triad_spread), (read_ns, read_spread) = undisturbed(triads), undisturbed(reads)
    return BandwidthPoint(
        threads=threads,
        triad_bytes_per_s=1e9 * 3 * size / triad_ns,
        read_bytes_per_s=1e9 * 3 * size / read_ns,
        spread=max(triad_spread, read_spread),
        buffer_bytes=size,
        n=len(triads),
    )


@dataclasses.dataclass
class _Worker:
    """One thread's part of the three arrays, and what it does with them."""

    words: int
    a: Floats = dataclasses.field(default_factory=lambda: np.empty(0))
    b: Floats = dataclasses.field(default_factory=lambda: np.empty(0))
    c: Floats = dataclasses.field(default_factory=lambda: np.empty(0))

    def allocate(self) -> None:
        """On the thread that will use them, so that their pages lie near it."""
        self.a, self.b, self.c = np.zeros(self.words), np.ones(self.words), np.full(self.words, 2.0)

    def triad(self, block: int) -> None:
        a, b, c = self.a, self.b, self.c
        for start in range(0, self.words, block):
            part = a[start : start + block]
            np.multiply(c[start : start + block], _SCALE, out=part)
            np.add(part, b[start : start + block], out=part)

    def read(self) -> None:
        """Every word once, with an operation that no processor takes longer for than memory does."""
        for array in (self.a, self.b, self.c):
            np.bitwise_or.reduce(array.view(np.uint64))


class _Team:
    """Threads that do the same at the same time. A context manager."""

    def __init__(self, workers: Sequence[_Worker]) -> None:
        self._task: Callable[[_Worker], None] = _Worker.allocate
        self._barrier = threading.Barrier(len(workers) + 1)
        self._failure: MemoryError | None = None
        self._threads = [threading.Thread(target=self._run, args=(worker,), daemon=True) for worker in workers]

    def __enter__(self) -> _Team:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._barrier.abort()  # wakes whoever waits, wherever an exception came from
        for thread in self._threads:
            thread.join()

    def _run(self, worker: _Worker) -> None:
        with contextlib.suppress(threading.BrokenBarrierError):
            while True:
                self._barrier.wait()
                try:
                    self._task(worker)
                except MemoryError as error:
                    self._failure = error
                    self._barrier.abort()
                self._barrier.wait()

    def time(self, task: Callable[[_Worker], None]) -> float:
        """Nanoseconds until the last thread has done a task."""
        self._task = task
        try:
            self._barrier.wait()
            before = time.perf_counter_ns()
            self._barrier.wait()
        except threading.BrokenBarrierError:
            raise SessionError(
                "too little memory to measure its bandwidth", "Close other programs and try again"
            ) from self._failure
        return float(time.perf_counter_ns() - before)


def _measure_team(threads: int, size: int, seconds: float) -> tuple[list[float], list[float], int]:
    """Times of triads and of reads, and the bytes of one array."""
    words = size // _WORD // threads
    start = time.monotonic()
    triads: list[float] = []
    reads: list[float] = []
    with _Team([_Worker(words) for _ in range(threads)]) as team:
        team.time(_Worker.allocate)
        block = min(_BLOCKS * _TRIALS, key=lambda size: team.time(lambda worker: worker.triad(size)))
        while len(triads) < _FEWEST_ROUNDS or (
            len(triads) < _MOST_ROUNDS and time.monotonic() - start + (triads[-1] + reads[-1]) / 1e9 < seconds
        ):
            triads.append(team.time(lambda worker: worker.triad(block)))
            reads.append(team.time(_Worker.read))
    return triads, reads, words * threads * _WORD
