"""Measuring what matrices cost a decoded token on this machine, with ggml's own kernels.

Decoding reads every weight once for each token, so what counts is the speed at which a kernel works on weights that
come from memory. For each type a set of matrices about as large as a model is made and cycled through, as a model is;
types take turns, so that a slow phase of the machine hits all alike; a cycle that is not timed comes before each timed
one, so that the caches hold what the last token of the same model would have left there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from edgeq.errors import SessionError
from edgeq.ggml_backend import CpuBackend
from edgeq.ggml_kernels import Matrices, MatrixSet
from edgeq.ggml_types import GgmlType, ggml_type
from edgeq.llama import Context, versions
from edgeq.profiles.facts.cpu_facts import CpuCache, cpu_caches
from edgeq.profiles.facts.fact_reader import FactReader
from edgeq.profiles.facts.memory_facts import read_container
from edgeq.profiles.kernels.cost_table import CostEntry, DecodeCosts, Matrix
from edgeq.profiles.kernels.sample_weights import sample_blocks, sample_vector
from edgeq.profiles.kernels.turns import MEMORY_SHARE, groups_that_fit, rounds
from edgeq.system_files import SystemFiles

__all__ = [
    "decode_times",
    "default_working_set",
    "free_bytes",
    "last_level_cache_bytes",
    "legal_matrices",
    "machine_name",
    "measure_matrices",
    "other_busy_cpus",
    "undisturbed",
]

Progress = Callable[[int, int, str], None]

_SMALLEST_WORKING_SET = 64 << 20
_ROUNDS = 15
_FEWEST_ROUNDS = 3
_MOST_COPIES = 1024
_WHOLE_ROWS = 64  # of a matrix that is cut: a multiple of what every repacked layout interleaves


def last_level_cache_bytes() -> int | None:
    """Size of the largest cache of the first CPU, None if the system does not say."""
    reader = FactReader(SystemFiles(Path("/")))
    none: tuple[CpuCache, ...] = ()
    caches = reader.attempt("CPU caches", "/sys/devices/system/cpu", lambda: cpu_caches(reader.files, (0,)), none)
    return max((cache.size_bytes for cache in caches), default=None)


def default_working_set() -> int:
    """Four last-level caches, but no less than 64 MiB: weights come from memory, as a large model's do.

    With two of them a quarter of the weights was still found in the cache (32 MiB, AMD EPYC), with four as little as
    with eight.
    """
    return max(_SMALLEST_WORKING_SET, 4 * (last_level_cache_bytes() or 0))


def machine_name() -> str:
    """The processor as the system calls it, such as ``AMD EPYC 9R14``, or the board's name on ARM."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model", "Hardware"):
                return value.strip()
    with contextlib.suppress(OSError):
        return Path("/proc/device-tree/model").read_text(encoding="utf-8", errors="replace").strip("\0 \n")
    return platform.processor() or platform.machine()


def legal_matrices(shapes: Sequence[tuple[int, int]], types: Sequence[str]) -> list[Matrix]:
    """Every shape in every type whose blocks divide its rows, without duplicates, in the order given."""
    kinds = dict.fromkeys(ggml_type(name) for name in types)
    return [(kind.name, shape) for kind in kinds for shape in dict.fromkeys(shapes) if kind.fits(shape[0])]


def measure_matrices(
    matrices: Sequence[Matrix],
    *,
    threads: int,
    working_set_bytes: int | None = None,
    progress: Progress | None = None,
    budget_s: float = 60.0,
) -> DecodeCosts:
    """Time matrices on this machine.

    Args:
        matrices: distinct, as `legal_matrices` lists them.
        threads: as many as the session will have.
        working_set_bytes: of weights to cycle through, the model's size at best; None for `default_working_set`.
            All shapes of a type share it equally; of a matrix larger than its share as many rows as fit are timed.
        progress: told matrices done, matrices in all, and what is in work.
        budget_s: about how long it may take; every matrix is timed at least three times whatever it takes.

    Raises:
        UsageError: a type that there is not, or a number of threads that cannot be.
        SessionError: too little memory.
    """
    free = free_bytes() // MEMORY_SHARE
    working_set = min(working_set_bytes or default_working_set(), free)
    by_type: dict[str, list[tuple[int, int]]] = {}
    for name, shape in matrices:
        by_type.setdefault(name, []).append(shape)
    meter = _LoadMeter()
    entries: list[CostEntry] = []
    with CpuBackend(threads) as backend:
        for group in _groups(by_type, working_set, free):
            told = _Teller(progress, len(entries), len(matrices))
            seconds = budget_s * sum(len(by_type[name]) for name in group) / len(matrices)
            plans = {name: by_type[name] for name in group}
            entries += _measure_group(backend, plans, working_set, seconds, told)
    return DecodeCosts(
        measured=True,
        machine=machine_name(),
        arch=platform.machine(),
        threads=threads,
        llama_cpp=versions()["llama.cpp"],
        measured_utc=dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
        busy_cpus=round(meter.busy_cpus(), 3),
        working_set_bytes=working_set,
        entries=tuple(entries),
    )


@dataclasses.dataclass(frozen=True)
class _Teller:
    """Progress of one group within the whole."""

    progress: Progress | None
    before: int
    total: int

    def __call__(self, done: int, name: str) -> None:
        if self.progress is not None:
            self.progress(self.before + done, self.total, name)


@dataclasses.dataclass(frozen=True)
class _Sized:
    """How one shape is measured: so many copies of so many of its rows."""

    shape: tuple[int, int]
    rows: int
    copies: int
    total_bytes: int


def _size(kind: GgmlType, shape: tuple[int, int], share: int) -> _Sized:
    """As many copies as fill a share of the working set; of a larger matrix, as many rows."""
    columns, rows = shape
    row_bytes = kind.row_bytes(columns)
    if rows * row_bytes <= share:
        copies = min(_MOST_COPIES, -(-share // (rows * row_bytes)))
        return _Sized(shape, rows, copies, copies * rows * row_bytes)
    used = min(rows, max(share // row_bytes // _WHOLE_ROWS, 1) * _WHOLE_ROWS)
    return _Sized(shape, used, 1, used * row_bytes)


@dataclasses.dataclass(frozen=True)
class _Member:
    """All matrices of one type, and the times of one product by shape, in nanoseconds."""

    sizes: Sequence[_Sized]
    matrices: MatrixSet
    times: Sequence[list[float]]

    def cycle(self) -> None:
        """One cycle to leave the caches as the last token would, and one that is timed."""
        for index in range(len(self.sizes)):
            self.matrices.compute(index)
        for index, size in enumerate(self.sizes):
            before = time.perf_counter_ns()
            self.matrices.compute(index)
            elapsed = time.perf_counter_ns() - before
            self.times[index].append(elapsed / size.copies * (size.shape[1] / size.rows))


def _groups(by_type: Mapping[str, Sequence[tuple[int, int]]], working_set: int, limit: int) -> list[list[str]]:
    """Types that take turns because they fit in memory together."""

    def held(name: str) -> int:
        share = working_set // len(by_type[name])
        return sum(_size(ggml_type(name), shape, share).total_bytes for shape in by_type[name])

    return groups_that_fit(((name, held(name)) for name in by_type), limit)


def _measure_group(
    backend: CpuBackend,
    by_type: Mapping[str, Sequence[tuple[int, int]]],
    working_set: int,
    seconds: float,
    told: _Teller,
) -> list[CostEntry]:
    """Hold all matrices of some types and let the types take turns."""
    total = sum(len(shapes) for shapes in by_type.values())
    start = time.monotonic()
    with contextlib.ExitStack() as stack:
        members: dict[str, _Member] = {}
        for name, shapes in by_type.items():
            told(0, f"{name}: filling memory")
            sizes = [_size(ggml_type(name), shape, working_set // len(shapes)) for shape in shapes]
            matrices = stack.enter_context(MatrixSet(backend, [_sample(name, size) for size in sizes]))
            for index, size in enumerate(sizes):
                matrices.set_vector(index, sample_vector(size.shape[0]))
            members[name] = _Member(sizes, matrices, [[] for _ in sizes])
        for turn in rounds(_FEWEST_ROUNDS, _ROUNDS, start + seconds):
            for name, member in members.items():
                told(total * turn // _ROUNDS, name)
                member.cycle()
    told(total, "done")
    return [entry for name, member in members.items() for entry in _entries(name, member)]


def _entries(name: str, member: _Member) -> Iterator[CostEntry]:
    for size, buffer, times in zip(member.sizes, member.matrices.buffers, member.times, strict=True):
        ns, spread = undisturbed(times)
        columns, rows = size.shape
        yield CostEntry(type=name, columns=columns, rows=rows, ns=ns, spread=spread, n=len(times), buffer=buffer)


def _sample(name: str, size: _Sized) -> Matrices:
    columns = size.shape[0]
    blocks = sample_blocks(ggml_type(name), columns)[: size.rows]
    return Matrices(name, (columns, size.rows), blocks, size.copies)


def undisturbed(times: Sequence[float]) -> tuple[float, float]:
    """The lower quartile, and half the distance to the upper one as a share of it.

    Whatever else runs on the machine can only make a time longer, often several times: the lower quartile is within
    the spread of the median on a quiet machine, and stands when half of the times were disturbed.
    """
    low, _, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else (times[0],) * 3
    return low, max(0.0, high - low) / 2 / low  # interpolated, so equal times may differ in the last digit


class _LoadMeter:
    """How many CPUs others keep busy, from its making on."""

    def __init__(self) -> None:
        self._start = self._now()

    def busy_cpus(self) -> float:
        """The mean so far; time that a hypervisor gave to others counts too."""
        wall, busy, own = (now - then for now, then in zip(self._now(), self._start, strict=True))
        return max(0.0, busy - own) / wall if wall > 0 else 0.0

    @staticmethod
    def _now() -> tuple[float, float, float]:
        import psutil

        times = psutil.cpu_times()
        # Linux counts the time of guests in that of their users already.
        idle = times.idle + getattr(times, "iowait", 0.0)
        guests = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
        return time.monotonic(), sum(times) - idle - guests, time.process_time()


def other_busy_cpus(seconds: float) -> float:
    """CPUs that others keep busy on average, listened to for so long."""
    meter = _LoadMeter()
    time.sleep(seconds)
    return meter.busy_cpus()


def free_bytes() -> int:
    """Memory that this process can have without swapping: of the machine, or less if its container allows less."""
    import psutil

    available = int(psutil.virtual_memory().available)
    container = read_container(FactReader(SystemFiles(Path("/"))))
    limit = container.memory_limit_bytes
    return available if limit is None else max(0, min(available, limit - (container.memory_used_bytes or 0)))


def decode_times(context: Context, tokens: int) -> list[float]:
    """Decode greedily from an empty cache and time every token, its choice included.

    Args:
        context: with room for ``tokens``.
        tokens: how many.

    Returns:
        Nanoseconds for each token, in order.
    """
    context.clear()
    token = context.model.bos or 0
    times: list[float] = []
    for position in range(tokens):
        before = time.perf_counter_ns()
        if not context.decode_one(token, position):
            raise SessionError("the decode was interrupted", "Run it again")
        token = int(context.logits().argmax())
        times.append(float(time.perf_counter_ns() - before))
    return times
