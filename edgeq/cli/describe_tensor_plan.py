"""What ``edgeq plan`` says of a model that is called with arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeq.cli.describe import sections
from edgeq.cli.describe_tensor import coverage_lines, plan_head_lines, tensor_quality_lines
from edgeq.cli.tables import format_table
from edgeq.tensor_types import FLOAT_SCHEMES
from edgeq.types import BUDGET_LINES
from edgeq.units import format_bytes, format_quantity

if TYPE_CHECKING:
    from edgeq.planner.tensors.plan_only import TensorPreview

__all__ = ["preview_lines"]

_NONE = "-"


def preview_lines(preview: TensorPreview) -> list[str]:
    """The model, the decisions, what each precision would take, coverage, and the budget, for each device."""
    head = plan_head_lines(preview.source, preview.artifact, preview.plan, preview.built_for)
    return sections(
        head,
        _options(preview),
        [] if preview.coverage is None else coverage_lines(preview.coverage),
        [] if preview.quality is None else tensor_quality_lines(preview.quality),
        _budget(preview),
        *(preview_lines(other) for other in preview.others),
    )


def _options(preview: TensorPreview) -> list[str]:
    rows = []
    for option in preview.options:
        predicted, covered = option.predicted, option.coverage
        if predicted is None:
            continue
        latency = _NONE if predicted.latency_ms is None else format_quantity(predicted.latency_ms, "ms")
        rows.append(
            [
                option.scheme,
                _NONE if covered is None or option.scheme in FLOAT_SCHEMES else f"{covered.mac_share:.1%}",
                format_bytes(predicted.file_bytes),
                format_bytes(predicted.weights_bytes),
                format_bytes(predicted.activation_bytes),
                format_bytes(predicted.peak_memory_bytes),
                f"≳ {latency}" if predicted.latency_is_floor else latency,
            ]
        )
    header = ["in this order", "quantized", "file", "weights", "activations", "peak memory", "latency"]
    return format_table(header, rows, right=(1, 2, 3, 4, 5, 6))


def _budget(preview: TensorPreview) -> list[str]:
    """Predictions held against limits; what is not predicted only a measurement can judge."""
    rows = []
    for line in BUDGET_LINES:
        limit, predicted = preview.budget.limit(line), getattr(preview.plan.predicted, line.field, None)
        if limit is None and predicted is None:
            continue
        least = preview.plan.predicted.latency_is_floor and line.field == "latency_ms"
        if limit is None:
            verdict = _NONE
        elif predicted is None:
            verdict = "not predicted"
        else:
            passes, fails = ("may pass", "unlikely to pass") if least else ("would pass", "would fail")
            verdict = passes if predicted <= limit else fails
        rows.append(
            [
                line.label,
                _NONE if predicted is None else f"{'≳ ' if least else ''}{format_quantity(predicted, line.unit)}",
                _NONE if limit is None else f"{'≤' if line.at_most else '≥'} {format_quantity(limit, line.unit)}",
                verdict,
            ]
        )
    return format_table(["budget line", "predicted", "limit", ""], rows, right=(1, 2))
