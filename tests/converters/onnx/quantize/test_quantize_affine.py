"""Grids against ONNX Runtime's own QuantizeLinear."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from edgeq.converters.onnx.calibration.ranges import Range
from edgeq.converters.onnx.quantize.affine import (
    affine_of,
    fake_quantize,
    least_scales,
    quantize,
    quantize_bias,
    quantize_weight,
)
from edgeq.errors import ConversionError

ort = pytest.importorskip("onnxruntime")


def _session(kind: int) -> Any:
    graph = helper.make_graph(
        [helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["y"])],
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [None]),
            helper.make_tensor_value_info("scale", TensorProto.FLOAT, []),
            helper.make_tensor_value_info("zero", kind, []),
        ],
        [helper.make_tensor_value_info("y", kind, [None])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.checker.check_model(model)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


_SESSIONS: dict[str, Any] = {}


@settings(max_examples=60, deadline=None)
@given(
    st.floats(-1e4, 1e4, width=32),
    st.floats(0, 1e4, width=32),
    st.sampled_from(["uint8", "int8"]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_quantization_is_that_of_onnx_runtime(low: float, span: float, dtype: Any, symmetric: bool, seed: int) -> None:
    if symmetric and dtype == "uint8":
        return
    affine = affine_of("x", Range(low, low + span), dtype, symmetric=symmetric)
    x = np.random.default_rng(seed).uniform(low - span, low + 2 * span, 64).astype(np.float32)
    kind = TensorProto.UINT8 if dtype == "uint8" else TensorProto.INT8
    if dtype not in _SESSIONS:
        _SESSIONS[dtype] = _session(kind)
    session = _SESSIONS[dtype]
    expected = session.run(
        None, {"x": x, "scale": np.array(affine.scale, np.float32), "zero": np.array(affine.zero_point, dtype)}
    )[0]
    np.testing.assert_array_equal(quantize(x, affine), expected)


@given(st.floats(-1e6, 1e6), st.floats(0, 1e6))
def test_zero_is_exact_and_the_range_fits(low: float, span: float) -> None:
    affine = affine_of("x", Range(low, low + span), "uint8", symmetric=False)
    edges = np.array([0.0, low, low + span], np.float32)
    found = fake_quantize(edges, affine)
    assert found[0] == 0.0
    assert np.abs(found - edges).max() <= affine.scale * 1.001 + 1e-6 * max(abs(low), abs(low + span))


def test_a_symmetric_grid_has_no_zero_point_and_a_tensor_of_zeros_has_a_scale() -> None:
    assert affine_of("x", Range(-1.0, 4.0), "int8", symmetric=True).zero_point == 0
    assert affine_of("x", Range(0.0, 0.0), "uint8", symmetric=False).scale == 1.0


def test_ranges_that_make_no_grid_are_refused() -> None:
    class Odd:
        low, high = float("nan"), 1.0

    with pytest.raises(ConversionError, match="range of 'x'"):
        affine_of("x", Odd(), "uint8", symmetric=False)
    with pytest.raises(ConversionError, match="signed"):
        affine_of("x", Range(0, 1), "uint8", symmetric=True)


@given(st.integers(0, 2**31), st.sampled_from([63, 127]), st.integers(0, 2))
def test_weights_are_at_most_half_a_step_off(seed: int, steps: int, axis: int) -> None:
    rng = np.random.default_rng(seed)
    weight = (rng.standard_normal((3, 4, 5)) * rng.uniform(1e-6, 1e3)).astype(np.float32)
    integers, scales = quantize_weight(weight, axis, steps=steps)
    assert scales.shape == (weight.shape[axis],)
    assert np.abs(integers).max() == steps
    shape = [1, 1, 1]
    shape[axis] = -1
    wide = scales.reshape(shape)
    assert (np.abs(integers * wide - weight) <= wide * 0.501).all()


def test_a_large_bias_widens_the_steps_of_its_channel_instead_of_overflowing() -> None:
    weight = np.array([[1e-9, 1e-9], [1.0, 0.5]], np.float32)
    bias = np.array([100.0, 1.0], np.float32)
    _, narrow = quantize_weight(weight, 0)
    assert abs(bias[0]) / (1e-3 * narrow[0]) > 2**31  # it would overflow
    integers, scales = quantize_weight(weight, 0, least=least_scales(bias, 1e-3))
    steps, bias_scales = quantize_bias(bias, 1e-3, scales)
    np.testing.assert_allclose(steps * bias_scales, bias, rtol=1e-6)
    assert scales[1] == np.float32(1 / 127)
    assert integers[1, 0] == 127
