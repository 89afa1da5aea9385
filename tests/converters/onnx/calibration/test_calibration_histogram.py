"""The histogram: counts are exact, and neither order nor pieces of the data matter."""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from edgeq.converters.onnx.calibration.histogram import LogHistogram, NotFiniteError

Floats = NDArray[np.float32]

data = arrays.arrays(np.float32, st.integers(1, 60), elements=st.floats(-(2.0**127), 2.0**127, width=32))


def filled(*parts: NDArray[np.floating[Any]]) -> LogHistogram:
    histogram = LogHistogram()
    for part in parts:
        histogram.update(part)
    return histogram


def same(some: LogHistogram, other: LogHistogram) -> bool:
    a, b = some.bins(), other.bins()
    return (some.low, some.high) == (other.low, other.high) and all(
        np.array_equal(x, y) for x, y in ((a.low, b.low), (a.high, b.high), (a.counts, b.counts))
    )


@given(st.lists(data, min_size=1, max_size=4), st.randoms())
def test_order_and_pieces_do_not_matter(parts: list[Floats], random: Random) -> None:
    whole = filled(np.concatenate(parts))
    shuffled = list(parts)
    random.shuffle(shuffled)
    assert same(whole, filled(*shuffled))
    merged = LogHistogram()
    for part in shuffled:
        merged.merge(filled(part))
    assert same(whole, merged)
    restored = LogHistogram.restore(filled(*parts[:1]).state())
    for part in parts[1:]:
        restored.update(part)
    assert same(whole, restored)


@given(data)
def test_every_number_is_in_the_bin_that_holds_it(values: Floats) -> None:
    histogram = filled(values)
    bins = histogram.bins()
    assert histogram.total == values.size == bins.counts.sum()
    assert (histogram.low, histogram.high) == (values.min(), values.max())
    assert (bins.low <= bins.high).all()
    assert (np.diff(bins.low) >= 0).all()
    # What is larger than a millionth of the largest is resolved to a thousandth of itself, the rest counts as zero.
    large = np.sort(values[np.abs(values) > 2e-6 * np.abs(values).max()].astype(np.float64))
    for low, high, count in zip(bins.low, bins.high, bins.counts, strict=True):
        if low != 0 or high != 0:
            assert high - low <= max(abs(low), abs(high)) / 1000
            inside = ((large >= low) & (large <= high)).sum()
            assert inside >= count or abs(high) <= 2e-6 * np.abs(values).max()


@given(data)
def test_magnitudes_are_those_of_the_absolute_values(values: Floats) -> None:
    some, other = filled(values).magnitudes(), filled(np.abs(values)).bins()
    assert np.array_equal(some.counts, other.counts)
    large = some.high > 0  # what counts as zero ends at the smallest number, if that is above zero
    assert np.array_equal(some.high[large], other.high[large])


def test_linear_bins_are_those_that_numpy_counts() -> None:
    values = np.random.default_rng(0).laplace(size=20_000).astype(np.float32) * 3
    counts, width = filled(values).linear_magnitudes()
    assert 1025 <= len(counts) <= 2048
    # Numbers below a millionth of the largest count as zero, which is the same bin.
    expected, _ = np.histogram(np.abs(values), bins=np.arange(len(counts) + 1) * width)
    assert np.array_equal(counts, expected)
    assert np.abs(values).max() < len(counts) * width


def test_numbers_of_one_sign_take_half_the_memory() -> None:
    one, two = filled(np.ones(4, np.float32)), filled(-np.ones(4, np.float32))
    assert sum(a.nbytes for a in one.state().values()) < 0.51 * sum(a.nbytes for a in two.state().values())
    assert sum(a.nbytes for a in two.state().values()) < 400_000


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_nothing_is_counted_of_numbers_that_are_not_finite(wrong: float) -> None:
    histogram = filled(np.ones(3, np.float32))
    with pytest.raises(NotFiniteError):
        histogram.update(np.array([5.0, wrong], np.float32))
    assert (histogram.total, histogram.high) == (3, 1.0)


def test_empty_arrays_and_halves_are_taken() -> None:
    histogram = filled(np.zeros((0, 3), np.float32), np.array([[0.5, -2]], np.float16))
    assert (histogram.total, histogram.low, histogram.high) == (2, -2.0, 0.5)
    assert LogHistogram().bins().counts.size == 0
    assert LogHistogram().absolute == 0
