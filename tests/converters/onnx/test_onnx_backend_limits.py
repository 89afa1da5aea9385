"""What TensorRT cannot compute is refused before anything is calibrated; ONNX Runtime takes it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeq.converters.onnx.checks import refuse_for_backend
from edgeq.converters.onnx.export.adopt import adopt_onnx
from edgeq.errors import UnsupportedModelError

GPU = ("tensorrt", "tensorrt-rtx")
node = helper.make_node
LEVELS = {"zero": np.float32(0), "none": np.array([0]), "start": np.int64(0), "one": np.int64(1)}


def graph(path: Path, nodes: Sequence[Any], kind: int, shape: Sequence[int | str]) -> Path:
    """x (4, 4) -> y."""
    weights = [numpy_helper.from_array(np.asarray(array), name) for name, array in LEVELS.items()]
    info = helper.make_tensor_value_info
    made = helper.make_graph(
        list(nodes), "m", [info("x", TensorProto.FLOAT, ["rows", 4])], [info("y", kind, shape)], weights
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


COUNTED = [
    node("ReduceMax", ["x"], ["top"], keepdims=0),
    node("Abs", ["top"], ["size"]),
    node("Cast", ["size"], ["count"], to=TensorProto.INT64),
]
CASES: dict[str, tuple[list[Any], int, list[int | str]]] = {
    "NonZero": ([node("NonZero", ["x"], ["y"], name="found")], TensorProto.INT64, [2, "n"]),
    "Unique": ([node("Unique", ["x"], ["y"], name="found")], TensorProto.FLOAT, ["n"]),
    "Compress": (
        [
            node("Flatten", ["x"], ["flat"], axis=0),
            node("Greater", ["flat", "zero"], ["mask2"]),
            node("Squeeze", ["mask2", "none"], ["mask"]),
            node("Compress", ["x", "mask"], ["y"], name="found"),
        ],
        TensorProto.FLOAT,
        ["n"],
    ),
    "Range": (
        [*COUNTED, node("Range", ["start", "count", "one"], ["y"], name="found")],
        TensorProto.INT64,
        ["n"],
    ),
    "TopK": (
        [
            *COUNTED,
            node("Unsqueeze", ["count", "none"], ["k"]),
            node("TopK", ["x", "k"], ["y", "where"], name="found"),
        ],
        TensorProto.FLOAT,
        ["rows", "n"],
    ),
}


@pytest.mark.parametrize("operator", CASES)
def test_shapes_that_depend_on_data_are_refused_with_the_node(tmp_path: Path, operator: str) -> None:
    model = graph(tmp_path / "m.onnx", *CASES[operator])
    for backend in GPU:
        with pytest.raises(UnsupportedModelError, match=rf"node 'found' \({operator}\) .*\({backend}\)") as told:
            refuse_for_backend(model, backend)
        assert "\n" not in str(told.value)
        assert "--backend onnxruntime-cuda" in told.value.remedy
    refuse_for_backend(model, "onnxruntime-cpu")
    refuse_for_backend(model, "onnxruntime-cuda")


def test_shapes_that_follow_from_shapes_are_taken(tmp_path: Path) -> None:
    nodes = [
        node("Shape", ["x"], ["sizes"]),
        node("Gather", ["sizes", "start"], ["count"]),
        node("Range", ["start", "count", "one"], ["places"]),
        node("Cast", ["places"], ["numbers"], to=TensorProto.FLOAT),
        node("Unsqueeze", ["numbers", "none"], ["row"]),
        node("Expand", ["row", "sizes2"], ["wide"]),
        node("Add", ["wide", "zero"], ["y"]),
    ]
    nodes.insert(1, node("Mul", ["sizes", "one"], ["sizes2"]))
    refuse_for_backend(graph(tmp_path / "m.onnx", nodes, TensorProto.FLOAT, ["a", "b"]), "tensorrt")


def test_onnx_runtime_gets_what_it_runs(tmp_path: Path) -> None:
    adopted = adopt_onnx(graph(tmp_path / "m.onnx", *CASES["NonZero"]), tmp_path / "out.onnx")
    assert any("NonZero at 'found'" in note for note in adopted.notes)
    refuse_for_backend(adopted.path, "onnxruntime-cpu")
    with pytest.raises(UnsupportedModelError, match=r"'found' \(NonZero\)"):
        refuse_for_backend(adopted.path, "tensorrt-rtx")


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_operators_of_onnx_runtime_are_no_tensorrts(tmp_path: Path, backend: str) -> None:
    nodes = [helper.make_node("QuickGelu", ["x"], ["y"], name="act", domain="com.microsoft")]
    info = helper.make_tensor_value_info
    made = helper.make_graph(nodes, "g", [info("x", TensorProto.FLOAT, [2])], [info("y", TensorProto.FLOAT, [2])])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(made, opset_imports=opsets, ir_version=9), tmp_path / "m.onnx")
    with pytest.raises(UnsupportedModelError, match=f"'act' is of ONNX Runtime's own operator QuickGelu, .*{backend}"):
        refuse_for_backend(tmp_path / "m.onnx", backend)
    refuse_for_backend(tmp_path / "m.onnx", "onnxruntime-cpu")
