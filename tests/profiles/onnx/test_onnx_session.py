"""What edgeq keeps ONNX Runtime from doing to a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeq.profiles.onnx.session import open_onnx_session

pytest.importorskip("onnxruntime")


def test_a_bias_between_grids_in_halves_keeps_its_value(tmp_path: Path) -> None:
    """As in graphs for TensorRT: ONNX Runtime would put it on a grid whose steps are nothing in FP16."""
    half = np.float16
    constants: dict[str, npt.NDArray[Any]] = {
        "x_scale": np.array(0.02, half),
        "x_zero": np.array(0, np.int8),
        "w_q": np.full((1, 1, 1, 1), 100, np.int8),
        "w_scale": np.array([2e-7], half),
        "w_zero": np.zeros(1, np.int8),
        "bias": np.array([1.5], half),
    }
    nodes = [
        helper.make_node("Cast", ["x"], ["x_half"], to=TensorProto.FLOAT16),
        helper.make_node("QuantizeLinear", ["x_half", "x_scale", "x_zero"], ["x_q"]),
        helper.make_node("DequantizeLinear", ["x_q", "x_scale", "x_zero"], ["x_dq"]),
        helper.make_node("DequantizeLinear", ["w_q", "w_scale", "w_zero"], ["w"], axis=0),
        helper.make_node("Conv", ["x_dq", "w", "bias"], ["y_half"]),
        helper.make_node("QuantizeLinear", ["y_half", "x_scale", "x_zero"], ["y_q"]),
        helper.make_node("DequantizeLinear", ["y_q", "x_scale", "x_zero"], ["y_dq"]),
        helper.make_node("Cast", ["y_dq"], ["y"], to=TensorProto.FLOAT),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1, 2, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1, 2, 2])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    (found,) = open_onnx_session(path, 1).run(["y"], {"x": np.ones((1, 1, 2, 2), np.float32)})
    np.testing.assert_allclose(np.asarray(found), 1.5, atol=0.02)


@pytest.mark.parametrize("as_bytes", [False, True])
@pytest.mark.parametrize("zeros_are_nodes", [False, True])
@pytest.mark.parametrize("between", ["", "Relu", "Clip", "MaxPool"])
def test_grids_of_float8_are_computed_as_they_stand(
    tmp_path: Path, between: str, zeros_are_nodes: bool, as_bytes: bool
) -> None:
    """ONNX Runtime drops a Relu before them, or finds no kernels for what it makes of them."""
    rng = np.random.default_rng(0)
    zero = helper.make_tensor("zero", TensorProto.FLOAT8E4M3FN, [], b"\0", raw=True)
    constants = [
        numpy_helper.from_array(np.array(0.02, np.float32), "scale"),
        numpy_helper.from_array(rng.standard_normal((4, 3, 3, 3)).astype(np.float32), "w1"),
        numpy_helper.from_array(rng.standard_normal((2, 4, 3, 3)).astype(np.float32), "w2"),
        numpy_helper.from_array(np.array(0, np.float32), "low"),
        numpy_helper.from_array(np.array(6, np.float32), "high"),
    ]

    def grid(value: str) -> list[onnx.NodeProto]:
        return [
            helper.make_node("QuantizeLinear", [value, "scale", "zero"], [f"{value}_q"]),
            helper.make_node("DequantizeLinear", [f"{value}_q", "scale", "zero"], [f"{value}_d"]),
        ]

    inner = {
        "": [],
        "Relu": [helper.make_node("Relu", ["c"], ["a"])],
        "Clip": [helper.make_node("Clip", ["c", "low", "high"], ["a"])],
        "MaxPool": [helper.make_node("MaxPool", ["c"], ["a"], kernel_shape=[2, 2])],
    }[between]
    last = "a" if between else "c"
    nodes = [*grid("x"), *grid("w1"), helper.make_node("Conv", ["x_d", "w1_d"], ["c"]), *inner, *grid(last)]
    nodes += [*grid("w2"), helper.make_node("Conv", [f"{last}_d", "w2_d"], ["y"])]
    if zeros_are_nodes:
        nodes.insert(0, helper.make_node("Constant", [], ["zero"], value=zero))
    else:
        constants.append(zero)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x], [y], constants), opset_imports=[helper.make_opsetid("", 20)], ir_version=9
    )
    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    ort = pytest.importorskip("onnxruntime")
    plain = ort.SessionOptions()
    plain.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    call = {"x": rng.standard_normal((1, 3, 8, 8)).astype(np.float32)}
    (expected,) = ort.InferenceSession(str(path), plain, providers=["CPUExecutionProvider"]).run(None, call)
    (found,) = open_onnx_session(path.read_bytes() if as_bytes else path, 1).run(None, call)
    np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-4, atol=1e-3)
