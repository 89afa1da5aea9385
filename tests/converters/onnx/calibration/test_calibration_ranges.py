"""Ranges: what they refuse, and what a quantizer may rely on."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeq.converters.onnx.calibration.ranges import ChannelRanges, Range

floats = st.floats(-(2.0**127), 2.0**127, width=32)


@pytest.mark.parametrize(("low", "high"), [(1.0, 0.0), (math.nan, 1.0), (0.0, math.inf), (-math.inf, 0.0)])
def test_what_is_no_range_is_refused(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="no range"):
        Range(low, high)


@given(floats, floats, st.booleans())
def test_a_quantizer_gets_zero_and_a_scale(a: float, b: float, symmetric: bool) -> None:
    found = Range(min(a, b), max(a, b)).quantizable(symmetric=symmetric)
    assert found.low <= 0 <= found.high
    assert np.float32((found.high - found.low) / 255) > 0
    assert found.low <= min(a, b) or found.high - found.low == 1 + symmetric
    assert found.high >= max(a, b)
    assert not symmetric or found.low == -found.high


@given(floats, floats, floats, floats)
def test_a_union_holds_both(a: float, b: float, c: float, d: float) -> None:
    some, other = Range(min(a, b), max(a, b)), Range(min(c, d), max(c, d))
    both = some.union(other)
    assert both == other.union(some)
    assert (both.low, both.high) == (min(a, b, c, d), max(a, b, c, d))


def test_zeros_alone_stay_exact() -> None:
    assert Range(0.0, 0.0).is_constant
    assert Range(0.0, 0.0).quantizable() == Range(0.0, 1.0)
    assert Range(0.0, 0.0).quantizable(symmetric=True) == Range(-1.0, 1.0)
    assert Range(3.0, 3.0).quantizable() == Range(0.0, 3.0)
    assert Range(-3.0, 2.0).absolute == 3.0


def test_channels_have_magnitudes_and_a_whole() -> None:
    channels = ChannelRanges(np.array([-3, 0.5], np.float32), np.array([1, 2], np.float32))
    assert channels.absolute.tolist() == [3.0, 2.0]
    assert channels.whole == Range(-3.0, 2.0)
