"""Weights for CPUs without VNNI: sums of two products fit into 16 bits, with more steps than 63."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgeq.converters.onnx.quantize.affine import quantize_weight
from edgeq.converters.onnx.quantize.narrow import quantize_narrow


def _widest_sums(integers: NDArray[np.int8]) -> tuple[int, int]:
    """The extremes of sums of two neighbouring products with bytes of 0 to 255, as vpmaddubsw makes them."""
    padded = np.concatenate([integers, np.zeros((-len(integers) % 2, integers.shape[1]), np.int8)]).astype(int)
    pairs = padded.reshape(-1, 2, integers.shape[1]) * 255
    return int(np.maximum(pairs, 0).sum(axis=1).max()), int(np.minimum(pairs, 0).sum(axis=1).min())


def _weight(seed: int, inputs: int, channels: int) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    return (rng.standard_t(4, (inputs, channels)) * rng.lognormal(size=channels)).astype(np.float32)


@given(st.integers(0, 2**32 - 1), st.integers(1, 70), st.integers(1, 9))
def test_no_pair_of_products_overflows(seed: int, inputs: int, channels: int) -> None:
    integers, scales = quantize_narrow(_weight(seed, inputs, channels), 1)
    high, low = _widest_sums(integers)
    assert high <= 32767
    assert low >= -32768
    assert (scales > 0).all()


def test_rounding_errs_much_less_than_with_seven_bits() -> None:
    weight = _weight(0, 384, 64)

    def error(found: tuple[NDArray[np.int8], NDArray[np.float32]]) -> float:
        per_channel = np.square(found[0] * found[1] - weight).mean(axis=0) / np.square(weight).mean(axis=0)
        return float(per_channel.mean())

    plain = quantize_weight(weight, 1)
    assert _widest_sums(plain[0])[0] > 32767  # what the steps are limited for
    assert error(quantize_narrow(weight, 1)) < 0.7 * error(quantize_weight(weight, 1, steps=63))


def test_either_axis_gives_the_same_and_zeros_have_a_scale() -> None:
    weight = _weight(1, 30, 5)
    weight[:, 2] = 0
    one, other = quantize_narrow(weight, 1), quantize_narrow(np.ascontiguousarray(weight.T), 0)
    np.testing.assert_array_equal(one[0], other[0].T)
    np.testing.assert_array_equal(one[1], other[1])
    assert one[1][2] == 1
    assert not one[0][:, 2].any()


def test_scales_reach_what_a_bias_needs() -> None:
    weight = _weight(2, 64, 6)
    least = np.array([0, 0.5, 0, 3.0, 0, 0])
    integers, scales = quantize_narrow(weight, 1, least=least)
    assert (scales >= least.astype(np.float32)).all()
    assert np.abs(integers * scales - weight).max(axis=0) == pytest.approx(scales / 2, rel=0.2)
    assert _widest_sums(integers)[0] <= 32767
