"""What FP16 cannot hold stays in FP32, though ONNX Runtime would never show it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeq.planner.tensors.candidates import Workbench
from edgeq.planner.tensors.overflow import nodes_that_touch, too_large_for_half
from edgeq.planner.tensors.writing import Dialect

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnx_ir")


@pytest.fixture
def loud(tmp_path: Path) -> Path:
    """x [8, 64] -> up, values of about 200,000 -> relu -> down -> out, both of about 1."""
    rng = np.random.default_rng(0)

    def weight(name: str, scale: float) -> Any:
        return onnx.numpy_helper.from_array((scale * rng.standard_normal((64, 64))).astype(np.float32), name)

    node, info = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    nodes = [
        node("MatMul", ["x", "w1"], ["a"], name="up"),
        node("Relu", ["a"], ["b"], name="relu"),
        node("MatMul", ["b", "w2"], ["c"], name="down"),
        node("MatMul", ["c", "w3"], ["y"], name="out"),
    ]
    weights = [weight("w1", 1e4), weight("w2", 1e-5), weight("w3", 0.1)]
    graph = onnx.helper.make_graph(nodes, "loud", [info("x", 1, [8, 64])], [info("y", 1, [8, 64])], weights)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    (tmp_path / "loud").mkdir()
    onnx.save(model, tmp_path / "loud" / "model.onnx")
    return tmp_path / "loud" / "model.onnx"


def _halves(path: Path) -> set[str]:
    """Products that read halves."""
    graph = onnx.shape_inference.infer_shapes(onnx.load(path)).graph
    types = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    return {n.name for n in graph.node if n.op_type == "MatMul" and types[n.input[1]] == onnx.TensorProto.FLOAT16}


def test_nodes_around_large_values_stay_in_floats(loud: Path, make_bench: Callable[..., Workbench]) -> None:
    bench = make_bench(loud, width=64, rows=8, dialect=Dialect("tensorrt", "s8"))
    found = bench.other("fp16", {})
    assert _halves(found.path) == {"out"}
    (note,) = [note for note in found.notes if "65504" in note]
    assert note.startswith("3 nodes stay in FP32")


def test_around_grids_too(loud: Path, make_bench: Callable[..., Workbench]) -> None:
    bench = make_bench(loud, width=64, rows=8, dialect=Dialect("tensorrt", "s8"))
    found = bench.static(bench.ranges(("minmax",))["minmax"], {}, "int8")
    assert found.coverage is not None
    assert found.coverage.mac_share == 1.0
    graph = onnx.load(found.path).graph
    scales = {t.name: t for t in graph.initializer}
    large = [n for n in graph.node if n.op_type == "QuantizeLinear" and n.input[0] in ("a", "b")]
    assert large
    assert all(scales[n.input[1]].data_type == onnx.TensorProto.FLOAT for n in large)


def test_masks_are_no_signals(tmp_path: Path) -> None:
    node, info = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    lowest = onnx.numpy_helper.from_array(np.array(np.finfo(np.float32).min), "lowest")
    nodes = [
        node("Where", ["keep", "x", "lowest"], ["masked"], name="mask"),
        node("Softmax", ["masked"], ["y"], name="softmax"),
    ]
    inputs = [info("x", 1, [4]), info("keep", onnx.TensorProto.BOOL, [4])]
    graph = onnx.helper.make_graph(nodes, "mask", inputs, [info("y", 1, [4])], [lowest])
    path = tmp_path / "mask.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10), path)
    keep = np.array([True, True, False, True])
    assert too_large_for_half(path, [{"x": np.ones(4, np.float32), "keep": keep}], threads=1) == {}
    found = too_large_for_half(path, [{"x": np.full(4, 4e4, np.float32), "keep": keep}], threads=1)
    assert found == {"masked": 4e4}
    assert nodes_that_touch(path, found.keys()) == {"mask", "softmax"}
