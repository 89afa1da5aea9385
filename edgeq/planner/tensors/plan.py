"""The record of what was decided for a tensor model, with what it will take on its device."""

from __future__ import annotations

from pathlib import Path

from edgeq.errors import BudgetError
from edgeq.planner.tensors.candidates import DISABLED_OPTIMIZERS
from edgeq.planner.tensors.decide import Decision
from edgeq.planner.tensors.predict import predict
from edgeq.planner.tensors.prepare import Prepared, needs_narrow_weights
from edgeq.tensor_types import TensorPlan
from edgeq.units import format_bytes

__all__ = ["make_plan"]


def make_plan(prepared: Prepared, decision: Decision, model: Path) -> TensorPlan:
    """The plan that a manifest records.

    Args:
        prepared: the model and the device.
        decision: what is shipped.
        model: its ONNX file.

    Raises:
        BudgetError: it takes more memory than the budget has.
    """
    chosen = decision.chosen
    on_cpu = prepared.backend.name == "onnxruntime-cpu"
    speedup = None
    if decision.timing is not None and decision.float_timing is not None:
        speedup = 1 / decision.timing.slowness
    predicted, unknown = predict(model, prepared.profile, prepared.backend, prepared.axes)
    limit = prepared.budget.peak_memory_bytes
    if limit is not None and predicted.peak_memory_bytes > limit:
        raise BudgetError(
            f"{chosen.label} takes {format_bytes(predicted.peak_memory_bytes)} at its peak, the limit is "
            f"{format_bytes(limit)}",
            "Raise --max-memory, choose a smaller --precision, or fix smaller sizes with --shape",
        )
    return TensorPlan(
        backend=prepared.backend.name,
        scheme=chosen.scheme,
        activations=chosen.activations,
        float_nodes=dict(chosen.float_nodes),
        axes=dict(prepared.axes),
        threads=prepared.bench.threads,
        disabled_optimizers=DISABLED_OPTIMIZERS if on_cpu else (),
        predicted=predicted,
        speedup=speedup,
        rejected=decision.rejected,
        notes=(
            *prepared.exported.notes,
            *prepared.samples.notes,
            *_narrow_note(prepared, decision),
            *unknown,
            *decision.notes,
        ),
    )


def _narrow_note(prepared: Prepared, decision: Decision) -> tuple[str, ...]:
    if decision.chosen.activations is None or not needs_narrow_weights(prepared.profile, prepared.backend):
        return ()
    return (f"weights have 7 bits: {prepared.profile.name} names no VNNI, without which sums of bytes overflow",)
