"""A histogram of floats that needs no range beforehand, keeps one size, and does not depend on the order of its data.

Bins are those of the float format itself: an octave between two powers of two is cut into 1,024 equal bins, so the bin
of a number is its sign, its exponent and the first ten bits of its mantissa. The 20 octaves below the largest magnitude
are kept (a millionth of it is still resolved); smaller numbers count as zero. When a larger magnitude comes, the window
moves up and what falls out of it at the bottom joins the zeros. Where the window ends depends on the largest magnitude
alone, so data may come in any order and be merged in any order, and the result is the same to the last count.

Bins of equal width, as other calibrators use, lose the bulk of a tensor in their first bin as soon as one activation
is a thousand times larger than the others, which transformers are known for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

__all__ = ["MANTISSA_BITS", "Bins", "LogHistogram", "NotFiniteError"]

MANTISSA_BITS = 10
_OCTAVES = 20
_ROW = 1 << MANTISSA_BITS
_SPAN = _OCTAVES * _ROW  # bins of one sign, beside that of the small numbers
_DROPPED = 23 - MANTISSA_BITS  # bits of float32's mantissa
_MAGNITUDE = np.uint32(0x7FFFFFFF)
_CHUNK = 1 << 16  # elements whose keys stay in a core's cache


class NotFiniteError(ValueError):
    """NaN or infinity among the numbers; whoever knows their tensor says so to the user."""


@dataclasses.dataclass(frozen=True, eq=False)
class Bins:
    """Bins that hold something, in ascending order; all arrays are of (bins,).

    Attributes:
        low: lower edges, float64.
        high: upper edges, float64; equal to the lower one if all numbers of the bin are the same.
        counts: int64, above zero.
    """

    low: NDArray[np.float64]
    high: NDArray[np.float64]
    counts: NDArray[np.int64]


class LogHistogram:
    """See the module's docstring.

    Attributes:
        low: the smallest number so far, exact; infinity before any.
        high: the largest, likewise.
    """

    def __init__(self) -> None:
        self.low = np.inf
        self.high = -np.inf
        self._base = 1  # biased exponent of the lowest octave; subnormal numbers are never resolved
        self._bins = np.zeros((1, 1 + _SPAN), np.int64)  # a second row for negative numbers as soon as there are any

    @property
    def total(self) -> int:
        """Numbers counted."""
        return int(self._bins.sum())

    @property
    def absolute(self) -> float:
        """The largest magnitude; 0 before any."""
        return max(abs(self.low), abs(self.high)) if self.low <= self.high else 0.0

    def update(self, values: NDArray[np.floating]) -> None:
        """Count numbers.

        Args:
            values: of any shape; counted as float32.

        Raises:
            NotFiniteError: NaN or infinity among them; then none was counted.
        """
        flat = np.ascontiguousarray(values, np.float32).reshape(-1)
        if not flat.size:
            return
        low, high = float(flat.min()), float(flat.max())
        if not (np.isfinite(low) and np.isfinite(high)):
            raise NotFiniteError
        self._widen(low, high)
        signed = len(self._bins) == 2
        floor = np.uint32((self._base << MANTISSA_BITS) - 1)  # the key that stands for all below the window
        for start in range(0, flat.size, _CHUNK):
            bits = flat[start : start + _CHUNK].view(np.uint32)
            keys = bits & _MAGNITUDE
            keys >>= np.uint32(_DROPPED)
            np.maximum(keys, floor, out=keys)
            keys -= floor
            if signed:
                keys += (bits >> np.uint32(31)) * np.uint32(1 + _SPAN)
            self._bins += np.bincount(keys, minlength=self._bins.size).reshape(self._bins.shape)

    def merge(self, other: LogHistogram) -> None:
        """Count what another histogram has counted, which stays as it is."""
        if other.low > other.high:
            return
        taken = LogHistogram.restore(other.state())
        self._widen(other.low, other.high)
        taken._widen(self.low, self.high)  # noqa: SLF001 - of the same class
        self._bins[: len(taken._bins)] += taken._bins  # noqa: SLF001

    def state(self) -> dict[str, NDArray[np.generic]]:
        """All that `restore` needs."""
        return {"limits": np.array([self.low, self.high]), "base": np.array(self._base), "bins": self._bins.copy()}

    @classmethod
    def restore(cls, state: Mapping[str, NDArray[np.generic]]) -> LogHistogram:
        """The histogram that gave this state."""
        histogram = cls()
        histogram.low, histogram.high = (float(limit) for limit in state["limits"].astype(np.float64))
        histogram._base = int(state["base"].astype(np.int64))
        histogram._bins = state["bins"].astype(np.int64)
        return histogram

    def bins(self, mantissa_bits: int = MANTISSA_BITS) -> Bins:
        """What was counted, negative numbers first; edges do not reach beyond `low` and `high`.

        Args:
            mantissa_bits: fewer make wider bins: ``2**mantissa_bits`` an octave.
        """
        edges, sides = self._sides(mantissa_bits)
        if not self.total:
            empty = np.zeros(0)
            return Bins(empty, empty, np.zeros(0, np.int64))
        small = self._bins[:, 0].sum(keepdims=True)
        positive, negative = sides[0], sides[-1] if len(sides) == 2 else np.zeros_like(sides[0])
        low = np.concatenate([-edges[:0:-1], [0.0], edges[:-1]])
        high = np.concatenate([-edges[-2::-1], [0.0], edges[1:]])
        counts = np.concatenate([negative[::-1], small, positive])
        held = counts > 0
        return Bins(np.clip(low[held], self.low, self.high), np.clip(high[held], self.low, self.high), counts[held])

    def magnitudes(self) -> Bins:
        """Of absolute values; zero and what counts as zero first."""
        edges, sides = self._sides(MANTISSA_BITS)
        counts = np.concatenate([self._bins[:, 0].sum(keepdims=True), sides.sum(axis=0)])
        held = counts > 0
        low = np.concatenate([[0.0], edges[:-1]])[held]
        high = np.concatenate([[0.0], edges[1:]])[held]
        return Bins(np.minimum(low, self.absolute), np.minimum(high, self.absolute), counts[held])

    def linear_magnitudes(self) -> tuple[NDArray[np.int64], float]:
        """Counts of absolute values in bins of equal width from zero to the largest, and that width.

        Between 1,025 and 2,048 bins: their width is that of a bin in the highest octave, into which the narrower ones
        of the lower octaves fit exactly.
        """
        top = int(np.float32(self.absolute).view(np.uint32)) >> 23
        width = float(np.ldexp(1.0, max(top, 1) - 127 - MANTISSA_BITS))
        some = self.magnitudes()
        places = (some.low / width).astype(np.int64)
        length = int(self.absolute / width) + 1
        counts: NDArray[np.int64] = np.bincount(places, some.counts, minlength=length).astype(np.int64)
        return counts, width

    def _sides(self, mantissa_bits: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Edges of all bins of positive numbers, and counts of each sign without the small numbers."""
        merged = 1 << (MANTISSA_BITS - mantissa_bits)
        keys = np.arange(0, _SPAN + 1, merged, dtype=np.uint32) + np.uint32(self._base << MANTISSA_BITS)
        # The window may end above float32's largest number; the bin behind it is empty.
        keys = np.minimum(keys, np.uint32(0xFF << MANTISSA_BITS))
        edges = (keys << np.uint32(_DROPPED)).view(np.float32).astype(np.float64)
        counts = self._bins[:, 1:].reshape(len(self._bins), -1, merged).sum(axis=2)
        return edges, counts

    def _widen(self, low: float, high: float) -> None:
        """Make room for numbers between these."""
        if low < 0 and len(self._bins) == 1:
            self._bins = np.concatenate([self._bins, np.zeros_like(self._bins)])
        self.low, self.high = min(self.low, low), max(self.high, high)
        top = int(np.float32(self.absolute).view(np.uint32)) >> 23
        base = max(top - _OCTAVES + 1, 1)
        shift = min((base - self._base) << MANTISSA_BITS, _SPAN)
        if shift <= 0:
            return
        self._base = base
        self._bins[:, 0] += self._bins[:, 1 : 1 + shift].sum(axis=1)
        self._bins[:, 1 : 1 + _SPAN - shift] = self._bins[:, 1 + shift :].copy()
        self._bins[:, 1 + _SPAN - shift :] = 0
