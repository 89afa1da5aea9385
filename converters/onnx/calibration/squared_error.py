"""The mean squared error of rounding numbers to a uniform grid and clipping them to its ends, from a histogram.

Numbers are taken to be spread evenly over their bins. What clipping costs then follows from three sums over the bins
outside, and what rounding costs is an integral in closed form, so a candidate takes microseconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.onnx.calibration.histogram import LogHistogram
from edgeq.converters.onnx.calibration.ranges import Range

__all__ = ["SquaredError", "mse_range"]

_COARSE_BITS = 7  # of the mantissa; the integral is exact for bins of any width
_FINEST_CLIP = 12  # octaves below the largest magnitude at which the search ends
_PER_OCTAVE = 4  # places that it tries in each
_REFINEMENTS = (6, 36)  # then so many parts of the way to the next place
_MOST_TURNS = 6
_POINT = 1e-7  # width, relative to the largest magnitude, of bins whose numbers are all the same


class SquaredError:
    """The error by the range that numbers are quantized in.

    Args:
        histogram: of the numbers; not empty.
        symmetric: whether the grid is symmetric around zero; then the lowest integer is not used.
        levels: of the integers.
    """

    def __init__(self, histogram: LogHistogram, *, symmetric: bool, levels: int = 256) -> None:
        bins = histogram.bins(_COARSE_BITS)
        self._symmetric, self._levels = symmetric, levels
        self._middle = (bins.low + bins.high) / 2
        width = np.maximum(bins.high - bins.low, _POINT * histogram.absolute)
        self._edges = np.stack([self._middle - width / 2, self._middle + width / 2])
        shares = bins.counts / bins.counts.sum()
        self._density = shares / width
        moments = shares, shares * self._middle, shares * (self._middle**2 + width**2 / 12)
        # Sums over all bins below each place.
        self._moments = np.concatenate([np.zeros((3, 1)), np.cumsum(moments, axis=1)], axis=1)

    def grid(self, candidate: Range) -> tuple[float, float, float]:
        """Step, lowest and highest number of the grid.

        Args:
            candidate: holds zero. Its zero point is rounded, as quantizers do, which moves both ends a little.
        """
        if self._symmetric:
            most = self._levels // 2 - 1
            scale = candidate.absolute / most
            return scale, -most * scale, most * scale
        scale = (candidate.high - candidate.low) / (self._levels - 1)
        zero = round(-candidate.low / scale)
        return scale, -zero * scale, (self._levels - 1 - zero) * scale

    def clipping(self, candidate: Range) -> float:
        """What clipping alone costs; a narrower range costs more."""
        _, low, high = self.grid(candidate)
        first, end = np.searchsorted(self._middle, [low, high])
        below, above = self._moments[:, first], self._moments[:, -1] - self._moments[:, end]
        return max(_around(below, low), 0.0) + max(_around(above, high), 0.0)

    def total(self, candidate: Range) -> float:
        """What rounding and clipping cost."""
        scale, low, high = self.grid(candidate)
        first, end = np.searchsorted(self._middle, [low, high])
        inside = np.diff(_rounding_integral(self._edges[:, first:end] / scale), axis=0)[0]
        return float(inside @ self._density[first:end]) * scale**3 + self.clipping(candidate)


def _around(moments: NDArray[np.float64], point: float) -> float:
    """The mean square of the distance to a point, from the moments of order 0, 1 and 2."""
    return float(moments[2] - 2 * point * moments[1] + point**2 * moments[0])


def _rounding_integral(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """The integral of ``(t - round(t))**2`` from 0 to x: a twelfth for each whole step, and a cube for what is left."""
    whole = np.round(x)
    rest = x - whole
    integral: NDArray[np.float64] = whole / 12 + rest * rest * rest / 3
    return integral


def mse_range(histogram: LogHistogram, *, symmetric: bool, levels: int = 256) -> Range:
    """The range whose quantized numbers have the least mean squared error.

    Args:
        histogram: not empty.
        symmetric: around zero, with one level less; otherwise the range holds zero and each side is clipped by itself.
        levels: of the integers.
    """
    whole = Range(histogram.low, histogram.high).with_zero()
    if whole.is_constant:
        return whole
    error = SquaredError(histogram, symmetric=symmetric, levels=levels)

    def both(limit: float) -> Range:
        return Range(-limit, limit) if symmetric else Range(max(whole.low, -limit), min(whole.high, limit))

    best = _least(whole.absolute, both, error)
    if symmetric:
        return best
    # Then one end at a time, as long as it helps.
    for turn in range(_MOST_TURNS):
        better = _one_end(best, whole, error, upper=turn % 2 == 0)
        if error.total(better) < error.total(best):
            best = better
        elif turn:
            break
    return best


def _one_end(now: Range, whole: Range, error: SquaredError, *, upper: bool) -> Range:
    """The range with one of its ends where the error is least."""
    if upper:
        return _least(whole.high, lambda end: Range(now.low, end), error) if whole.high > 0 else now
    return _least(-whole.low, lambda end: Range(-end, now.high), error) if whole.low < 0 else now


def _least(largest: float, candidate: Callable[[float], Range], error: SquaredError) -> Range:
    """The candidate with the least error, by a limit between the largest magnitude and a small part of it."""
    limit, least = largest, math.inf
    for step in range(_FINEST_CLIP * _PER_OCTAVE):
        place = largest * 2.0 ** (-step / _PER_OCTAVE)
        if error.clipping(candidate(place)) >= least:
            break  # and narrower ones clip more
        found = error.total(candidate(place))
        if found < least:
            limit, least = place, found
    for parts in _REFINEMENTS:
        places = [limit * 2.0 ** (n / (parts * _PER_OCTAVE)) for n in range(-6, 7)]
        limit = min((place for place in places if place <= largest), key=lambda p: error.total(candidate(p)))
    return candidate(limit)
