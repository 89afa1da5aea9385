"""What is counted as quantized, on small graphs whose multiply-adds are known."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgeq.converters.onnx.quantize.clean import clean_for
from edgeq.converters.onnx.quantize.coverage import coverage, require_coverage, write_executed
from edgeq.converters.onnx.quantize.dynamic import quantize_dynamic
from edgeq.errors import ConversionError
from edgeq.tensor_types import Coverage

pytest.importorskip("onnxruntime")

Sizes = Sequence["int | str"]


def floats(*shape: int) -> NDArray[np.float32]:
    made: NDArray[np.float32] = np.random.default_rng(math.prod(shape)).normal(scale=0.1, size=shape).astype(np.float32)
    return made


def saved(
    path: Path, nodes: Sequence[onnx.NodeProto], x: Sizes, y: Sizes, weights: Mapping[str, NDArray[np.float32]]
) -> Path:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, y)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path


def counted(model: Path, folder: Path, dims: Mapping[str, int] | None = None) -> Coverage:
    clean, out, executed = (folder / f"{part}.onnx" for part in ("clean", "int8", "executed"))
    clean_for(model, clean, "onnxruntime-cpu")
    quantize_dynamic(clean, out)
    write_executed(out, executed, dims=dims)
    return coverage(out, executed=executed, dims=dims)


LAST = helper.make_node("MatMul", ["a", "w"], ["y"], name="last")


@pytest.mark.parametrize(
    ("x", "first", "weight", "y", "macs"),
    [
        # the weight on the left: (5, 16) times (8, 16, 32)
        ((8, 16, 32), ("MatMul", "vx", {}), (5, 16), (8, 5, 256), 8 * 5 * 32 * 16),
        # a weight of several matrices, one for each of the first axis
        ((8, 4, 32), ("MatMul", "xv", {}), (8, 32, 32), (8, 4, 256), 8 * 4 * 32**2),
        # and as many for every one of the first axis
        ((4, 32), ("MatMul", "xv", {}), (8, 32, 32), (8, 4, 256), 8 * 4 * 32**2),
        # Gemm, the weight on the left
        ((16, 32), ("Gemm", "vx", {}), (5, 16), (5, 256), 5 * 32 * 16),
        ((16, 32), ("Gemm", "vx", {"transA": 1}), (16, 5), (5, 256), 5 * 32 * 16),
    ],
    ids=["left", "batched", "broadcast", "gemm", "gemm-transposed"],
)
def test_multiply_adds_are_those_of_what_is_made(
    tmp_path: Path,
    x: Sizes,
    first: tuple[str, str, dict[str, Any]],
    weight: tuple[int, ...],
    y: tuple[int, ...],
    macs: int,
) -> None:
    weights = {"v": floats(*weight), "w": floats(32, 256)}
    op_type, inputs, attributes = first
    node = helper.make_node(op_type, list(inputs), ["a"], name="first", **attributes)
    found = counted(saved(tmp_path / "m.onnx", [node, LAST], x, y, weights), tmp_path)
    last = math.prod(y) * 32
    assert {group.precision: group.macs for group in found.groups} == {"fp32": macs, "int8": last}
    assert found.mac_share == pytest.approx(last / (last + macs))
    assert found.weight_share == pytest.approx(32 * 256 / (32 * 256 + math.prod(weight)))
    assert found.left == ("first",)


def test_dynamic_axes_count_with_their_sizes(tmp_path: Path) -> None:
    first = helper.make_node("MatMul", ["v", "x"], ["a"], name="first")
    weights = {"v": floats(5, 16), "w": floats(32, 256)}
    model = saved(tmp_path / "m.onnx", [first, LAST], ("n", 16, 32), ("n", 5, 256), weights)
    found = counted(model, tmp_path, {"n": 3})
    assert {group.precision: group.macs for group in found.groups} == {
        "fp32": 3 * 5 * 16 * 32,
        "int8": 3 * 5 * 32 * 256,
    }


def _branching(path: Path, kind: str) -> Path:
    """Most of the weights lie in a body, where no quantizer looks."""
    body = [helper.make_node("MatMul", ["before", "v"], ["inner"], name="inside")]
    made = [helper.make_tensor_value_info("inner", TensorProto.FLOAT, [3, 64])]
    own = [numpy_helper.from_array(floats(64, 64), "v")]
    if kind == "If":
        then = helper.make_graph(body, "then", [], made, own)
        other = helper.make_graph(
            [helper.make_node("Identity", ["before"], ["kept"], name="same")],
            "else",
            [],
            [helper.make_tensor_value_info("kept", TensorProto.FLOAT, [3, 64])],
        )
        node = helper.make_node("If", ["yes"], ["b"], name="branch", then_branch=then, else_branch=other)
    else:
        on = helper.make_tensor_value_info("on", TensorProto.BOOL, [])
        inputs = [helper.make_tensor_value_info("turn", TensorProto.INT64, []), on]
        inputs.append(helper.make_tensor_value_info("state", TensorProto.FLOAT, [3, 64]))
        body[0].input[0] = "state"
        body.append(helper.make_node("Identity", ["on"], ["go"], name="go_on"))
        loop = helper.make_graph(
            body, "body", inputs, [helper.make_tensor_value_info("go", TensorProto.BOOL, []), *made], own
        )
        node = helper.make_node("Loop", ["turns", "yes", "before"], ["b"], name="loop", body=loop)
    nodes = [
        helper.make_node("Relu", ["x"], ["before"], name="relu"),
        helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0, name="sum"),
        helper.make_node("Greater", ["sum", "zero"], ["yes"], name="greater"),
        node,
        helper.make_node("MatMul", ["b", "w"], ["y"], name="last"),
    ]
    model = saved(
        path,
        [nodes[0], helper.make_node("MatMul", ["before", "w"], ["y"], name="last")],
        (3, 64),
        (3, 8),
        {"w": floats(64, 8)},
    )
    content = onnx.load(model)
    del content.graph.node[:]
    content.graph.node.extend(nodes)
    content.graph.initializer.append(numpy_helper.from_array(np.array(0, np.float32), "zero"))
    content.graph.initializer.append(numpy_helper.from_array(np.array(2, np.int64), "turns"))
    onnx.checker.check_model(content)
    onnx.save(content, model)
    return model


@pytest.mark.parametrize("kind", ["If", "Loop"])
def test_bodies_of_control_flow_count(tmp_path: Path, kind: str) -> None:
    found = counted(_branching(tmp_path / "m.onnx", kind), tmp_path)
    assert found.weight_share == pytest.approx(64 * 8 / (64 * 8 + 64 * 64))
    assert found.mac_share == pytest.approx(64 * 8 / (64 * 8 + 64 * 64))
    assert found.left == ("inside",)
    with pytest.raises(ConversionError, match="inside"):
        require_coverage(found)


@pytest.mark.parametrize("shape", [(1, 48), (1, 1), (1,), ()])
def test_a_bias_of_one_row_does_not_keep_a_product_in_floats(tmp_path: Path, shape: tuple[int, ...]) -> None:
    node = helper.make_node("Gemm", ["x", "w", "b"], ["y"], name="only")
    weights = {"w": floats(64, 48), "b": floats(*shape).reshape(shape)}
    found = counted(saved(tmp_path / "m.onnx", [node], (5, 64), (5, 48), weights), tmp_path)
    assert found.weight_share == 1.0
