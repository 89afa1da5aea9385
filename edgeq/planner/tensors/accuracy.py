"""What the gate asks of a candidate, and by how much it misses."""

from __future__ import annotations

from edgeq.planner.tensors.job import Gate
from edgeq.tensor_types import OutputQuality, TensorQuality

__all__ = ["SENTENCE", "missed", "worst_cosine"]

SENTENCE = "sentence embedding"
"""The name under which the pooled vectors of a text encoder are compared."""


def worst_cosine(quality: TensorQuality) -> float:
    """The lowest mean cosine of any output that counts; see `missed`."""
    return min((output.mean_cosine for output in _counted(quality)), default=1.0)


def _counted(quality: TensorQuality) -> tuple[OutputQuality, ...]:
    return tuple(output for output in quality.outputs if output.name == SENTENCE) or quality.outputs


def missed(quality: TensorQuality, gate: Gate) -> str | None:
    """The first thing that falls short, with both figures; None if the gate is passed.

    A detector is judged by what it detects, where the float model detects something: queries that say "nothing" may
    have any box, and their cosine says nothing. A text encoder is judged by the vectors of whole texts that it is
    there for: hidden states of single tokens are compared and shown, but do not count.
    """
    worst = min(_counted(quality), key=lambda output: output.mean_cosine, default=None)
    if quality.detection_map is not None:
        if quality.detection_map < gate.min_detection_map:
            return (
                f"mean average precision {quality.detection_map:.1%} against the float model's detections, at least "
                f"{gate.min_detection_map:.1%} is asked for"
            )
    elif worst is not None and not worst.mean_cosine >= gate.min_cosine:  # NaN falls short too
        return f"cosine {worst.mean_cosine:.4f} of {worst.name}, at least {gate.min_cosine:g} is asked for"
    if gate.min_top1 is not None and quality.top1 is None:
        return f"top-1 agreement was not measured, at least {gate.min_top1:.1%} is asked for"
    if gate.min_top1 is not None and quality.top1 is not None and quality.top1 < gate.min_top1:
        return f"top-1 agreement {quality.top1:.1%}, at least {gate.min_top1:.1%} is asked for"
    if gate.max_metric_drop is not None and quality.metric is not None:
        found, floats = quality.metric
        if not floats - found <= gate.max_metric_drop:
            return (
                f"metric {found:.4g}, the float model has {floats:.4g}: a drop of {gate.max_metric_drop:g} is allowed"
            )
    return None
