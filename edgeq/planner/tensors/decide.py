"""The fastest way to compute a model that stays near enough to it, measured where that is possible."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

from edgeq.converters.onnx.calibration.ranges import Range
from edgeq.converters.onnx.quantize.sites import NodeSite, quantizable
from edgeq.converters.onnx.sensitivity import Switch, node_errors
from edgeq.errors import ConversionError
from edgeq.planner.knapsack import Infeasible
from edgeq.planner.tensors.accuracy import missed, worst_cosine
from edgeq.planner.tensors.candidates import DISABLED_OPTIMIZERS, METHODS, Candidate, Method, Workbench
from edgeq.planner.tensors.job import Gate
from edgeq.planner.tensors.mixed import NodeCost, choose_float_nodes, error_of_cosine
from edgeq.planner.tensors.timing import Timing, time_in_turns
from edgeq.profiles.device import Backend, DeviceProfile
from edgeq.tensor_types import Scheme
from edgeq.types import Rejection

__all__ = ["Decision", "decide", "is_like_this_machine"]

_SENSITIVITY_INPUTS = 2
_MIXES = 3  # tries to find a mix that passes the gate
_TIGHTER = 0.5  # of the allowed error, after a mix that missed the gate
_ASSUMED_SPEEDUP = 2.0  # of INT8 products over float ones, where nothing was measured


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


def is_like_this_machine(profile: DeviceProfile, backend: Backend) -> bool:
    """Whether times of this machine say which way is faster on the target."""
    return not backend.on_gpu and profile.arch in (platform.machine(), "any")


def decide(
    bench: Workbench,
    schemes: Sequence[Scheme],
    gate: Gate,
    keep_float: Mapping[str, str],
    *,
    method: Method | None,
    timed: bool,
    asked: bool,
) -> Decision:
    """Make candidates, drop what misses the gate, and take the fastest.

    Args:
        bench: the float model and where candidates are made.
        schemes: to try, in the order of preference.
        gate: what a candidate must keep.
        keep_float: nodes that the user wants in floats, with the reason.
        method: of calibration; None to try all and take the one with the nearest outputs.
        timed: whether times of this machine count for the target.
        asked: whether the user named the precision: then nothing else is taken in its place.

    Raises:
        ConversionError: what was asked for misses the gate or covers too little, with both figures.
    """
    rejected: list[Rejection] = []
    passing: list[Candidate] = []
    for scheme in schemes:
        found = _candidate(bench, scheme, gate, keep_float, method)
        why = missed_gate(found, gate)
        if why is None:
            passing.append(found)
        else:
            rejected.append(Rejection(option=found.label, reason=why))
    if not passing:
        reasons = "; ".join(f"{entry.option}: {entry.reason}" for entry in rejected)
        raise ConversionError(
            f"Nothing that was asked for passes the gate: {reasons}",
            "Lower --min-cosine, give real inputs with --calibration, or choose --precision auto",
        )
    if not timed:
        return _untimed(passing, rejected)
    return _timed(bench, passing, rejected, gate, asked=asked)


def missed_gate(candidate: Candidate, gate: Gate) -> str | None:
    """Why a candidate is not taken; None if nothing speaks against it."""
    if candidate.quality is not None and (why := missed(candidate.quality, gate)) is not None:
        return why
    found = candidate.coverage
    if found is None or candidate.scheme in ("fp32", "fp16") or found.mac_share >= gate.min_coverage:
        return None
    named = ", ".join([name for name in found.left if name not in candidate.float_nodes][:5])
    if not named:  # the user's or the search's own choice
        return None
    return f"only {found.mac_share:.0%} of the multiply-adds are quantized; in floats are {named}"


def _candidate(
    bench: Workbench, scheme: Scheme, gate: Gate, keep_float: Mapping[str, str], method: Method | None
) -> Candidate:
    if scheme == "fp32":
        return bench.float_model()
    if scheme in ("int8-static", "int8-dynamic"):
        return _integers(bench, scheme, gate, keep_float, method)
    return bench.other(scheme, keep_float)


@dataclasses.dataclass(frozen=True)
class _Tried:
    """INT8 of one float model, smoothed or not."""

    bench: Workbench
    candidate: Candidate
    ranges: Mapping[str, Range] | None  # None for dynamic INT8
    label: str

    @property
    def cosine(self) -> float:
        return 1.0 if self.candidate.quality is None else worst_cosine(self.candidate.quality)

    def misses(self, gate: Gate) -> bool:
        return self.candidate.quality is not None and missed(self.candidate.quality, gate) is not None

    def again(self, keep_float: Mapping[str, str]) -> _Tried:
        """With other nodes in floats."""
        return dataclasses.replace(self, candidate=_made(self.bench, self.ranges, keep_float, self.label))


def _made(bench: Workbench, ranges: Mapping[str, Range] | None, keep_float: Mapping[str, str], label: str) -> Candidate:
    return bench.dynamic(keep_float) if ranges is None else bench.static(ranges, keep_float, label)


def _integers(
    bench: Workbench, scheme: Scheme, gate: Gate, keep_float: Mapping[str, str], method: Method | None
) -> Candidate:
    """Everything in INT8; smoothed, if that misses the gate; with some nodes in floats, if that does too."""
    best = _plain(bench, scheme, keep_float, method)
    if best.misses(gate) and (smoothed := bench.smoothed()) is not None:
        best = max(best, _plain(smoothed, scheme, keep_float, method), key=lambda tried: tried.cosine)
    if best.misses(gate):
        best = _mixed(best, gate, keep_float) or best.again(keep_float)
    return best.candidate


def _plain(bench: Workbench, scheme: Scheme, keep_float: Mapping[str, str], method: Method | None) -> _Tried:
    """Everything in INT8, static by the method of calibration with the nearest outputs."""
    if scheme == "int8-dynamic":
        return _Tried(bench, bench.dynamic(keep_float), None, "int8-dynamic")
    tried = [
        _Tried(bench, bench.static(ranges, keep_float, label), ranges, label)
        for label, ranges in (
            (f"int8-static-{name}", ranges)
            for name, ranges in bench.ranges(METHODS if method is None else (method,)).items()
        )
    ]
    return max(tried, key=lambda one: one.cosine)


def _mixed(tried: _Tried, gate: Gate, keep_float: Mapping[str, str]) -> _Tried | None:
    """Some nodes in floats, chosen by their errors and costs; None if no choice passes the gate."""
    bench, ranges = tried.bench, tried.ranges
    sites = [site for site in quantizable(bench.model) if site.name not in keep_float]
    if ranges is None:
        sites = [site for site in sites if site.op_type != "Conv"]  # which dynamic quantization leaves in floats
    errors = node_errors(
        bench.model,
        bench.folder,
        [Switch(site.name, None if ranges is None else ranges.get(site.activation)) for site in sites],
        bench.samples.calibration[:_SENSITIVITY_INPUTS],
        activations=bench.activations,
        threads=bench.threads,
        progress=lambda done, total, what: bench.progress("sensitivity", done, total, what),
    )
    costs = [_cost(site, errors[site.name]) for site in sites]
    allowed = error_of_cosine(gate.min_cosine)
    for attempt in range(_MIXES):
        try:
            chosen = choose_float_nodes(costs, max_error=allowed * _TIGHTER**attempt)
        except Infeasible:
            return None
        if len(chosen) == len(sites):  # the float model, which is tried anyway
            return None
        mix = tried.again({**keep_float, **{name: f"error {errors[name]:.2g} alone" for name in sorted(chosen)}})
        if not mix.misses(gate):
            return mix
    return None


def _cost(site: NodeSite, error: float) -> NodeCost:
    """Times by multiply-adds: that products of integers are faster by one factor is all that the choice needs."""
    work = float(site.macs or site.weights)
    return NodeCost(site.name, error, work, work / _ASSUMED_SPEEDUP, 4 * site.weights, site.weights)


def _untimed(passing: Sequence[Candidate], rejected: Sequence[Rejection]) -> Decision:
    chosen = passing[0]
    others = [Rejection(option=c.label, reason=f"{chosen.label} comes first on this backend") for c in passing[1:]]
    return Decision(chosen, None, None, (*rejected, *others), ("speed was not measured: this is not the target",))


def _timed(
    bench: Workbench, passing: Sequence[Candidate], rejected: Sequence[Rejection], gate: Gate, *, asked: bool
) -> Decision:
    models: list[Path] = [bench.reference, *(candidate.path for candidate in passing)]
    bench.progress("time", 0, 1, "in turns with the float model")
    float_timing, *timings = time_in_turns(
        models,
        bench.samples.judged,
        threads=bench.threads,
        disabled_optimizers=[DISABLED_OPTIMIZERS] * len(models),
    )
    ranked = sorted(zip(passing, timings, strict=True), key=lambda pair: pair[1].slowness)
    chosen, timing = ranked[0]
    others = [
        Rejection(option=c.label, reason=f"{t.ms:.2f} ms a call, {chosen.label} takes {timing.ms:.2f} ms")
        for c, t in ranked[1:]
    ]
    notes: list[str] = []
    if chosen.scheme != "fp32" and timing.slowness > gate.max_slowdown:
        slower = f"{chosen.label} takes {timing.slowness:.2f} times what the float model takes here"
        if asked:
            notes.append(f"{slower}: --precision auto would ship the float model")
        else:
            others = [*others, Rejection(option=chosen.label, reason=slower)]
            chosen, timing = bench.float_model(), float_timing
    if chosen.scheme == "fp32" and not asked:
        notes.append("the float model is shipped: nothing that passes the gate is faster here")
    return Decision(chosen, timing, float_timing, (*rejected, *others), tuple(notes))
