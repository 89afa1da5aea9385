"""Weights that several products read are written once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgeq.converters.onnx.quantize.dynamic import quantize_dynamic
from edgeq.converters.onnx.quantize.static import calibration_tensors, quantize_static
from edgeq.converters.onnx.quantize.weights_only import quantize_weights

pytest.importorskip("onnxruntime")

USES, WIDTH = 4, 64
Scheme = Callable[[Path, Path, Any], None]


def _dynamic(model: Path, out: Path, find: Any) -> None:
    quantize_dynamic(model, out)


def _weights(model: Path, out: Path, find: Any) -> None:
    quantize_weights(model, out, bits=8)


def _cpu(model: Path, out: Path, find: Any) -> None:
    ranges = find(model, calibration_tensors(model, "onnxruntime-cpu"))
    quantize_static(model, out, ranges, backend="onnxruntime-cpu", activations="u8")


def _tensorrt(model: Path, out: Path, find: Any) -> None:
    ranges = find(model, calibration_tensors(model, "tensorrt"))
    quantize_static(model, out, ranges, backend="tensorrt", activations="s8")


def _shared(path: Path, op_type: str) -> Path:
    """One weight, as ALBERT's layers share theirs; Gemms have biases of their own, of very different sizes."""
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((WIDTH, WIDTH)) * 0.1}
    nodes, value = [], "x"
    for index in range(USES):
        inputs = [value, "w"]
        if op_type == "Gemm":
            weights[f"b{index}"] = rng.standard_normal(WIDTH) * 10.0**index
            inputs.append(f"b{index}")
        nodes.append(helper.make_node(op_type, inputs, [f"p{index}"], name=f"product{index}"))
        value = f"t{index}"
        nodes.append(helper.make_node("Tanh", [f"p{index}"], [value], name=f"tanh{index}"))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, WIDTH])],
        [helper.make_tensor_value_info(value, TensorProto.FLOAT, [3, WIDTH])],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("quantize", [_dynamic, _weights, _cpu, _tensorrt])
@pytest.mark.parametrize("op_type", ["MatMul", "Gemm"])
def test_a_weight_with_several_readers_is_written_once(
    make_feeds: Callable[..., dict[str, NDArray[Any]]],
    run_model: Callable[..., NDArray[Any]],
    find_ranges: Callable[..., dict[str, Any]],
    cosine: Callable[..., float],
    tmp_path: Path,
    op_type: str,
    quantize: Scheme,
) -> None:
    model, out = _shared(tmp_path / "float.onnx", op_type), tmp_path / "int8.onnx"
    quantize(model, out, find_ranges)
    onnx.checker.check_model(out)
    large = [item for item in onnx.load(out).graph.initializer if np.prod(item.dims) >= WIDTH * WIDTH]
    assert [numpy_helper.to_array(item).nbytes for item in large] == [WIDTH * WIDTH]
    feeds = make_feeds(model, 2)
    assert cosine(run_model(out, feeds), run_model(model, feeds)) > 0.99


def test_scales_leave_room_for_the_largest_bias_of_all_readers(
    make_feeds: Callable[..., dict[str, NDArray[Any]]],
    run_model: Callable[..., NDArray[Any]],
    find_ranges: Callable[..., dict[str, Any]],
    tmp_path: Path,
) -> None:
    model, out = _shared(tmp_path / "float.onnx", "Gemm"), tmp_path / "int8.onnx"
    content = onnx.load(model)
    for item in content.graph.initializer:
        if item.name == "w":
            item.CopyFrom(numpy_helper.from_array(np.full((WIDTH, WIDTH), 1e-9, np.float32), "w"))
    onnx.save(content, model)
    _cpu(model, out, find_ranges)
    feeds = make_feeds(model, 2)
    assert np.abs(run_model(out, feeds) - run_model(model, feeds)).max() < 0.02
