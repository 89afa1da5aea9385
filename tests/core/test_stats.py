"""edgeq.stats against exact rational arithmetic, its own laws, and simulated coverage."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeq import stats

SAMPLES = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=400)
PERCENT = st.integers(1, 999).map(lambda tenths: tenths / 10)
CONFIDENCE = st.sampled_from([0.5, 0.8, 0.9, 0.95, 0.99, 0.999])


def exact_tail(n: int, k: int, p: Fraction) -> Fraction:
    """P(Binomial(n, p) <= k), without rounding."""
    return sum((math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k + 1)), Fraction(0))


@pytest.mark.parametrize(
    ("q", "confidence", "misses", "expected"),
    [
        (99, 0.99, 0, 459),
        (99.9, 0.99, 0, 4603),
        (95, 0.95, 0, 59),
        (99, 0.95, 0, 299),
        (95, 0.95, 1, 93),
        (95, 0.95, 2, 124),
        (90, 0.95, 0, 29),
        (50, 0.95, 0, 5),
        (50, 0.5, 0, 1),
        (50, 0.75, 0, 2),
    ],
)
def test_required_samples_agrees_with_the_published_table(
    q: float, confidence: float, misses: int, expected: int
) -> None:
    assert stats.required_samples(q, confidence, misses) == expected


@given(q=st.integers(1, 99), percent=st.integers(50, 99), misses=st.integers(0, 6))
def test_required_samples_is_the_smallest_number_that_exact_sums_allow(q: int, percent: int, misses: int) -> None:
    n = stats.required_samples(q, percent / 100, misses)
    p_miss, alpha = 1 - Fraction(q, 100), 1 - Fraction(percent, 100)
    assert exact_tail(n, misses, p_miss) <= alpha
    assert n == misses + 1 or exact_tail(n - 1, misses, p_miss) > alpha


@given(n=st.integers(1, 300), q=st.integers(1, 99), percent=st.integers(50, 99))
def test_bounds_are_the_tightest_order_statistics_of_exact_sums(n: int, q: int, percent: int) -> None:
    ranks = [float(rank) for rank in range(1, n + 1)]
    p, alpha = Fraction(q, 100), 1 - Fraction(percent, 100)
    upper = stats.upper_bound(ranks, q, percent / 100)
    lower = stats.lower_bound(ranks, q, percent / 100)
    # P(K <= r - 1) >= 1 - alpha for the upper bound's rank r, and not for the rank before it.
    if upper is None:
        assert exact_tail(n, n - 1, p) < 1 - alpha
    else:
        assert exact_tail(n, int(upper) - 1, p) >= 1 - alpha
        assert upper == 1 or exact_tail(n, int(upper) - 2, p) < 1 - alpha
    # P(K >= r) >= 1 - alpha for the lower bound's rank, and not for the rank behind it.
    if lower is None:
        assert 1 - exact_tail(n, 0, p) < 1 - alpha
    else:
        assert 1 - exact_tail(n, int(lower) - 1, p) >= 1 - alpha
        assert lower == n or 1 - exact_tail(n, int(lower), p) < 1 - alpha


@given(samples=SAMPLES, q=PERCENT, confidence=CONFIDENCE)
def test_bounds_enclose_the_percentile(samples: list[float], q: float, confidence: float) -> None:
    middle = stats.percentile(samples, q)
    lower, upper = stats.lower_bound(samples, q, confidence), stats.upper_bound(samples, q, confidence)
    assert middle in samples
    assert lower is None or lower <= middle
    assert upper is None or middle <= upper


@given(samples=SAMPLES, q=PERCENT)
def test_percentile_is_numpys_inverted_cdf(samples: list[float], q: float) -> None:
    value = stats.percentile(samples, q)
    share_below = sum(sample <= value for sample in samples) / len(samples)
    assert share_below >= q / 100 - 1e-9
    if (q * len(samples) / 100) % 1 > 1e-6:  # numpy does not round q * n before it takes the rank
        assert value == np.percentile(samples, q, method="inverted_cdf")


@given(samples=SAMPLES, q=PERCENT, confidence=CONFIDENCE, limit=st.floats(-1e6, 1e6))
def test_a_limit_is_met_exactly_when_no_samples_are_missing(
    samples: list[float], q: float, confidence: float, limit: float
) -> None:
    misses = sum(sample > limit for sample in samples)
    bound = stats.upper_bound(samples, q, confidence)
    met = bound is not None and bound <= limit
    assert met == (stats.missing_samples(len(samples), misses, q, confidence) == 0)


@given(samples=SAMPLES, q=PERCENT, confidence=CONFIDENCE)
def test_lower_bound_mirrors_upper_bound(samples: list[float], q: float, confidence: float) -> None:
    mirrored = stats.upper_bound([-sample for sample in samples], 100 - q, confidence)
    lower = stats.lower_bound(samples, q, confidence)
    assert lower == (None if mirrored is None else -mirrored)


@given(q=PERCENT, confidence=CONFIDENCE, misses=st.integers(0, 5))
def test_more_misses_and_more_confidence_need_more_samples(q: float, confidence: float, misses: int) -> None:
    n = stats.required_samples(q, confidence, misses)
    assert stats.required_samples(q, confidence, misses + 1) > n
    assert stats.required_samples(q, 0.9999, misses) >= n


@pytest.mark.parametrize(("q", "n"), [(50, 11), (95, 93), (99, 628)])
def test_coverage_of_simulated_samples(q: float, n: int) -> None:
    """The true percentile of a skewed distribution lies beyond the bound in no more than 5 % of the runs."""
    rng = np.random.default_rng(20261122)
    runs = 1000
    truth = -math.log(1 - q / 100)
    above = below = 0
    for _ in range(runs):
        samples = rng.exponential(size=n).tolist()
        upper, lower = stats.upper_bound(samples, q, 0.95), stats.lower_bound(samples, q, 0.95)
        assert upper is not None
        assert lower is not None
        above += upper >= truth
        below += lower <= truth
    # Three standard deviations of the simulation; exact coverage is at least 0.95 and at most a rank above it.
    slack = 3 * math.sqrt(0.95 * 0.05 / runs)
    assert 0.95 - slack <= above / runs <= 0.99
    assert 0.95 - slack <= below / runs <= 0.995


def test_large_sample_sets_stay_exact() -> None:
    random.seed(3)
    samples = [random.random() for _ in range(60_000)]
    upper = stats.upper_bound(samples, 50, 0.95)
    assert upper is not None
    rank = sorted(samples).index(upper) + 1
    # The normal approximation is good to a rank or two at this size.
    assert abs(rank - (30_000 + 1.6449 * math.sqrt(60_000 * 0.25))) < 3


@pytest.mark.parametrize("bad", [0, 100, -1, 101, math.nan])
def test_q_must_be_a_percentage(bad: float) -> None:
    with pytest.raises(ValueError, match="q must be"):
        stats.percentile([1.0], bad)


@pytest.mark.parametrize("bad", [0.49, 1.0, 95, math.nan])
def test_confidence_must_be_a_fraction(bad: float) -> None:
    with pytest.raises(ValueError, match="confidence"):
        stats.upper_bound([1.0], 50, bad)


def test_bad_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        stats.percentile([1.0, math.nan], 50)
    with pytest.raises(ValueError, match="no samples"):
        stats.percentile([], 50)
    with pytest.raises(ValueError, match="misses"):
        stats.required_samples(50, 0.95, -1)
    assert stats.upper_bound([], 50, 0.95) is None
    assert stats.lower_bound([], 50, 0.95) is None


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 30, 101, 2000, 20_000])
@pytest.mark.parametrize("probability", [0.5, 0.9, 0.975, 0.9995])
def test_student_t_is_scipys(probability: float, degrees: int) -> None:
    oracle = pytest.importorskip("scipy.stats").t.ppf(probability, degrees)
    assert stats.student_t(probability, degrees) == pytest.approx(
        oracle, rel=5e-4 if degrees > 10_000 else 1e-9, abs=1e-12
    )


def test_student_t_refuses_what_has_no_quantile() -> None:
    for probability, degrees in ((0.4, 3), (1.0, 3), (0.9, 0)):
        with pytest.raises(ValueError, match="no quantile"):
            stats.student_t(probability, degrees)


def test_equal_clusters_are_a_sample_of_their_means() -> None:
    scipy_stats = pytest.importorskip("scipy.stats")
    means = [0.3, 0.5, 0.1, 0.9, 0.4]
    mean, low, high = stats.clustered_mean([m * 20 for m in means], [20] * 5, 0.9)
    error = scipy_stats.sem(means)
    assert (low, high) == pytest.approx(scipy_stats.t.interval(0.9, 4, loc=mean, scale=error))
    assert mean == pytest.approx(sum(means) / 5)


def test_clusters_weigh_what_they_hold() -> None:
    mean, low, high = stats.clustered_mean([100.0, 0.0], [100, 300], 0.95)
    assert mean == 0.25
    assert low < mean < high
    assert stats.clustered_mean([3.0], [6], 0.95) == (0.5, -math.inf, math.inf)
    for sums, counts in (([], []), ([1.0], [0]), ([1.0], [1, 2])):
        with pytest.raises(ValueError, match="clusters need"):
            stats.clustered_mean(sums, counts, 0.95)
