"""Take the samples of a benchmark.

The model runs in a process of its own (`edgeq.runtime.bench_worker`), so peak memory is that of serving. How many
samples are taken is fixed before the first one: stopping as soon as a verdict is reached would make the confidence of
its bound untrue. Only ``max_seconds`` cuts a run short, and the report says so.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from edgeq import stats
from edgeq.errors import SessionError
from edgeq.report import HostLoad, Workload
from edgeq.runtime import measure
from edgeq.runtime.bench_process import WorkerProcess
from edgeq.runtime.bench_text import TEXT
from edgeq.runtime.bench_worker import Finished, Generate, Load, Loaded, Sample, Usage
from edgeq.types import BUDGET_LINES, Budget, BudgetLine

__all__ = ["Conditions", "Progress", "Run", "measure_bundle", "planned_loads", "planned_repetitions", "prompts"]

Progress = Callable[[int, int, str], None]

# With these a verdict survives two slow samples; a budget that is missed more often has not much to gain from more.
_SLACK_MISSES = 2
_LOAD_SLACK_MISSES = 1
_FEWEST_REPETITIONS = 10
# Starts for load times may take this share of the time, so that something is left for the rest.
_LOAD_SHARE = 1 / 3
_BEFORE_S = 0.5
_PROMPT_STRIDE = 37


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
class Run:
    """What came out.

    Attributes:
        loads_ms: of each process, from its start to ready; the last one is the serving process.
        planned_loads: that were wanted.
        loaded: what the serving process said when it was ready.
        warmup: uncounted answers.
        samples: counted answers, at least one.
        planned: that were wanted; None if only seconds were given.
        duration_s: of the counted answers.
        usage: of the serving process, at its end.
        before: the machine before anything was started.
        after: the machine when all was measured.
        load: by others between the two.
    """

    loads_ms: list[float]
    planned_loads: int
    loaded: Loaded
    warmup: list[Sample]
    samples: list[Sample]
    planned: int | None
    duration_s: float
    usage: Finished
    before: measure.Snapshot
    after: measure.Snapshot
    load: HostLoad


def _needed(line: BudgetLine, confidence: float, misses: int) -> int:
    if line.percentile is None:
        return 1
    return stats.required_samples(line.percentile if line.at_most else 100 - line.percentile, confidence, misses)


def planned_repetitions(conditions: Conditions) -> int | None:
    """How many the budget's lines need for a verdict, with room for some misses; None if the workload gives seconds."""
    workload = conditions.workload
    if workload.repetitions is not None:
        return workload.repetitions
    if workload.seconds is not None:
        return None
    gaps = workload.output_tokens - 1
    per_repetition = {"ttft_ms": 1, "itl_ms": gaps, "tokens_per_s": min(gaps, 1)}
    needed = [_FEWEST_REPETITIONS]
    for line in BUDGET_LINES:
        samples = per_repetition.get(line.field, 0)
        if samples and conditions.budget.limit(line) is not None:
            needed.append(math.ceil(_needed(line, conditions.confidence, _SLACK_MISSES) / samples))
    return max(needed)


def planned_loads(conditions: Conditions) -> int:
    """How many processes are started to measure load times: one, unless the budget constrains them."""
    line = next(line for line in BUDGET_LINES if line.field == "load_ms")
    if conditions.budget.limit(line) is None:
        return 1
    return _needed(line, conditions.confidence, _LOAD_SLACK_MISSES)


def prompts(text_tokens: Sequence[int], n_tokens: int) -> Iterator[list[int]]:
    """Endless prompts of exactly ``n_tokens``, cut from a text that is repeated as needed.

    Each begins with another token than the one before it, so that a cache of prefixes helps none of them. They need
    not make sense: the time that a prompt takes does not depend on what it says. The text must hold at least two
    different tokens.
    """
    size, start, first = len(text_tokens), 0, None
    while True:
        while text_tokens[start % size] == first:
            start += 1
        prompt = [text_tokens[(start + i) % size] for i in range(n_tokens)]
        yield prompt
        first = prompt[0]
        start += _PROMPT_STRIDE


def measure_bundle(bundle: Path, conditions: Conditions, tell: Progress) -> Run:
    """Load and run a bundle that was verified.

    Raises:
        EdgeqError: what the session raised in its process.
        SessionError: the process died, or the model stopped before the wanted number of tokens.
    """
    workload = conditions.workload
    load = Load(bundle=str(bundle), threads=workload.threads, context_tokens=workload.context_tokens, text=TEXT)
    tell(0, 0, "looking at the load of the machine")
    busy_before = measure.busy_share(_BEFORE_S)
    before, own_before, started = measure.take_snapshot(), time.process_time(), time.perf_counter()
    n_loads, planned = planned_loads(conditions), planned_repetitions(conditions)
    how_many = f"{workload.seconds:g} s of" if planned is None else str(planned)
    tell(0, 0, f"{how_many} repetitions and {n_loads} load times, at most about {workload.max_seconds:g} s")
    loads_ms, own_s = _load_times(load, n_loads - 1, started + workload.max_seconds * _LOAD_SHARE, tell)
    with WorkerProcess() as worker:
        tell(n_loads - 1, n_loads, "loading the model")
        loaded = worker.request(load, Loaded)
        loads_ms.append(worker.ready_ms)
        series = _Series(worker, prompts(loaded.text_tokens, workload.prompt_tokens), workload.output_tokens, tell)
        warmup = series.take(workload.warmup, math.inf, "warm-up") if workload.warmup else []
        counted_from = time.perf_counter()
        seconds_end = math.inf if workload.seconds is None else counted_from + workload.seconds
        samples = series.take(planned, min(started + workload.max_seconds, seconds_end), "repetition")
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


def _load_times(load: Load, count: int, deadline: float, tell: Progress) -> tuple[list[float], float]:
    """Ready times in milliseconds of processes that only load, and the processor seconds that these took."""
    times_ms: list[float] = []
    cpu_s = 0.0
    while len(times_ms) < count and time.perf_counter() < deadline:
        tell(len(times_ms), count + 1, "loading the model")
        with WorkerProcess() as worker:
            worker.request(load, Loaded)
            times_ms.append(worker.ready_ms)
            cpu_s += worker.request(Usage(), Finished).cpu_s
    return times_ms, cpu_s


@dataclasses.dataclass
class _Series:
    """Answers of one worker to one row of prompts."""

    worker: WorkerProcess
    prompts: Iterator[list[int]]
    output_tokens: int
    tell: Progress

    def take(self, count: int | None, deadline: float, what: str) -> list[Sample]:
        """At least one answer, at most ``count``, none begun after the deadline."""
        taken: list[Sample] = []
        started = time.perf_counter()
        for prompt in itertools.islice(self.prompts, count):
            self.tell(len(taken), count or 0, what)
            sample = self.worker.request(Generate(prompt=prompt, max_tokens=self.output_tokens), Sample)
            if sample.n_tokens != self.output_tokens:
                raise SessionError(
                    f"The model stopped after {sample.n_tokens} of {self.output_tokens} tokens",
                    "Raise --context or lower --output-tokens",
                )
            taken.append(sample)
            if time.perf_counter() >= deadline:
                break
        self.tell(len(taken), count or len(taken), f"{what} ({time.perf_counter() - started:.1f} s)")
        return taken
