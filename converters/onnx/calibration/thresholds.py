"""Where to clip, from a histogram: percentiles, and least divergence."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.onnx.calibration.histogram import Bins, LogHistogram
from edgeq.converters.onnx.calibration.ranges import Range

__all__ = ["entropy_range", "kept_bins", "percentile_range"]

_LEAST_FILLED = 2  # bins
_MOST_CLIPPED = 0.5  # of the numbers


def percentile_range(histogram: LogHistogram, percentile: float, *, symmetric: bool) -> Range:
    """The range of the middle ``percentile`` percent of all numbers; of their magnitudes if it shall be symmetric.

    Percentiles are as numpy computes them, linear between neighbours; they are off by a thousandth of their value at
    most, the width of a bin.

    Args:
        histogram: not empty.
        percentile: above 0; 100 gives the whole range.
        symmetric: around zero.
    """
    share = percentile / 100
    if symmetric:
        magnitudes = histogram.magnitudes()
        limit = _quantile(magnitudes, share, float(magnitudes.low[0]), histogram.absolute)
        return Range(-limit, limit)
    bins = histogram.bins()
    tail = (1 - share) / 2
    low, high = (_quantile(bins, q, histogram.low, histogram.high) for q in (tail, 1 - tail))
    return Range(min(low, high), high)


def _quantile(bins: Bins, share: float, low: float, high: float) -> float:
    """The quantile of the numbers; those of a bin are taken to be spread evenly over it."""
    upto = np.cumsum(bins.counts)
    last = int(upto[-1]) - 1
    rank = share * last
    below, above = math.floor(rank), math.ceil(rank)

    def number(place: int) -> float:
        if place in (0, last):
            return high if place else low
        at = int(np.searchsorted(upto, place, side="right"))
        inside = (place - int(upto[at]) + int(bins.counts[at]) + 0.5) / int(bins.counts[at])
        return min(max(float(bins.low[at] + (bins.high[at] - bins.low[at]) * inside), low), high)

    if not last:
        return high
    return number(below) + (number(above) - number(below)) * (rank - below)


def entropy_range(histogram: LogHistogram, *, symmetric: bool, levels: int = 256) -> Range:
    """The range whose quantized numbers are distributed most like the numbers themselves: least KL divergence.

    TensorRT's entropy calibration (S. Migacz, "8-bit Inference with TensorRT", GTC 2017): of about 2,048 bins of
    magnitudes the first ones are kept and the rest is added to the last of them; what is kept is merged into as many
    bins as there are levels, and spread out again over those that were not empty. The bin at zero, which ReLU fills
    with what is exact at any scale, counts as much as its neighbour.

    Args:
        histogram: not empty.
        symmetric: around zero; otherwise each side ends where its numbers end.
        levels: of the integers, both signs together.
    """
    counts, width = histogram.linear_magnitudes()
    if len(counts) > 1:
        counts[0] = counts[1]
    # Numbers of one sign have all levels of an asymmetric range, numbers of both share them.
    wide = Range(histogram.low, histogram.high).with_zero()
    used = levels // 2
    if not symmetric and wide.high > wide.low:
        used = round(levels * wide.absolute / (wide.high - wide.low))
    limit = min(kept_bins(counts, used) * width, histogram.absolute)
    if symmetric:
        return Range(-limit, limit)
    return Range(*(min(max(end, -limit), limit) for end in (histogram.low, histogram.high)))


def kept_bins(counts: NDArray[np.int64], levels: int) -> int:
    """How many bins to keep for the least divergence; of equals the most.

    Never so few that most numbers are clipped, or that one bin holds all that is kept: both distributions are a point
    then, and their divergence is 0 however much is clipped.

    Args:
        counts: of magnitudes, int64 of (bins,).
        levels: that they are quantized to.
    """
    if len(counts) <= levels:
        return len(counts)
    kept = np.arange(levels, len(counts) + 1)
    upto = np.concatenate([[0], np.cumsum(counts)]).astype(np.float64)
    filled = np.concatenate([[0], np.cumsum(counts > 0)])
    clipped, last = upto[-1] - upto[kept], counts[kept - 1].astype(np.float64)
    # P is what is kept, with all that is clipped in its last bin: the sum of p log p.
    own = np.concatenate([[0], np.cumsum(_x_log_x(counts.astype(np.float64)))])[kept - 1] + _x_log_x(last + clipped)
    # Q is even over the filled bins of each level, so the sum of p log q needs one term a level.
    bounds = -(-np.arange(levels + 1) * kept[:, None] // levels)
    inside = np.diff(upto[bounds], axis=1)
    spread = np.diff(filled[bounds], axis=1)
    spread[:, -1] += (last == 0) & (clipped > 0)
    p = inside.copy()
    p[:, -1] += clipped
    with np.errstate(divide="ignore", invalid="ignore"):
        cross = np.where(p > 0, p * np.log(inside / spread), 0.0).sum(axis=1)
        divergence = (own - cross) / upto[-1] - np.log(upto[-1]) + np.log(upto[kept])
    divergence[np.isnan(divergence) | (filled[kept] < _LEAST_FILLED) | (clipped > _MOST_CLIPPED * upto[-1])] = np.inf
    best = len(divergence) - 1 - int(np.argmin(divergence[::-1]))
    return int(kept[best])


def _x_log_x(values: NDArray[np.float64]) -> NDArray[np.float64]:
    product: NDArray[np.float64] = values * np.log(np.maximum(values, 1.0))  # counts: 0 or at least 1
    return product
