"""Tensor bundles as lines for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeq.cli.describe import sections
from edgeq.cli.tables import format_table
from edgeq.tensor_types import FLOAT_SCHEMES
from edgeq.types import BUDGET_LINES
from edgeq.units import format_bytes, format_quantity

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgeq.converters.onnx.layers import LayerError
    from edgeq.tensor_types import (
        Coverage,
        TensorArtifact,
        TensorManifest,
        TensorPlan,
        TensorQuality,
        TensorSpec,
        TensorVariant,
    )
    from edgeq.types import Budget, ModelSource

__all__ = ["coverage_lines", "layer_lines", "plan_head_lines", "tensor_lines", "tensor_quality_lines"]

_MOST_LEFT = 8


def tensor_lines(manifest: TensorManifest) -> list[str]:
    """The model, the decisions, what is quantized, how near it is, and what it takes."""
    return sections(
        plan_head_lines(manifest.source, manifest.artifact, manifest.plan, manifest.built_for),
        [] if manifest.coverage is None else coverage_lines(manifest.coverage),
        [] if manifest.quality is None else tensor_quality_lines(manifest.quality),
        _prediction(manifest),
        *(_variant(other) for other in manifest.others),
    )


def _variant(other: TensorVariant) -> list[str]:
    """What is different for another device."""
    return sections(
        [f"also for {other.built_for}", *_plan(other.plan, other.built_for)],
        [] if other.coverage is None else coverage_lines(other.coverage),
        [] if other.quality is None else tensor_quality_lines(other.quality),
        _prediction(other),
    )


def plan_head_lines(source: ModelSource, artifact: TensorArtifact, plan: TensorPlan, built_for: str) -> list[str]:
    """The model and the decisions."""
    return [
        f"model    {source.id}, {source.architecture}, {source.n_params / 1e6:.1f} M weights, {artifact.task}",
        f"takes    {'; '.join(_spec(spec) for spec in artifact.inputs)}",
        f"gives    {'; '.join(_spec(spec) for spec in artifact.outputs)}",
        *_plan(plan, built_for),
    ]


def _plan(plan: TensorPlan, built_for: str) -> list[str]:
    activations = {"u8": ", unsigned activations", "s8": ", signed activations", None: ""}[plan.activations]
    speed = "" if plan.speedup is None else f", {plan.speedup:.2f} times as fast as the float model here"
    lines = [f"plan     {plan.scheme}{activations}, for {plan.backend} of {built_for}{speed}"]
    if not plan.on_gpu:
        lines.append(f"threads  {plan.threads or 'as many as the machine has physical cores'}")
    for name, sizes in plan.axes.items():
        lines.append(f"axis     {name}: {sizes.least} to {sizes.most}, usually {sizes.usual}")
    kept = list(plan.float_nodes.items())
    lines += [f"floats   {name}: {reason}" for name, reason in kept[:_MOST_LEFT]]
    if len(kept) > _MOST_LEFT:
        lines.append(f"floats   and {len(kept) - _MOST_LEFT} more nodes")
    lines += [f"rejected {item.option}: {item.reason}" for item in plan.rejected]
    return lines + [f"note     {note}" for note in plan.notes]


def _spec(spec: TensorSpec) -> str:
    return f"{spec.name} {spec.dtype}[{', '.join(map(str, spec.shape))}]"


def layer_lines(layers: Sequence[LayerError]) -> list[str]:
    """Every layer, with its own error and what has accumulated; the worst ones are marked."""
    from edgeq.converters.onnx.layers import worst_layers

    worst = {layer.name for layer in worst_layers(layers)}
    rows = [
        [
            layer.name,
            layer.op_type,
            "quantized" if layer.quantized else "",
            _decibels(layer.alone_sqnr_db),
            _decibels(layer.sqnr_db),
            f"{layer.cosine:.4f}",
            "<" if layer.name in worst else "",
        ]
        for layer in layers
    ]
    table = format_table(["layer", "operator", "computed", "alone", "accumulated", "cosine", ""], rows, right=[3, 4, 5])
    return ["signal to noise of each layer alone, and of all up to it; < marks those that add most", *table]


def _decibels(value: float | None) -> str:
    return "exact" if value is None else f"{value:.1f} dB"


def coverage_lines(found: Coverage) -> list[str]:
    """What is quantized, by operator."""
    rows = [
        [
            group.op_type,
            group.precision,
            str(group.nodes),
            f"{group.macs / 1e6:.1f} M",
            format_bytes(group.weight_bytes),
        ]
        for group in found.groups
    ]
    table = format_table(["operator", "computes in", "nodes", "multiply-adds", "weights"], rows, right=[2, 3, 4])
    if all(group.precision in FLOAT_SCHEMES for group in found.groups):
        halves = sum(group.macs for group in found.groups if group.precision != "fp32")
        share = halves / max(sum(group.macs for group in found.groups), 1)
        return [f"in 16 bits: {share:.1%} of the multiply-adds; nothing is quantized", *table]
    head = f"quantized: {found.weight_share:.1%} of the weights, {found.mac_share:.1%} of the multiply-adds"
    left = [f"in floats: {', '.join(found.left[:_MOST_LEFT])}"] if found.left else []
    return [head, *table, *left]


def tensor_quality_lines(found: TensorQuality) -> list[str]:
    """How near it is to the float model."""
    rows = [
        [
            output.name,
            f"{output.mean_cosine:.5f}",
            f"{output.min_cosine:.5f}",
            "exact" if output.sqnr_db is None else f"{output.sqnr_db:.1f} dB",
            f"{output.max_error:.3g}",
        ]
        for output in found.outputs
    ]
    table = format_table(["output", "cosine", "worst", "SQNR", "largest error"], rows, right=[1, 2, 3, 4])
    told = [f"against the float model on {found.inputs} inputs of {found.source}"]
    if found.top1 is not None:
        told.append(f"the same class for {found.top1:.1%}")
    if found.detection_map is not None:
        told.append(f"mean average precision {found.detection_map:.1%}")
    if found.metric is not None:
        told.append(f"metric {found.metric[0]:.4g} (float model {found.metric[1]:.4g})")
    return [", ".join(told), *table]


def _prediction(made: TensorManifest | TensorVariant) -> list[str]:
    predicted = made.plan.predicted
    least = "≳ " if predicted.latency_is_floor else ""
    latency = "" if predicted.latency_ms is None else f", {least}{format_quantity(predicted.latency_ms, 'ms')} a call"
    file, peak = format_bytes(predicted.file_bytes), format_bytes(predicted.peak_memory_bytes)
    return [f"predicted: file {file}, peak memory {peak}{latency}", f"budget: {_limits(made.budget)}"]


def _limits(budget: Budget) -> str:
    told = [
        f"{line.label} {'≤' if line.at_most else '≥'} {format_quantity(limit, line.unit)}"
        for line in BUDGET_LINES
        if (limit := budget.limit(line)) is not None
    ]
    return ", ".join(told) or "no limits"
