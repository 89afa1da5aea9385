"""Biases take back what rounding weights shifts outputs by on average."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgeq.converters.onnx.calibration.ranges import Range
from edgeq.converters.onnx.quantize.bias_correction import channel_means, shift_of
from edgeq.converters.onnx.quantize.static import quantize_static
from edgeq.errors import ConversionError

pytest.importorskip("onnxruntime")


@pytest.fixture
def depthwise(tmp_path: Path) -> Path:
    """A convolution of six channels in two groups; one weight in each output channel is large, the rest are small."""
    rng = np.random.default_rng(3)
    weight = rng.uniform(0.001, 0.003, (6, 3, 3, 3)).astype(np.float32)
    weight[:, 0, 1, 1] = 1.0
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w", "b"], ["y"], name="conv", group=2)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 6, 9, 9])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 6, 7, 7])],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.zeros(6, np.float32), "b")],
    )
    path = tmp_path / "float.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    return path


def calls(count: int) -> list[dict[str, NDArray[np.float32]]]:
    rng = np.random.default_rng(4)
    return [{"x": rng.uniform(0, 1 + i % 2, (1, 6, 9, 9)).astype(np.float32)} for i in range(count)]


def test_means_are_those_of_all_inputs(depthwise: Path) -> None:
    given = calls(5)
    found = channel_means(depthwise, given)
    assert list(found) == ["x"]
    np.testing.assert_allclose(found["x"], np.mean([call["x"] for call in given], axis=(0, 1, 3, 4)), rtol=1e-5)
    with pytest.raises(ConversionError, match="no inputs"):
        channel_means(depthwise, [])
    with pytest.raises(ConversionError, match="not finite"):
        channel_means(depthwise, [{"x": np.full((1, 6, 9, 9), np.nan, np.float32)}])


def test_older_opsets_mean_the_same(depthwise: Path) -> None:
    """ReduceMean takes its axes as an attribute below opset 18."""
    given = calls(2)
    expected = channel_means(depthwise, given)
    model = onnx.load(depthwise)
    model.opset_import[0].version = 13
    onnx.save(model, depthwise)
    np.testing.assert_allclose(channel_means(depthwise, given)["x"], expected["x"])


def test_the_shift_is_what_the_errors_let_through() -> None:
    error = np.arange(24, dtype=np.float32).reshape(4, 3, 2, 1)
    means = np.array([1.0, 10.0, 100.0, 2.0, 20.0, 200.0])
    exact = [(error[o].sum(axis=(1, 2)) * means.reshape(2, 3)[o // 2]).sum() for o in range(4)]
    np.testing.assert_allclose(shift_of(error, means), exact)


@pytest.mark.parametrize(("backend", "activations"), [("onnxruntime-cpu", "u8"), ("tensorrt", "s8")])
def test_outputs_are_no_longer_shifted(
    depthwise: Path, tmp_path: Path, run_model: Callable[..., NDArray[Any]], backend: str, activations: Any
) -> None:
    ranges = {"x": Range(0.0, 2.0), "y": Range(0.0, 2.5)}
    shifts = []
    for means in (None, channel_means(depthwise, calls(8))):
        out = tmp_path / "q.onnx"
        quantize_static(depthwise, out, ranges, backend=backend, activations=activations, means=means)
        found = [run_model(out, call) - run_model(depthwise, call) for call in calls(8)]
        shifts.append(np.abs(np.mean(found, axis=(0, 1, 3, 4))).max())
    assert shifts[1] < 0.2 * shifts[0]
