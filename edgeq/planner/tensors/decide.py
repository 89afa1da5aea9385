"""The fastest way to compute a model that stays near enough to it, measured where that is possible."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

from edgeq.converters.onnx.compare import MetricError
from edgeq.errors import ConversionError, UnsupportedModelError
from edgeq.planner.tensors.accuracy import Miss, missed
from edgeq.planner.tensors.candidates import Candidate, Method, Workbench
from edgeq.planner.tensors.job import Gate
from edgeq.planner.tensors.node_times import Clock
from edgeq.planner.tensors.search import SEARCHED, eight_bit_candidates
from edgeq.planner.tensors.speed import fastest
from edgeq.planner.tensors.timing import Timing
from edgeq.tensor_types import FLOAT_SCHEMES, Scheme
from edgeq.types import Rejection

__all__ = ["Decision", "decide"]


@dataclasses.dataclass(frozen=True)
class Decision:
    """What is shipped.

    Attributes:
        chosen: the way.
        timing: of it, in turns with the float model; None where this machine says nothing about the target.
        float_timing: of the float model; likewise.
        rejected: the others, and why.
        notes: what a user must know.
    """

    chosen: Candidate
    timing: Timing | None
    float_timing: Timing | None
    rejected: tuple[Rejection, ...]
    notes: tuple[str, ...]


def decide(
    bench: Workbench,
    schemes: Sequence[Scheme],
    gate: Gate,
    keep_float: Mapping[str, str],
    *,
    method: Method | None,
    clock: Clock | None,
    asked: bool,
    max_latency_ms: float | None = None,
) -> Decision:
    """Make candidates, drop what misses the gate, and take the fastest.

    Args:
        bench: the float model and where candidates are made.
        schemes: to try, in the order of preference.
        gate: what a candidate must keep.
        keep_float: nodes that the user wants in floats, with the reason.
        method: of calibration; None to try all and take the one with the nearest outputs.
        clock: of single nodes: one that measures here if times of this machine count for the target, or that of a
            probe of the target; None if nothing is known.
        asked: whether the user named the precision: then nothing else is taken in its place, and no node stays in
            floats for speed alone.
        max_latency_ms: of a call, where times of this machine count; None if there is no such goal.

    Raises:
        BudgetError: nothing that passes the gate is fast enough.
        ConversionError: what was asked for misses the gate or covers too little, with both figures.
    """
    timed = clock is not None and clock.is_measured
    search = functools.partial(eight_bit_candidates, gate=gate, method=method, clock=clock, for_speed=not asked)
    asked_share = bench.share(keep_float.keys())
    rejected: list[Rejection] = []
    passing: list[Candidate] = []
    options: dict[str, None] = {}  # that ask for less
    for scheme in schemes:
        try:
            made = _candidates(bench, scheme, keep_float, search)
        except MetricError:
            raise
        except ConversionError as error:  # what this scheme cannot do, another one may
            if len(schemes) == 1:
                raise
            rejected.append(Rejection(option=scheme, reason=error.cause))
            continue
        for found in made:
            miss = missed_gate(found, gate, asked_share=asked_share, timed=timed)
            if miss is None:
                passing.append(found)
            else:
                rejected.append(Rejection(option=found.label, reason=miss.reason))
                options[miss.option] = None
    if not passing:
        reasons = "; ".join(f"{entry.option}: {entry.reason}" for entry in rejected)
        raise ConversionError(
            f"Nothing that was asked for passes the gate: {reasons}",
            f"Lower {' or '.join(options) or Miss('').option}, give real inputs with --calibration, or choose "
            "--precision auto",
        )
    if not timed:
        return _untimed(passing, rejected, clock)
    best = fastest(bench, passing, max_slowdown=gate.max_slowdown, max_latency_ms=max_latency_ms, asked=asked)
    notes = (*best.notes, *best.chosen.notes)
    return Decision(best.chosen, best.timing, best.float_timing, (*rejected, *best.rejected), notes)


def missed_gate(candidate: Candidate, gate: Gate, *, asked_share: float, timed: bool) -> Miss | None:
    """Why a candidate is not taken; None if nothing speaks against it.

    Args:
        candidate: judged.
        gate: what it must keep.
        asked_share: of the multiply-adds, what the user wants in floats.
        timed: whether it will have to be faster than the float model. Only then may the search itself leave more in
            floats than the gate allows: elsewhere nothing would show that the mix is worth it.
    """
    if candidate.failure is not None:
        return Miss(candidate.failure)
    if candidate.quality is not None and (miss := missed(candidate.quality, gate)) is not None:
        return miss
    found = candidate.coverage
    if found is None or candidate.scheme in FLOAT_SCHEMES:
        return None
    lost = [name for name in found.left if not (timed and name in candidate.float_nodes)]
    allowed = candidate.kept_share if timed else asked_share
    if not lost or found.mac_share + allowed >= gate.min_coverage:
        return None
    told = f"only {found.mac_share:.0%} of the multiply-adds are quantized; in floats are {', '.join(lost[:5])}"
    return Miss(told, "--min-coverage")


def _candidates(
    bench: Workbench, scheme: Scheme, keep_float: Mapping[str, str], search: Callable[..., list[Candidate]]
) -> list[Candidate]:
    if scheme == "fp32":
        return [bench.float_model()]
    if scheme in SEARCHED:
        return search(bench, scheme, keep_float)
    return [bench.other(scheme, keep_float)]


def _untimed(passing: Sequence[Candidate], rejected: Sequence[Rejection], clock: Clock | None) -> Decision:
    """The fastest by what a probe of the target foretells, or else the first."""
    times = None if clock is None else _foretold(passing, clock)
    if times is None:
        chosen = passing[0]
        others = [Rejection(option=c.label, reason=f"{chosen.label} comes first on this backend") for c in passing[1:]]
        notes = (*chosen.notes, "speed was not measured: this is not the target")
        return Decision(chosen, None, None, (*rejected, *others), notes)
    chosen, best = min(zip(passing, times, strict=True), key=lambda pair: pair[1])
    others = [
        Rejection(option=other.label, reason=f"{ms:.2f} ms a call are predicted, {best:.2f} ms for {chosen.label}")
        for other, ms in zip(passing, times, strict=True)
        if other is not chosen
    ]
    notes = (*chosen.notes, "speed was not measured: this is not the target; a probe of it says what is faster")
    return Decision(chosen, None, None, (*rejected, *others), notes)


def _foretold(passing: Sequence[Candidate], clock: Clock) -> list[float] | None:
    """Milliseconds of a call of each; None if one has an operator that the cost model does not know."""
    try:
        return [clock.call_ms(candidate.path) for candidate in passing]
    except UnsupportedModelError:
        return None
