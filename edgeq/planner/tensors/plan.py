"""The record of what was decided for a tensor model, with what it will take on its device."""

from __future__ import annotations

from pathlib import Path

from edgeq.converters.onnx.export.write import describe_graph
from edgeq.planner.tensors.decide import Decision
from edgeq.planner.tensors.memory_budget import memory_error
from edgeq.planner.tensors.options import predicted_of
from edgeq.planner.tensors.prepare import Prepared, needs_narrow_weights
from edgeq.tensor_types import TensorPlan

__all__ = ["make_plan"]


def make_plan(prepared: Prepared, decision: Decision, model: Path) -> TensorPlan:
    """The plan that a manifest records.

    Args:
        prepared: the model and the device.
        decision: what is shipped.
        model: its ONNX file.

    Raises:
        BudgetError: it takes more memory than the budget has, with what would fit.
    """
    chosen = decision.chosen
    speedup = None
    if decision.timing is not None and decision.float_timing is not None:
        speedup = 1 / decision.timing.slowness
    predicted, unknown = predicted_of(prepared, model, prepared.axes)
    limit = prepared.budget.peak_memory_bytes
    if limit is not None and predicted.peak_memory_bytes > limit:
        rejected = [entry.option for entry in decision.rejected]
        raise memory_error(prepared, chosen.scheme, model, chosen.label, rejected, prepared.bench.folder / "counted")
    return TensorPlan(
        backend=prepared.backend.name,
        scheme=chosen.scheme,
        activations=chosen.activations,
        float_nodes=dict(chosen.float_nodes),
        axes=dict(prepared.axes),
        threads=prepared.bench.threads,
        opset=_newer_opset(prepared, model),
        disabled_optimizers=() if prepared.backend.on_gpu else chosen.disabled_optimizers,
        predicted=predicted,
        speedup=speedup,
        rejected=decision.rejected,
        notes=(
            *decision.notes,
            *prepared.exported.notes,
            *prepared.samples.notes,
            *_narrow_note(prepared, decision),
            *unknown,
        ),
    )


def _newer_opset(prepared: Prepared, model: Path) -> int | None:
    written = describe_graph(model)[2]
    return None if written == prepared.exported.artifact.opset else written


def _narrow_note(prepared: Prepared, decision: Decision) -> tuple[str, ...]:
    if decision.chosen.activations is None or not needs_narrow_weights(prepared.profile, prepared.backend):
        return ()
    return (f"weights have fewer steps: {prepared.profile.name} names no VNNI, without which sums of bytes overflow",)
