"""What a conversion of a tensor model would decide, without publishing anything."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import msgspec

from edgeq.errors import ConversionError
from edgeq.planner.tensors.job import TensorJob
from edgeq.planner.tensors.memory_budget import memory_error
from edgeq.planner.tensors.options import TensorOption, count_options, write_option
from edgeq.planner.tensors.plan import make_plan
from edgeq.planner.tensors.prepare import Prepared, decision_of, kept_nodes, prepare, prepare_other
from edgeq.planner.tensors.schemes import impossible_schemes
from edgeq.planner.tensors.writing import DISABLED_OPTIMIZERS
from edgeq.record import Record
from edgeq.staging import staging_folder
from edgeq.tensor_types import FLOAT_SCHEMES, Coverage, TensorArtifact, TensorPlan, TensorQuality
from edgeq.types import Budget, ModelSource, Rejection
from edgeq.units import format_bytes

__all__ = ["TensorPreview", "plan_tensor"]

Progress = Callable[[str, int, int, str], None]

_DRAWN = 2  # random inputs, which nothing is judged on


class TensorPreview(Record, frozen=True, kw_only=True):
    """A plan, and what it was chosen from.

    Attributes:
        source: of the model.
        artifact: what a session must know of it.
        built_for: name of the profile.
        decided: whether everything was calibrated and judged as a conversion does; else it was only counted.
        plan: what is, or would be tried first.
        coverage: of the plan; None for floats.
        quality: measured, if it was decided; else None, as for floats.
        options: every scheme in the order of preference, the impossible ones last.
        budget: the limits.
        others: the same for the other devices of the job.
    """

    source: ModelSource
    artifact: TensorArtifact
    built_for: str
    decided: bool
    plan: TensorPlan
    coverage: Coverage | None
    quality: TensorQuality | None
    options: tuple[TensorOption, ...]
    budget: Budget
    others: tuple[TensorPreview, ...] = ()


def _silent(stage: str, done: int, total: int, detail: str) -> None:
    """A progress callback for those who want none."""


def plan_tensor(job: TensorJob, work_beside: Path, *, decide: bool, progress: Progress = _silent) -> TensorPreview:
    """Decide as `edgeq.planner.tensors.convert.convert_tensor` does, or only count; nothing that is written stays.

    Args:
        job: as for a conversion.
        work_beside: a path in the folder where models may lie meanwhile.
        decide: calibrate, judge, and where it is possible measure every candidate; False for export, cleaning, and
            what each precision would hold.
        progress: told stage, amount done, amount in all, and a detail.

    Raises:
        BudgetError: more memory than the budget has, with what would fit.
        EdgeqError: anything that `edgeq.errors` names.
    """
    if not decide:
        few = dataclasses.replace(job.calibration, samples=_DRAWN, judged=_DRAWN)
        job = dataclasses.replace(job, calibration=few)
    with staging_folder(work_beside) as work:
        prepared = prepare(job, work, progress)
        first = _preview(job, prepared, work, decide=decide)
        others = []
        for index, device in enumerate(job.also_for):
            place = work / f"also-{index}"
            place.mkdir()
            other = prepare_other(job, prepared, device, place, progress)
            others.append(_preview(job, other, place, decide=decide))
    return msgspec.structs.replace(first, others=tuple(others))


def _preview(job: TensorJob, prepared: Prepared, work: Path, *, decide: bool) -> TensorPreview:
    """For one device."""
    kept = kept_nodes(job, prepared.bench)
    options = _options(job, prepared, kept, work)
    if decide:
        decision = decision_of(job, prepared)
        plan, chosen = make_plan(prepared, decision, decision.chosen.path), decision.chosen
        coverage: Coverage | None = chosen.coverage
        quality: TensorQuality | None = chosen.quality
    else:
        plan, coverage = _counted(prepared, kept, options, work)
        quality = None
    return TensorPreview(
        source=prepared.source,
        artifact=prepared.exported.artifact,
        built_for=prepared.profile.name,
        decided=decide,
        plan=plan,
        coverage=coverage,
        quality=quality,
        options=options,
        budget=prepared.budget,
    )


def _options(job: TensorJob, prepared: Prepared, kept: Mapping[str, str], work: Path) -> tuple[TensorOption, ...]:
    """What convert would try, in its order, and what cannot be."""
    counted = count_options(prepared, prepared.schemes, kept, work / "counted")
    impossible = impossible_schemes(prepared.profile, prepared.backend)
    return (
        *(_held_to_gate(option, job, kept) for option in counted),
        *(TensorOption(scheme=scheme, reason=reason) for scheme, reason in impossible.items()),
    )


def _held_to_gate(option: TensorOption, job: TensorJob, kept: Mapping[str, str]) -> TensorOption:
    """With the reason if too little would be quantized, as `edgeq.planner.tensors.decide.missed_gate` has it."""
    found = option.coverage
    if found is None or option.scheme in FLOAT_SCHEMES or found.mac_share >= job.gate.min_coverage:
        return option
    named = [name for name in found.left if name not in kept][:5]
    if not named:
        return option
    why = f"only {found.mac_share:.0%} of the multiply-adds would be quantized; in floats are {', '.join(named)}"
    return TensorOption(scheme=option.scheme, coverage=found, predicted=option.predicted, reason=why)


def _counted(
    prepared: Prepared, kept: Mapping[str, str], options: tuple[TensorOption, ...], work: Path
) -> tuple[TensorPlan, Coverage | None]:
    """The first option that could be and keeps the memory budget; if none does, the smallest is what is refused."""
    able = [(option, option.predicted) for option in options if option.reason is None and option.predicted is not None]
    reasons = [Rejection(option=o.scheme, reason=o.reason) for o in options if o.reason is not None]
    if not able:
        told = "; ".join(f"{entry.option}: {entry.reason}" for entry in reasons)
        raise ConversionError(f"Nothing that was asked for can be: {told}", "Choose --precision auto")
    limit = prepared.budget.peak_memory_bytes
    fitting = [(o, p) for o, p in able if limit is None or p.peak_memory_bytes <= limit]
    if not fitting:
        scheme = min(able, key=lambda pair: pair[1].peak_memory_bytes)[0].scheme
        label = scheme if len(able) == 1 else f"{scheme}, the smallest that would be tried,"
        model = write_option(prepared, scheme, kept, work / "refused")
        raise memory_error(prepared, scheme, model, label, [entry.option for entry in reasons], work / "counted")
    (first, predicted), tried = fitting[0], ", ".join(option.scheme for option, _ in fitting)
    over = [
        Rejection(option=o.scheme, reason=f"takes {format_bytes(p.peak_memory_bytes)}, more than the limit")
        for o, p in able
        if (o, p) not in fitting
    ]
    plan = TensorPlan(
        backend=prepared.backend.name,
        scheme=first.scheme,
        activations=_activations(prepared, first),
        float_nodes={} if first.coverage is None else dict(kept),
        axes=dict(prepared.axes),
        threads=prepared.bench.threads,
        disabled_optimizers=() if prepared.backend.on_gpu else DISABLED_OPTIMIZERS,
        predicted=predicted,
        rejected=(*over, *reasons),
        notes=(
            *prepared.exported.notes,
            *first.notes,
            _undecided(tried),
        ),
    )
    return plan, first.coverage


def _undecided(tried: str) -> str:
    return (
        f"nothing was calibrated or judged: convert tries {tried}, and takes the fastest that passes its gate; "
        "--calibration PATH or --search always decides here"
    )


def _activations(prepared: Prepared, option: TensorOption) -> Literal["u8", "s8"] | None:
    if option.scheme == "int8-dynamic":
        return "u8"
    return prepared.bench.dialect.activations if option.scheme == "int8-static" else None
