"""Nodes that run on the CPU although another provider was asked for.

ONNX Runtime's CPU wheel has a second provider, Azure's, that takes no node of an ordinary graph: what CUDA's provider
does with an operator that it lacks, it does with all of them.
"""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

import edgeq
from edgeq.errors import SessionError
from edgeq.profiles.onnx.session import import_onnxruntime, open_onnx_session
from edgeq.runtime.tensor.placement import placement_config, refuse_fallback, strays

pytest.importorskip("onnxruntime")

X = np.ones((2, 8), np.float32)
AZURE = ["AzureExecutionProvider"]
needs_azure = pytest.mark.skipif(
    AZURE[0] not in import_onnxruntime().get_available_providers(), reason="this onnxruntime has no second provider"
)


def _graph(path: Path, nodes: list[onnx.NodeProto], result: int = onnx.TensorProto.FLOAT) -> Path:
    helper, kind = onnx.helper, onnx.TensorProto
    values = {"w": np.ones((8, 4), np.float32), "zero": np.array([0]), "four": np.array([4])}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", kind.FLOAT, ["n", 8]), helper.make_tensor_value_info("c", kind.BOOL, [])],
        [helper.make_tensor_value_info("y", result, None)],
        [onnx.numpy_helper.from_array(value, name) for name, value in values.items()],
    )
    opset = [helper.make_opsetid("", 18)]
    path.write_bytes(helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString())
    return path


def _branch(name: str, value: str) -> onnx.GraphProto:
    helper = onnx.helper
    out = helper.make_tensor_value_info(value, onnx.TensorProto.FLOAT, None)
    return helper.make_graph([helper.make_node("MatMul", ["x", "w"], [value], name=name)], value, [], [out])


def _open(path: Path) -> Any:
    """A session on the CPU that was asked for nothing, as if all of it had fallen back."""
    return open_onnx_session(path, 1, providers=(), config=placement_config(()))


def test_products_are_named_and_shapes_are_not(tmp_path: Path) -> None:
    node = onnx.helper.make_node
    path = _graph(
        tmp_path / "m.onnx",
        [
            node("Shape", ["x"], ["s"], name="shape"),
            node("Gather", ["s", "zero"], ["n"], name="gather"),
            node("Concat", ["n", "four"], ["s4"], axis=0, name="concat"),
            node("MatMul", ["x", "w"], ["a"], name="product"),
            node("Reshape", ["a", "s4"], ["b"], name="reshape"),
            node("Softmax", ["b"], ["y"], name="softmax"),
        ],
    )
    session = _open(path)
    with pytest.raises(SessionError, match=r"asked for CUDAExecutionProvider, and computes on the CPU") as caught:
        refuse_fallback(session, ["CUDAExecutionProvider"])
    assert "product (MatMul), softmax (Softmax)" in str(caught.value)
    assert "gather" not in str(caught.value)
    assert "providers=['CUDAExecutionProvider', 'CPUExecutionProvider']" in str(caught.value)
    refuse_fallback(session, [("CUDAExecutionProvider", {"device_id": "0"}), "CPUExecutionProvider"])


def test_nodes_in_branches_are_seen(tmp_path: Path) -> None:
    branches: dict[str, Any] = {"then_branch": _branch("inner", "t"), "else_branch": _branch("", "e")}
    session = _open(_graph(tmp_path / "m.onnx", [onnx.helper.make_node("If", ["c"], ["y"], name="if", **branches)]))
    with pytest.raises(SessionError) as caught:
        refuse_fallback(session, ["CUDAExecutionProvider"])
    assert "inner (MatMul)" in str(caught.value)
    assert "a node without a name (MatMul)" in str(caught.value)


def test_only_shapes_on_the_cpu_are_no_fallback(tmp_path: Path) -> None:
    node = onnx.helper.make_node
    path = _graph(
        tmp_path / "m.onnx", [node("Shape", ["x"], ["s"]), node("Mul", ["s", "s"], ["y"])], onnx.TensorProto.INT64
    )
    refuse_fallback(_open(path), ["CUDAExecutionProvider"])


def test_many_are_counted() -> None:
    placed = [("CPUExecutionProvider", f"conv{i}", "Conv") for i in range(7)]
    placed.append(("CUDAExecutionProvider", "there", "Conv"))
    assert strays(placed) == [(f"conv{i}", "Conv") for i in range(7)]


@needs_azure
def test_a_bundle_that_would_fall_back_does_not_load(linear_onnx: Path, make_tensor_bundle: Any) -> None:
    bundle = make_tensor_bundle(linear_onnx)
    with pytest.raises(SessionError, match=r"asked for Azure.*\((Gemm|MatMul)\).*allow it: edgeq.load"):
        edgeq.load(bundle, providers=AZURE)
    with edgeq.load(bundle, kind="tensor", providers=[*AZURE, "CPUExecutionProvider"]) as session:
        assert session.run({"x": X})["y"].shape == (2, 4)


def test_an_older_onnxruntime_says_that_it_was_not_checked(caplog: pytest.LogCaptureFixture) -> None:
    older: Any = SimpleNamespace(get_providers=lambda: ["CUDAExecutionProvider"])
    with caplog.at_level(logging.WARNING, "edgeq"):
        refuse_fallback(older, ["CUDAExecutionProvider"])
    assert "does not tell which nodes run on the CPU instead of CUDAExecutionProvider" in caplog.text
