"""Channels that training let die keep their weights as well as float16 itself would."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeq.converters.onnx.quantize.half_scales import refitted

_SCALES = st.lists(st.floats(2.0**-46, 2.0**-10, width=32), min_size=1, max_size=8)


@given(st.integers(0, 2**31), _SCALES, st.integers(0, 1))
def test_refitted_weights_are_as_near_as_int8_or_float16(seed: int, sizes: list[float], axis: int) -> None:
    scales = np.array(sizes, np.float32)
    shape = (len(sizes), 16) if axis == 0 else (16, len(sizes))
    integers = np.random.default_rng(seed).integers(-127, 128, shape).astype(np.int8)
    found, steps = refitted(integers, scales, axis)
    small = scales < 2.0**-16
    assert np.array_equal(steps[small].astype(np.float16).astype(np.float32), steps[small])
    assert np.array_equal(steps[~small], scales[~small])
    assert (steps >= scales).all()
    wide = [-1, 1] if axis == 0 else [1, -1]
    before = integers.astype(np.float64) * scales.reshape(wide)
    after = found.astype(np.float64) * steps.reshape(wide)
    # Half a step: of INT8 as it was, or of float16's finest grid.
    assert (np.abs(after - before) <= steps.reshape(wide) * 0.5000001).all()
    assert (steps <= scales + 2.0**-24).all()


def test_channels_of_zeros_stay() -> None:
    integers, scales = np.zeros((2, 4), np.int8), np.array([0.0, 1.0], np.float32)
    found, steps = refitted(integers, scales, 0)
    assert not found.any()
    assert steps.tolist() == pytest.approx([0.0, 1.0])
