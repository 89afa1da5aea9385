"""The range of a tensor's numbers, whole or by channel."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from numpy.typing import NDArray

__all__ = ["ChannelRanges", "Range"]

# A 256th of anything narrower is no normal float32 any more, and a scale of zero divides by zero.
_NARROWEST = 256 * float(np.finfo(np.float32).tiny)


@dataclasses.dataclass(frozen=True)
class Range:
    """From the lowest to the highest number that a quantized tensor shall hold; what lies outside is clipped.

    Attributes:
        low: finite.
        high: finite, not below `low`.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        """Refuse what no scale can be made from."""
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low <= self.high):
            raise ValueError(f"from {self.low} to {self.high} is no range")

    @property
    def absolute(self) -> float:
        """The largest magnitude."""
        return max(abs(self.low), abs(self.high))

    @property
    def is_constant(self) -> bool:
        """Whether all numbers were the same."""
        return self.low == self.high

    def with_zero(self) -> Range:
        """Widened until it holds zero, which padding and ReLU need exactly."""
        return Range(min(self.low, 0.0), max(self.high, 0.0))

    def symmetric(self) -> Range:
        """Widened until both sides are as far from zero."""
        return Range(-self.absolute, self.absolute)

    def union(self, other: Range) -> Range:
        """The narrowest range that holds both."""
        return Range(min(self.low, other.low), max(self.high, other.high))

    def quantizable(self, *, symmetric: bool = False) -> Range:
        """As a quantizer needs it: with zero, and never so narrow that its scale would be zero.

        A tensor of nothing but zeros gets 1 as its highest number: zero is exact in any range that holds it.
        """
        wide = self.symmetric() if symmetric else self.with_zero()
        if wide.high - wide.low >= _NARROWEST:
            return wide
        return Range(-1.0 if symmetric else 0.0, 1.0)


@dataclasses.dataclass(frozen=True, eq=False)
class ChannelRanges:
    """The range of each channel of a tensor, float32 of (channels,) both."""

    low: NDArray[np.float32]
    high: NDArray[np.float32]

    @property
    def absolute(self) -> NDArray[np.float32]:
        """The largest magnitude of each channel, float32 of (channels,): what SmoothQuant divides by."""
        largest: NDArray[np.float32] = np.maximum(np.abs(self.low), np.abs(self.high))
        return largest

    @property
    def whole(self) -> Range:
        """The range of all channels together."""
        return Range(float(self.low.min()), float(self.high.max()))
