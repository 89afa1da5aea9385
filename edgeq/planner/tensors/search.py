"""A model in 8 bits: everything, smoothed; with some nodes in floats where that misses the gate.

Where everything passes, nodes that are no faster in 8 bits may stay in floats too.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

from edgeq.converters.onnx.calibration.ranges import Range
from edgeq.converters.onnx.quantize.sites import NodeSite, quantizable
from edgeq.converters.onnx.quantize.static import is_tensorrt
from edgeq.converters.onnx.sensitivity import Switch, node_errors
from edgeq.errors import UnsupportedModelError
from edgeq.planner.knapsack import Infeasible
from edgeq.planner.tensors.accuracy import missed, worst_cosine
from edgeq.planner.tensors.candidates import METHODS, Candidate, Method, Workbench
from edgeq.planner.tensors.job import Gate
from edgeq.planner.tensors.mixed import (
    NodeCost,
    choose_float_front,
    choose_float_nodes,
    cosine_of_error,
    error_of_cosine,
)
from edgeq.planner.tensors.node_times import Attribution, Clock, attribute, node_costs
from edgeq.tensor_types import Scheme

__all__ = ["SEARCHED", "eight_bit_candidates"]

SEARCHED: tuple[Scheme, ...] = ("int8-static", "int8-dynamic", "fp8")

_NEAR = 0.999  # a cosine above which nodes for smoothing are not worth their time
_SENSITIVITY_INPUTS = 2
_MIXES = 4  # tries to find a mix that passes the gate
_CAUTION = 0.9  # of the error that the last try says may be allowed
_STEPS = (0.1, 0.7)  # the error of the next try over that of the last, if that had too much
_LOOSEST = 8.0  # likewise, if it had too little
_FULL = 0.5  # of what is allowed, from which a mix is good enough
_LEAST_GAIN = 0.005  # of a call, that makes a try of nodes in floats worth while


@dataclasses.dataclass(frozen=True)
class _Way:
    """8 bits of one float model, smoothed or not."""

    bench: Workbench
    make: Callable[[Mapping[str, str], str], Candidate]  # nodes in floats with the reason, and a label's ending
    candidate: Candidate
    ranges: Mapping[str, Range] | None  # None for dynamic INT8
    method: Method | None = None

    @property
    def cosine(self) -> float:
        """-1 for what cannot be compared."""
        if self.candidate.failure is not None:
            return -1.0
        return 1.0 if self.candidate.quality is None else worst_cosine(self.candidate.quality)

    def misses(self, gate: Gate) -> bool:
        return _misses(self.candidate, gate)

    def sites(self, keep_float: Mapping[str, str]) -> list[NodeSite]:
        """What may be in 8 bits or in floats."""
        found = [site for site in quantizable(self.bench.model) if site.name not in keep_float]
        # Dynamic quantization leaves convolutions in floats.
        return [site for site in found if self.ranges is not None or site.op_type != "Conv"]


def _misses(candidate: Candidate, gate: Gate) -> bool:
    """Whether a candidate is not near enough, or cannot be compared at all."""
    if candidate.failure is not None:
        return True
    return candidate.quality is not None and missed(candidate.quality, gate) is not None


def eight_bit_candidates(
    bench: Workbench,
    scheme: Scheme,
    keep_float: Mapping[str, str],
    *,
    gate: Gate,
    method: Method | None,
    clock: Clock | None,
    for_speed: bool = True,
) -> list[Candidate]:
    """The ways to compute in 8 bits that are worth timing; one that misses the gate if none passes it.

    Args:
        bench: the float model and where candidates are made.
        scheme: one of `SEARCHED`.
        keep_float: nodes that the user wants in floats, with the reason.
        gate: what a candidate must keep.
        method: of calibration; None to try all and take the one with the nearest outputs.
        clock: of the target; None to assume times by multiply-adds.
        for_speed: whether nodes that are no faster in 8 bits may stay in floats; only a clock that measures says so.
    """
    ways = _whole(bench, scheme, keep_float, method)
    passing = [way for way in ways if not way.misses(gate)]
    if not passing:
        nearest = max(ways, key=lambda way: way.cosine)
        return [_mixed(nearest, gate, keep_float, clock) or nearest.candidate]
    found = [way.candidate for way in passing]
    if for_speed and clock is not None and clock.is_measured:
        found += [mix for mix in _faster(passing[0], keep_float, clock) if not _misses(mix, gate)]
    return found


def _whole(bench: Workbench, scheme: Scheme, keep_float: Mapping[str, str], method: Method | None) -> list[_Way]:
    """Everything in 8 bits: smoothed where that is free and nearer, and where it costs nodes if it is much nearer."""
    best = _plain(bench, scheme, keep_float, method)
    for_all = method or best.method
    if (smoothed := bench.smoothed) is not None:
        best = max(best, _plain(smoothed, scheme, keep_float, for_all), key=lambda way: way.cosine)
    if best.cosine >= _NEAR or (smoother := bench.smoothed_at_a_price) is None:
        return [best]
    other = _plain(smoother, scheme, keep_float, for_all)
    return [best, other] if other.cosine > best.cosine else [best]


def _plain(bench: Workbench, scheme: Scheme, keep_float: Mapping[str, str], method: Method | None) -> _Way:
    """Everything in 8 bits; INT8 with static ranges by the method of calibration with the nearest outputs."""
    if scheme == "int8-dynamic":
        return _way(bench, keep_float, lambda kept, end: bench.dynamic(kept, f"int8-dynamic{end}"), None)
    if scheme == "fp8":
        return _way(bench, keep_float, lambda kept, end: bench.other("fp8", kept, f"fp8{end}"), bench.fp8_ranges)
    found = bench.ranges(METHODS if method is None else (method,))
    ways = [_static(bench, name, ranges, keep_float) for name, ranges in found.items()]
    return max(ways, key=lambda way: way.cosine)


def _static(bench: Workbench, method: Method, ranges: Mapping[str, Range], keep_float: Mapping[str, str]) -> _Way:
    def make(kept: Mapping[str, str], end: str) -> Candidate:
        return bench.static(bench.completed(ranges, method, kept), kept, f"int8-static-{method}{end}")

    return dataclasses.replace(_way(bench, keep_float, make, ranges), method=method)


def _way(
    bench: Workbench,
    keep_float: Mapping[str, str],
    make: Callable[[Mapping[str, str], str], Candidate],
    ranges: Mapping[str, Range] | None,
) -> _Way:
    return _Way(bench, make, make(keep_float, ""), ranges)


def _mixed(way: _Way, gate: Gate, keep_float: Mapping[str, str], clock: Clock | None) -> Candidate | None:
    """Some nodes in floats, chosen by their errors and times; None if no choice passes the gate.

    The errors of single nodes only foretell that of a mix: after a try, less or more is allowed by as much as that was
    wrong, until the gate is passed with little to spare.
    """
    sites = way.sites(keep_float)
    errors = _errors(way, sites)
    # What ONNX Runtime cannot load has no times.
    costs, known = _costs(way, sites, errors, None if way.candidate.failure is not None else clock)
    allowed = limit = error_of_cosine(gate.min_cosine)
    best, too_much = None, math.inf
    for turn in range(_MIXES):
        try:
            floats = choose_float_nodes(costs, max_error=limit)
        except Infeasible:
            break
        if len(floats) == len(sites):  # the float model, which is tried anyway
            break
        reasons = {name: f"error {errors[name]:.2g} alone" for name in sorted(floats)}
        end = f"-mix{turn + 1}" if turn else "-mix"
        mix = dataclasses.replace(way, candidate=way.make({**keep_float, **reasons}, end))
        foretold = math.fsum(cost.error for cost in costs if cost.name not in floats)
        seen = error_of_cosine(mix.cosine) if mix.cosine > 0 else math.inf
        if mix.misses(gate):
            if best is not None:
                break
            too_much, limit = limit, foretold * _stricter(seen, allowed)
            continue
        found = (
            f"{len(floats)} of {len(sites)} nodes stay in floats: cosine {cosine_of_error(foretold):.4f} was "
            f"predicted from errors of single nodes, {mix.cosine:.4f} is measured"
        )
        best = _told(mix.candidate, costs, floats, known, found)
        limit *= min(_CAUTION * allowed / seen, _LOOSEST) if seen > 0 else _LOOSEST
        if limit >= too_much or seen > _FULL * allowed or not floats:
            break
    return best


def _stricter(seen: float, allowed: float) -> float:
    """By what to multiply the error that the last mix was foretold, for the next one to have what is allowed."""
    least, most = _STEPS
    if not seen > allowed:  # it missed the gate by something else than its cosine
        return most
    return min(max(_CAUTION * allowed / seen, least), most)


def _faster(way: _Way, keep_float: Mapping[str, str], clock: Clock) -> list[Candidate]:
    """Without the nodes that are no faster in 8 bits: all of them, and the first ones alone; what is worth a try."""
    sites = way.sites(keep_float)
    costs, known = _costs(way, sites, {}, clock)
    if known is None:
        return []
    whole = math.fsum(kernel.us for kernel in clock.kernels(way.candidate.path))
    by_name = {cost.name: cost for cost in costs}
    choices = {"-fast": choose_float_nodes(costs, max_error=None), "-front": choose_float_front(costs)}
    found: list[Candidate] = []
    tried: list[set[str]] = []
    for end, floats in choices.items():
        gain = math.fsum(by_name[name].int8_us - by_name[name].float_us for name in floats)
        if gain < _LEAST_GAIN * whole or len(floats) == len(sites) or floats in tried:
            continue
        tried.append(floats)
        reasons = {
            name: f"{by_name[name].float_us:.0f} us, {by_name[name].int8_us:.0f} us in 8 bits"
            for name in sorted(floats)
        }
        mix = dataclasses.replace(way.make({**keep_float, **reasons}, end), variant_of=way.candidate.label)
        note = f"{len(floats)} of {len(sites)} nodes stay in floats, which are faster"
        found.append(_told(mix, costs, floats, known, note))
    return found


def _told(
    mix: Candidate, costs: Sequence[NodeCost], floats: set[str], known: tuple[float, str] | None, note: str
) -> Candidate:
    if known is None:
        note = f"{note}; times of nodes are assumed by their multiply-adds"
        return dataclasses.replace(mix, notes=(*mix.notes, note))
    rest_us, source = known
    nodes_us = math.fsum(cost.float_us if cost.name in floats else cost.int8_us for cost in costs)
    note = f"{note}; times of nodes are {source}"
    return dataclasses.replace(mix, notes=(*mix.notes, note), predicted_ms=(rest_us + nodes_us) / 1e3)


def _errors(way: _Way, sites: Sequence[NodeSite]) -> dict[str, float]:
    bench, ranges = way.bench, way.ranges
    bench.folder.mkdir(parents=True, exist_ok=True)
    return node_errors(
        bench.model,
        bench.folder,
        [Switch(site.name, None if ranges is None else ranges.get(site.activation)) for site in sites],
        bench.samples.calibration[:_SENSITIVITY_INPUTS],
        activations="fp8" if way.candidate.scheme == "fp8" else bench.dialect.activations,
        symmetric=is_tensorrt(bench.dialect.backend),
        threads=bench.threads,
        progress=lambda done, total, what: bench.progress("sensitivity", done, total, what),
    )


def _costs(
    way: _Way, sites: Sequence[NodeSite], errors: Mapping[str, float], clock: Clock | None
) -> tuple[list[NodeCost], tuple[float, str] | None]:
    """Errors and times of nodes; what a call takes beside them and where the times are from, None if assumed."""
    times = None if clock is None else _times(way, clock)
    if clock is None or times is None:
        return node_costs(sites, errors, None, None), None
    floats, integers = times
    own = {site.name for site in sites}
    rest = integers.rest_us + math.fsum(us for name, us in integers.us.items() if name not in own)
    source = "measured here" if clock.is_measured else "predicted from a probe of the target"
    return node_costs(sites, errors, floats, integers), (rest + clock.overhead_us, source)


def _times(way: _Way, clock: Clock) -> tuple[Attribution, Attribution] | None:
    """Kernels of the float model and of that in 8 bits, by node; None for an operator that the cost model lacks."""
    model = way.bench.model
    everything = quantizable(model)
    way.bench.progress("time nodes", 0, 1, way.candidate.label)
    try:
        floats, integers = (
            attribute(clock.kernels(path), model, everything) for path in (way.bench.floats, way.candidate.path)
        )
    except UnsupportedModelError:
        if clock.is_measured:
            raise
        return None
    return floats, integers
