"""What the gate asks of a candidate, and by how much it misses."""

from __future__ import annotations

import dataclasses

from edgeq.planner.tensors.job import Gate
from edgeq.tensor_types import OutputQuality, TensorQuality

__all__ = ["SENTENCE", "Miss", "missed", "worst_cosine"]

SENTENCE = "sentence embedding"
"""The name under which the pooled vectors of a text encoder are compared."""


def worst_cosine(quality: TensorQuality) -> float:
    """The lowest mean cosine of any output that counts; see `missed`."""
    return min((output.mean_cosine for output in _counted(quality)), default=1.0)


def _counted(quality: TensorQuality) -> tuple[OutputQuality, ...]:
    return tuple(output for output in quality.outputs if output.name == SENTENCE) or quality.outputs


@dataclasses.dataclass(frozen=True)
class Miss:
    """What falls short.

    Attributes:
        reason: with both figures.
        option: of the command line, that asks for less.
    """

    reason: str
    option: str = "--min-cosine"


def missed(quality: TensorQuality, gate: Gate) -> Miss | None:
    """The first thing that falls short; None if the gate is passed.

    A detector is judged by what it detects, where the float model detects something: queries that say "nothing" may
    have any box, and their cosine says nothing. A text encoder is judged by the vectors of whole texts that it is
    there for: hidden states of single tokens are compared and shown, but do not count.
    """
    worst = min(_counted(quality), key=lambda output: output.mean_cosine, default=None)
    if quality.detection_map is not None:
        if quality.detection_map < gate.min_detection_map:
            return Miss(
                f"mean average precision {quality.detection_map:.1%} against the float model's detections, at least "
                f"{gate.min_detection_map:.1%} is asked for",
                "--min-detection-map",
            )
    elif worst is not None and not worst.mean_cosine >= gate.min_cosine:  # NaN falls short too
        found = _below(worst.mean_cosine, gate.min_cosine)
        return Miss(f"cosine {found} of {worst.name}, at least {gate.min_cosine:g} is asked for")
    return _missed_classes(quality, gate) or _missed_metric(quality, gate)


def _below(value: float, limit: float) -> str:
    """With as many digits as show that it is below."""
    texts = [f"{value:.{digits}f}" for digits in (4, 6, 9)]
    return next((text for text in texts if not float(text) >= limit), texts[-1])


def _missed_classes(quality: TensorQuality, gate: Gate) -> Miss | None:
    if gate.min_top1 is None:
        return None
    if quality.top1 is None:
        return Miss(f"top-1 agreement was not measured, at least {gate.min_top1:.1%} is asked for", "--min-top1")
    if quality.top1 < gate.min_top1:
        return Miss(f"top-1 agreement {quality.top1:.1%}, at least {gate.min_top1:.1%} is asked for", "--min-top1")
    return None


def _missed_metric(quality: TensorQuality, gate: Gate) -> Miss | None:
    if gate.max_metric_drop is None or quality.metric is None:
        return None
    found, floats = quality.metric
    if floats - found <= gate.max_metric_drop:
        return None
    return Miss(
        f"metric {found:.4g}, the float model has {floats:.4g}: a drop of {gate.max_metric_drop:g} is allowed",
        "Gate.max_metric_drop",
    )
