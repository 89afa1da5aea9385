"""Percentiles with one-sided confidence bounds that assume nothing about the distribution.

The bounds are order statistics. Of n independent samples, the number K that lie at or below the true q-th percentile is
binomial with n trials and probability q/100, so the r-th smallest sample is

* an upper bound of the percentile with probability P(K <= r - 1) = sum_{k<r} C(n, k) p^k (1 - p)^(n - k), and
* a lower bound of it with probability P(K >= r),

both exact for a continuous distribution and conservative where samples can tie. Source: H. A. David and
H. N. Nagaraja, *Order Statistics*, 3rd ed., Wiley 2003, section 7.1; W. J. Conover, *Practical Nonparametric
Statistics*, 3rd ed., Wiley 1999, section 3.2. Samples of one machine are rarely independent of each other, so a bound
speaks for conditions like those of the run, and only for a number of samples that was fixed before looking at them.

``q`` is in percent (99 for the 99th percentile, as in `numpy.percentile`), ``confidence`` a fraction (0.95).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

__all__ = [
    "clustered_mean",
    "lower_bound",
    "missing_samples",
    "percentile",
    "required_samples",
    "student_t",
    "upper_bound",
]

# A tail probability that equals its limit in exact arithmetic must not miss it by rounding.
_ROUNDING = 1e-12
_SMALLEST_LOG = -700.0
# Degrees of freedom from which Student's t is the normal distribution to four digits.
_MANY = 10_000


def percentile(samples: Sequence[float], q: float) -> float:
    """The smallest sample that at least q % of all samples do not exceed (nearest rank; type 1 of Hyndman and Fan).

    Always one of the samples, so it lies between `lower_bound` and `upper_bound` where these exist.

    Raises:
        ValueError: no samples, a sample that is NaN, or ``q`` outside (0, 100).
    """
    _check(q, 0.5)
    ordered = _ordered(samples)
    if not ordered:
        raise ValueError("no samples")
    # The rounding keeps 0.07 * 100 = 7.000000000000001 from becoming rank 8.
    rank = math.ceil(round(q / 100 * len(ordered), 9))
    return ordered[max(rank, 1) - 1]


def upper_bound(samples: Sequence[float], q: float, confidence: float) -> float | None:
    """The smallest sample that exceeds the true percentile with the given confidence; None if the samples are too few.

    Raises:
        ValueError: NaN, ``q`` outside (0, 100), or ``confidence`` outside [0.5, 1).
    """
    _check(q, confidence)
    ordered = _ordered(samples)
    above = _allowed_misses(len(ordered), 1 - q / 100, confidence)
    return None if above is None else ordered[len(ordered) - 1 - above]


def lower_bound(samples: Sequence[float], q: float, confidence: float) -> float | None:
    """The largest sample that the true percentile exceeds with the given confidence; None if the samples are too few.

    Raises:
        ValueError: as `upper_bound`.
    """
    _check(q, confidence)
    ordered = _ordered(samples)
    below = _allowed_misses(len(ordered), q / 100, confidence)
    return None if below is None else ordered[below]


def required_samples(q: float, confidence: float, misses: int = 0) -> int:
    """The fewest samples whose upper bound of the q-th percentile meets a limit that ``misses`` of them exceed.

    459 for the 99th percentile at 99 % without a miss, 4603 for the 99.9th. For a lower limit the same number counts
    at ``100 - q``.

    Raises:
        ValueError: ``q`` or ``confidence`` out of range, or ``misses`` negative.
    """
    _check(q, confidence)
    if misses < 0:
        raise ValueError(f"misses must not be negative, not {misses}")
    p_miss = 1 - q / 100
    too_few, enough = misses, misses + 1
    while not _decided(enough, misses, p_miss, confidence):
        too_few, enough = enough, enough * 2
    return _turning_point(enough, too_few, lambda n: _decided(n, misses, p_miss, confidence))


def missing_samples(n_samples: int, misses: int, q: float, confidence: float) -> int:
    """How many further samples without a miss an upper limit needs, given those that were seen; 0 if none."""
    return max(0, required_samples(q, confidence, misses) - n_samples)


def clustered_mean(sums: Sequence[float], counts: Sequence[int], confidence: float) -> tuple[float, float, float]:
    """The mean of values that come in clusters, with a two-sided confidence interval for it.

    Values of one cluster depend on each other, those of different clusters do not, so the clusters are the sample:
    with S_c the sum and N_c the number of the values of cluster c, the mean is m = sum S_c / sum N_c and its variance
    C / (C - 1) * sum (S_c - m N_c)^2 / (sum N_c)^2, with Student's t of C - 1 degrees of freedom. Source: W. G.
    Cochran, *Sampling Techniques*, 3rd ed., Wiley 1977, sections 6.3 and 9A.

    Args:
        sums: of the values of each cluster.
        counts: of the values of each cluster, positive.
        confidence: of the interval, as in 0.95.

    Returns:
        Mean, lower end, upper end; the ends are infinite for a single cluster, which says nothing of others.

    Raises:
        ValueError: no clusters, or not as many sums as counts.
    """
    if not sums or len(sums) != len(counts) or min(counts) < 1:
        raise ValueError("clusters need a sum and a positive count each")
    n_clusters, total = len(sums), sum(counts)
    mean = math.fsum(sums) / total
    if n_clusters == 1:
        return mean, -math.inf, math.inf
    spread = math.fsum((s - mean * n) ** 2 for s, n in zip(sums, counts, strict=True))
    error = math.sqrt(n_clusters / (n_clusters - 1) * spread) / total
    half = error * student_t((1 + confidence) / 2, n_clusters - 1)
    return mean, mean - half, mean + half


def student_t(probability: float, degrees: int) -> float:
    """The quantile of Student's t distribution, by bisection of its distribution function.

    Args:
        probability: at least 0.5 and below 1.
        degrees: of freedom, at least 1.
    """
    if not 0.5 <= probability < 1 or degrees < 1:
        raise ValueError(f"no quantile of Student's t for {probability} and {degrees} degrees of freedom")
    if degrees >= _MANY:
        return statistics.NormalDist().inv_cdf(probability)
    central = 2 * probability - 1
    low, high = 0.0, 1.0
    while _student_central(high, degrees) < central:
        low, high = high, high * 2
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if _student_central(middle, degrees) < central else (low, middle)
    return high


def _student_central(t: float, degrees: int) -> float:
    """P(|T| <= t). Source: Abramowitz and Stegun, *Handbook of Mathematical Functions*, 26.7.3 and 26.7.4."""
    theta = math.atan(t / math.sqrt(degrees))
    cosine = math.cos(theta)
    odd = degrees % 2
    term = cosine if odd else 1.0
    total = 0.0
    for k in range(1 + odd, degrees, 2):
        total += term
        term *= cosine**2 * k / (k + 1)
    total *= math.sin(theta)
    return (theta + total) * 2 / math.pi if odd else total


def _decided(n: int, misses: int, p_miss: float, confidence: float) -> bool:
    """Whether P(no more than ``misses`` of n samples miss | each does with probability p_miss) is small enough."""
    return _tail(n, misses, p_miss) <= (1 - confidence) * (1 + _ROUNDING)


def _tail(n: int, k: int, p: float) -> float:
    """P(Binomial(n, p) <= k), summed in logarithms so that it neither under- nor overflows on the way."""
    odds = math.log(p) - math.log1p(-p)
    log_term = n * math.log1p(-p)
    total = 0.0
    for i in range(min(k, n) + 1):
        if log_term > _SMALLEST_LOG:
            total += math.exp(log_term)
        if i < n:
            log_term += math.log((n - i) / (i + 1)) + odds
    return min(total, 1.0)


def _allowed_misses(n: int, p_miss: float, confidence: float) -> int | None:
    """The largest m with P(Binomial(n, p_miss) <= m) <= 1 - confidence; None if even m = 0 is too likely."""
    if n == 0 or not _decided(n, 0, p_miss, confidence):
        return None
    # P(K <= n * p) is at least a half, so m lies below the mean.
    allowed, refused = 0, math.ceil(n * p_miss) + 1
    return _turning_point(allowed, refused, lambda misses: _decided(n, misses, p_miss, confidence))


def _turning_point(yes: int, no: int, holds: Callable[[int], bool]) -> int:
    """The last number on the way from ``yes``, for which it holds, to ``no``, for which it does not."""
    while abs(no - yes) > 1:
        middle = (yes + no) // 2
        if holds(middle):
            yes = middle
        else:
            no = middle
    return yes


def _ordered(samples: Sequence[float]) -> list[float]:
    ordered = sorted(float(value) for value in samples)
    if any(math.isnan(value) for value in ordered):
        raise ValueError("a sample is NaN")
    return ordered


def _check(q: float, confidence: float) -> None:
    if not 0 < q < 100:
        raise ValueError(f"q must be a percentage between 0 and 100, not {q}")
    if not 0.5 <= confidence < 1:
        raise ValueError(f"confidence must be at least 0.5 and below 1, not {confidence}")
