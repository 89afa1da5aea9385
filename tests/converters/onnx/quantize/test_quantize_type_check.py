"""Graphs that mix types are refused with the node; what onnx knows nothing of is passed over."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from edgeq.converters.onnx.quantize.type_check import require_types, takes_halves
from edgeq.errors import ConversionError

onnx = pytest.importorskip("onnx")


def _saved(path: Path, nodes: Sequence[Any], output: int = 1) -> Path:
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(nodes, "g", [info("x", 1, [4])], [info("y", output, [4])])
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("others", 1)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9), path)
    return path


def _node(op_type: str, inputs: Sequence[str], output: str, **more: Any) -> Any:
    return onnx.helper.make_node(op_type, inputs, [output], name=f"make_{output}", **more)


def test_mixed_inputs_are_named(tmp_path: Path) -> None:
    nodes = [_node("Cast", ["x"], "h", to=10), _node("Mul", ["h", "x"], "y")]
    with pytest.raises(ConversionError, match=r"Mul 'make_y' reads float16 and float"):
        require_types(_saved(tmp_path / "m.onnx", nodes, output=10))


def test_an_output_of_another_type_than_declared_is_refused(tmp_path: Path) -> None:
    nodes = [_node("Cast", ["x"], "h", to=10), _node("Relu", ["h"], "y")]
    with pytest.raises(ConversionError, match="elem type differs"):
        require_types(_saved(tmp_path / "m.onnx", nodes, output=1))


def test_a_graph_without_sense_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="no sound ONNX model"):
        require_types(_saved(tmp_path / "m.onnx", [_node("Relu", ["nothing"], "y")]))


@pytest.mark.parametrize(
    "nodes",
    [
        [_node("Identity", ["x"], "y")],
        [_node("Secret", ["x"], "a", domain="others"), _node("Relu", ["a"], "y")],
        [_node("Cast", ["x"], "i", to=7), _node("Cast", ["i"], "y", to=1)],
        # Several types on purpose: condition and values, and parameters of one operator that are free of each other.
        [_node("Cast", ["x"], "b", to=9), _node("Where", ["b", "x", "x"], "y")],
    ],
)
def test_sound_graphs_pass(tmp_path: Path, nodes: Sequence[Any]) -> None:
    require_types(_saved(tmp_path / "m.onnx", nodes))


def test_what_takes_halves() -> None:
    assert all(takes_halves(name, 20) for name in ("Conv", "MatMul", "LayerNormalization", "QuantizeLinear", "Where"))
    assert not takes_halves("QuantizeLinear", 18)
    assert not any(takes_halves(name, 20) for name in ("NonMaxSuppression", "Resize", "NoSuchOperator"))
