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
