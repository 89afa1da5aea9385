"""The fastest of several candidates on this machine, and only what is surely no slower than the float model.

Surely: the bound of the median ratio at 95 % confidence lies within what is allowed. A candidate that looks faster but
is not surely so is timed again for longer; if doubt remains, the float model is taken.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from edgeq.converters.onnx.skeleton import read_skeleton
from edgeq.errors import BudgetError
from edgeq.planner.tensors.accuracy import worst_cosine
from edgeq.planner.tensors.candidates import Candidate, Workbench
from edgeq.planner.tensors.timing import MOST_SECONDS, Timing, time_in_turns
from edgeq.planner.tensors.writing import DISABLED_OPTIMIZERS
from edgeq.types import Rejection

__all__ = ["Timed", "fastest", "fastest_float", "surely_within"]

_AS_FAST = 1.05  # who takes that many times the fastest one's time may be taken for being nearer
_ROUNDS = 15
_MORE_ROUNDS = 75
_MORE_SECONDS = 40.0
_NORMALIZATIONS = frozenset({"LayerNormalization", "SkipLayerNormalization"})


@dataclasses.dataclass(frozen=True)
class Timed:
    """What is taken.

    Attributes:
        chosen: the candidate.
        timing: of it, in turns with the fastest float model.
        float_timing: of the latter.
        rejected: the others, and why.
        notes: what a user must know.
    """

    chosen: Candidate
    timing: Timing
    float_timing: Timing
    rejected: tuple[Rejection, ...]
    notes: tuple[str, ...]


def surely_within(timing: Timing, most: float) -> bool:
    """Whether a model is, with 95 % confidence, no slower than that many times the float model."""
    return timing.slowness_bound <= most


def fastest_float(bench: Workbench) -> Candidate:
    """The fastest way to compute in floats: as exported or cleaned, with and without a fusion that may be slow.

    Two are open at a time, and the next one must be surely faster than the best so far.
    """
    best = bench.float_model()
    for other in _float_variants(bench):
        bench.progress("time", 0, 1, other.label)
        pair = (best, other)
        _, timing = _in_turns(bench, pair)
        if surely_within(timing, 1.0):
            best = other
    return best


def _float_variants(bench: Workbench) -> list[Candidate]:
    """The others than the cleaned one without that fusion; those that would be the same are left out."""
    clean = bench.float_model()
    ways = [] if bench.exported is None else [(bench.exported, "fp32-exported")]
    found = []
    for path, label in [(bench.reference, "fp32"), *ways]:
        fuses = any(node.op_type in _NORMALIZATIONS for node in read_skeleton(path).model.graph.node)
        if path != bench.reference:
            found.append(dataclasses.replace(clean, path=path, label=label))
        if fuses:
            found.append(dataclasses.replace(clean, path=path, label=f"{label}-fused", disabled_optimizers=()))
    return found


def fastest(
    bench: Workbench,
    passing: Sequence[Candidate],
    *,
    max_slowdown: float,
    max_latency_ms: float | None,
    asked: bool,
) -> Timed:
    """Time candidates in turns with the float model at its best, and take the fastest.

    Args:
        bench: the float model and inputs.
        passing: candidates that keep the gate.
        max_slowdown: over the float model.
        max_latency_ms: of a call; None if there is no such goal.
        asked: whether the user named the precision: then a slower one is taken too, and a note says so.

    Raises:
        BudgetError: no candidate is fast enough for the goal, with the fastest one's time.
    """
    floats = fastest_float(bench)
    others = [candidate for candidate in passing if candidate.scheme != "fp32"]
    bench.progress("time", 0, 1, "in turns with the float model")
    float_timing, *timings = _in_turns(bench, (floats, *others))
    times = {candidate.label: timing for candidate, timing in zip(others, timings, strict=True)}
    others, dropped = _without_idle_variants(bench, others, times)
    ranked = sorted(others, key=lambda candidate: times[candidate.label].slowness)
    if any(candidate.scheme == "fp32" for candidate in passing):
        first = ranked[0] if ranked else None
        if first is not None and not surely_within(times[first.label], max_slowdown):
            times[first.label] = _again(bench, floats, first, times[first.label], max_slowdown)
        surely = [candidate for candidate in ranked if surely_within(times[candidate.label], max_slowdown)]
        surely = _nearest_first(surely, times)
        slower = [candidate for candidate in ranked if candidate not in surely]
        ranked = [*surely, floats, *slower]
        times[floats.label] = float_timing
    else:
        ranked = _nearest_first(ranked, times)
    chosen = next((c for c in ranked if max_latency_ms is None or times[c.label].ms <= max_latency_ms), None)
    if chosen is None:
        chosen = min(ranked, key=lambda candidate: times[candidate.label].ms)
    _require_latency(chosen, times[chosen.label], max_latency_ms)
    rejected = tuple(
        Rejection(option=other.label, reason=_why(other, chosen, times, max_latency_ms))
        for other in ranked
        if other is not chosen
    )
    notes = _notes(chosen, times[chosen.label], max_slowdown, asked=asked)
    return Timed(chosen, times[chosen.label], float_timing, (*rejected, *dropped), notes)


def _nearest_first(ranked: Sequence[Candidate], times: Mapping[str, Timing]) -> list[Candidate]:
    """The nearest to the float model among those that are about as fast as the first, then the others."""
    if not ranked:
        return []
    most = _AS_FAST * times[ranked[0].label].slowness
    about = [candidate for candidate in ranked if times[candidate.label].slowness <= most]
    first = max(about, key=lambda candidate: 1.0 if candidate.quality is None else worst_cosine(candidate.quality))
    return [first, *(candidate for candidate in ranked if candidate is not first)]


def _without_idle_variants(
    bench: Workbench, candidates: Sequence[Candidate], times: Mapping[str, Timing]
) -> tuple[list[Candidate], tuple[Rejection, ...]]:
    """Without variants that are not surely faster than what they are variants of."""
    by_label = {candidate.label: candidate for candidate in candidates}
    dropped: dict[str, Rejection] = {}
    for candidate in candidates:
        plain = by_label.get(candidate.variant_of or "")
        if plain is None:
            continue
        ratio = bound = times[candidate.label].slowness / times[plain.label].slowness
        if ratio < 1:
            bench.progress("time", 0, 1, f"{candidate.label} and {plain.label}")
            _, timing = _in_turns(bench, (plain, candidate))
            ratio, bound = timing.slowness, timing.slowness_bound
        if bound > 1:
            why = f"{ratio:.2f} times what {plain.label} takes here, perhaps {bound:.2f} times"
            dropped[candidate.label] = Rejection(option=candidate.label, reason=why)
    return [c for c in candidates if c.label not in dropped], tuple(dropped.values())


def _in_turns(bench: Workbench, candidates: Sequence[Candidate], *, longer: bool = False) -> tuple[Timing, ...]:
    return time_in_turns(
        [candidate.path for candidate in candidates],
        bench.samples.judged,
        threads=bench.threads,
        disabled_optimizers=[candidate.disabled_optimizers for candidate in candidates],
        rounds=_MORE_ROUNDS if longer else _ROUNDS,
        most_seconds=_MORE_SECONDS if longer else MOST_SECONDS,
    )


def _again(bench: Workbench, floats: Candidate, other: Candidate, timing: Timing, most: float) -> Timing:
    """Longer, if the candidate looks fast enough and only doubt speaks against it."""
    if timing.slowness > most:
        return timing
    bench.progress("time", 0, 1, f"{other.label}, for longer")
    return _in_turns(bench, (floats, other), longer=True)[1]


def _require_latency(chosen: Candidate, timing: Timing, limit: float | None) -> None:
    if limit is not None and timing.ms > limit:
        raise BudgetError(
            f"{chosen.label}, the fastest that passes the gate, takes {_ms(timing.ms)} a call here, the limit is "
            f"{_ms(limit)}",
            "Raise --max-latency, fix smaller sizes with --shape, give more --threads, or choose a faster device",
        )


def _why(other: Candidate, chosen: Candidate, times: Mapping[str, Timing], limit: float | None) -> str:
    """In the ratios that decide, the worse of wall and processor time; medians of milliseconds may contradict them."""
    timing, best = times[other.label], times[chosen.label]
    if limit is not None and timing.ms > limit:
        return f"{_ms(timing.ms)} a call, the limit is {_ms(limit)}"
    if chosen.scheme == "fp32" and timing.slowness < 1.0:
        return (
            f"{timing.slowness:.2f} times what the float model takes here, but perhaps {timing.slowness_bound:.2f} "
            f"times: not surely faster in {timing.rounds} rounds"
        )
    if chosen.scheme == "fp32":
        return f"takes {timing.slowness:.2f} times what the float model takes here"
    ratio = timing.slowness / best.slowness
    told = f"{ratio:.2f} times the time of {chosen.label}"
    if ratio < 1 and best.slowness <= _AS_FAST * timing.slowness:
        return f"{told}, which is nearer to the float model: within {_AS_FAST - 1:.0%} the nearer one is taken"
    if ratio < 1:
        return f"{told}, but perhaps {timing.slowness_bound:.2f} times that of the float model"
    return told


def _ms(value: float) -> str:
    """Three significant digits."""
    return f"{value:.0f} ms" if value >= 99.95 else f"{value:#.3g} ms"


def _notes(chosen: Candidate, timing: Timing, most: float, *, asked: bool) -> tuple[str, ...]:
    notes = []
    if chosen.scheme != "fp32" and not surely_within(timing, most):  # asked for, or floats miss a goal
        takes = f"{chosen.label} takes {timing.slowness:.2f} times what that takes here"
        if timing.slowness > most:
            told = f"slower than the float model: {takes}"
        else:
            told = f"not surely as fast as the float model: {takes}, and perhaps {timing.slowness_bound:.2f} times"
        notes.append(f"{told}; --precision auto would ship the float model" if asked else told)
    if chosen.scheme == "fp32" and not asked:
        notes.append("the float model is shipped: nothing that passes the gate is surely faster here")
    if chosen.scheme == "fp32" and chosen.disabled_optimizers != DISABLED_OPTIMIZERS:
        notes.append("ONNX Runtime's fusion of LayerNormalization stays on, which is faster here")
    if chosen.predicted_ms is not None:
        notes.append(
            f"{_ms(chosen.predicted_ms)} a call were predicted from times of nodes, {_ms(timing.ms)} are measured, "
            f"{_ms(timing.cpu_ms)} of processor time"
        )
    return tuple(notes)
