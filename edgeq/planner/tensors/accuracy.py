"""What the gate asks of a candidate, and by how much it misses."""

from __future__ import annotations

from edgeq.planner.tensors.job import Gate
from edgeq.tensor_types import TensorQuality

__all__ = ["missed", "worst_cosine"]


def worst_cosine(quality: TensorQuality) -> float:
    """The lowest mean cosine of any output."""
    return min((output.mean_cosine for output in quality.outputs), default=1.0)


def missed(quality: TensorQuality, gate: Gate) -> str | None:
    """The first thing that falls short, with both figures; None if the gate is passed."""
    worst = min(quality.outputs, key=lambda output: output.mean_cosine, default=None)
    if worst is not None and not worst.mean_cosine >= gate.min_cosine:  # NaN falls short too
        return f"cosine {worst.mean_cosine:.4f} of {worst.name}, at least {gate.min_cosine:g} is asked for"
    if gate.min_top1 is not None and quality.top1 is not None and quality.top1 < gate.min_top1:
        return f"top-1 agreement {quality.top1:.1%}, at least {gate.min_top1:.1%} is asked for"
    return None
