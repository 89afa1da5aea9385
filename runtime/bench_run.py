"""Take the samples of a benchmark.

The model runs in a process of its own (`edgeq.runtime.bench_worker`), so peak memory is that of serving. How many
samples are taken is fixed before the first one: stopping as soon as a verdict is reached would make the confidence of
its bound untrue. Only ``max_seconds`` cuts a run short, and the report says so.

What is the same for every kind of bundle is here; `Subject` is what differs.
"""

from __future__ import annotations

import abc
import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, TypeVar

from edgeq import stats
from edgeq.report import Details, HostLoad, Metric, Workload
from edgeq.runtime import measure
from edgeq.runtime.bench_messages import Command, Finished, Ready, Usage
from edgeq.runtime.bench_process import WorkerProcess
from edgeq.types import BUDGET_LINES, Budget, BudgetLine

__all__ = [
    "Ask",
    "Conditions",
    "Findings",
    "Progress",
    "Run",
    "Subject",
    "measure_subject",
    "planned_loads",
    "planned_repetitions",
]

L = TypeVar("L", bound=Ready)
S = TypeVar("S")
Progress = Callable[[int, int, str], None]
Ask = Callable[[int, float], Sequence[S]]
"""Takes samples: at least one, at most so many, and none is begun after so many seconds."""

# With these a verdict survives two slow samples; a budget that is missed more often has not much to gain from more.
_SLACK_MISSES = 2
_LOAD_SLACK_MISSES = 1
# Starts for load times may take this share of the time, so that something is left for the rest.
_LOAD_SHARE = 1 / 3
_BEFORE_S = 0.5
_WITHOUT_END = 1 << 31


@dataclasses.dataclass(frozen=True)
class Conditions:
    """What a run is made for.

    Attributes:
        workload: what is repeated.
        budget: whose lines decide how many samples are needed.
        confidence: of the bounds.
        max_host_load: see `HostLoad`.
    """

    workload: Workload
    budget: Budget
    confidence: float
    max_host_load: float


@dataclasses.dataclass(frozen=True)
class Run(Generic[L, S]):
    """What came out.

    Attributes:
        loads_ms: of each process, from its start to ready; the last one is the serving process.
        planned_loads: that were wanted.
        loaded: what the serving process said when it was ready.
        warmup: uncounted repetitions.
        samples: counted repetitions, at least one.
        planned: that were wanted; None if only seconds were given.
        duration_s: of the counted repetitions.
        usage: of the serving process, at its end.
        before: the machine before anything was started.
        after: the machine when all was measured.
        load: by others between the two.
    """

    loads_ms: list[float]
    planned_loads: int
    loaded: L
    warmup: list[S]
    samples: list[S]
    planned: int | None
    duration_s: float
    usage: Finished
    before: measure.Snapshot
    after: measure.Snapshot
    load: HostLoad


@dataclasses.dataclass(frozen=True)
class Findings:
    """What a run says of one kind of bundle.

    Attributes:
        metrics: by name.
        warmup: of the uncounted repetitions, by name.
        unmeasured: `Budget` field to the reason why there are no samples of it.
        predicted: by `Budget` field, as far as it is for this workload.
        details: what only this kind has to tell.
        notes: what a reader must know, one line each.
        floors: `Budget` fields of which ``predicted`` is no more than the least.
    """

    metrics: dict[str, Metric]
    warmup: dict[str, Metric]
    unmeasured: dict[str, str]
    predicted: Mapping[str, float]
    details: Details
    notes: list[str]
    floors: tuple[str, ...] = ()


class Subject(abc.ABC, Generic[L, S]):
    """A bundle of one kind, and what is asked of it again and again.

    Attributes:
        load: the command that loads it.
        ready: what answers that.
        per_repetition: samples that a repetition gives, by the `Budget` fields that depend on repetitions.
        fewest_repetitions: whatever the budget needs.
        fewest_loads: likewise.
        uncounted_loads: processes that come first, where the first load does more than the others.
        on_gpu: whether memory of a GPU is used, which no process status tells.
    """

    load: Command
    ready: type[L]
    per_repetition: Mapping[str, int]
    fewest_repetitions: int
    fewest_loads: int
    uncounted_loads: int
    on_gpu: bool

    @abc.abstractmethod
    def ask(self, worker: WorkerProcess, loaded: L) -> Ask[S]:
        """What takes samples from a process that is ready."""

    @abc.abstractmethod
    def findings(self, run: Run[L, S], confidence: float) -> Findings:
        """What a run says; peak memory and load times left out, which every kind has."""


def _needed(line: BudgetLine, confidence: float, misses: int) -> int:
    if line.percentile is None:
        return 1
    return stats.required_samples(line.percentile if line.at_most else 100 - line.percentile, confidence, misses)


def planned_repetitions(conditions: Conditions, per_repetition: Mapping[str, int], fewest: int) -> int | None:
    """How many the budget's lines need for a verdict, with room for some misses; None if the workload gives seconds.

    Args:
        conditions: of the run.
        per_repetition: see `Subject`.
        fewest: likewise.
    """
    workload = conditions.workload
    if workload.repetitions is not None:
        return workload.repetitions
    if workload.seconds is not None:
        return None
    needed = [fewest]
    for line in BUDGET_LINES:
        samples = per_repetition.get(line.field, 0)
        if samples and conditions.budget.limit(line) is not None:
            needed.append(math.ceil(_needed(line, conditions.confidence, _SLACK_MISSES) / samples))
    return max(needed)


def planned_loads(conditions: Conditions, fewest: int = 1) -> int:
    """How many processes are started to measure load times: the fewest, unless the budget constrains them."""
    line = next(line for line in BUDGET_LINES if line.field == "load_ms")
    if conditions.budget.limit(line) is None:
        return fewest
    return max(fewest, _needed(line, conditions.confidence, _LOAD_SLACK_MISSES))


def measure_subject(subject: Subject[L, S], conditions: Conditions, tell: Progress) -> Run[L, S]:
    """Load and run a bundle that was verified.

    Raises:
        EdgeqError: what the session raised in its process.
        SessionError: the process died, or the model did not do what was asked.
    """
    workload = conditions.workload
    _load_times(subject, subject.uncounted_loads, math.inf, tell)
    tell(0, 0, "looking at the load of the machine")
    busy_before = measure.busy_share(_BEFORE_S)
    before, own_before, started = measure.take_snapshot(), time.process_time(), time.perf_counter()
    n_loads = planned_loads(conditions, subject.fewest_loads)
    planned = planned_repetitions(conditions, subject.per_repetition, subject.fewest_repetitions)
    how_many = f"{workload.seconds:g} s of" if planned is None else str(planned)
    tell(0, 0, f"{how_many} repetitions and {n_loads} load times, at most about {workload.max_seconds:g} s")
    loads_ms, own_s = _load_times(subject, n_loads - 1, started + workload.max_seconds * _LOAD_SHARE, tell)
    with WorkerProcess() as worker:
        tell(n_loads - 1, n_loads, "loading the model")
        loaded = worker.request(subject.load, subject.ready)
        loads_ms.append(worker.ready_ms)
        ask = subject.ask(worker, loaded)
        warmup = _take(ask, workload.warmup, math.inf, "warm-up", tell) if workload.warmup else []
        counted_from = time.perf_counter()
        seconds_end = math.inf if workload.seconds is None else counted_from + workload.seconds
        samples = _take(ask, planned, min(started + workload.max_seconds, seconds_end), "repetition", tell)
        duration_s = time.perf_counter() - counted_from
        usage = worker.request(Usage(), Finished)
        after = measure.take_snapshot()
    own_s += usage.cpu_s + time.process_time() - own_before
    return Run(
        loads_ms=loads_ms,
        planned_loads=n_loads,
        loaded=loaded,
        warmup=warmup,
        samples=samples,
        planned=planned,
        duration_s=duration_s,
        usage=usage,
        before=before,
        after=after,
        load=measure.host_load(
            before.cpu, after.cpu, own_s=own_s, busy_before=busy_before, allowed=conditions.max_host_load
        ),
    )


def _load_times(subject: Subject[L, S], count: int, deadline: float, tell: Progress) -> tuple[list[float], float]:
    """Ready times in milliseconds of processes that only load, and the processor seconds that these took."""
    times_ms: list[float] = []
    cpu_s = 0.0
    while len(times_ms) < count and time.perf_counter() < deadline:
        tell(len(times_ms), count + 1, "loading the model")
        with WorkerProcess() as worker:
            worker.request(subject.load, subject.ready)
            times_ms.append(worker.ready_ms)
            cpu_s += worker.request(Usage(), Finished).cpu_s
    return times_ms, cpu_s


def _take(ask: Ask[S], count: int | None, deadline: float, what: str, tell: Progress) -> list[S]:
    """At least one sample, at most ``count``, none begun after the deadline."""
    taken: list[S] = []
    started = time.perf_counter()
    while count is None or len(taken) < count:
        tell(len(taken), count or 0, what)
        most = _WITHOUT_END if count is None else count - len(taken)
        taken += ask(most, max(0.0, deadline - time.perf_counter()))
        if time.perf_counter() >= deadline:
            break
    tell(len(taken), count or len(taken), f"{what} ({time.perf_counter() - started:.1f} s)")
    return taken
