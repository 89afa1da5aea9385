"""ONNX files from elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeq.converters.onnx.export.adopt import adopt_onnx
from edgeq.errors import SourceError, UnsupportedModelError, UsageError

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

import onnx
from onnx import TensorProto, helper, numpy_helper


def _value(name: str, shape: list[int | str | None], kind: int = TensorProto.FLOAT) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def _weights(*shape: int) -> Any:
    values = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    return numpy_helper.from_array(values, "w")


def _save(
    folder: Path,
    nodes: list[Any],
    *,
    opset: int = 17,
    inputs: list[Any] | None = None,
    functions: Any = (),
    **more: Any,
) -> Path:
    graph = helper.make_graph(
        nodes, "g", inputs or [_value("x", ["n", 4])], [_value("y", ["n", 3])], [_weights(4, 3)], **more
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("own.ops", 1)]
    model = helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=8)
    file = folder / "given.onnx"
    onnx.save(model, file)
    return file


def test_a_plain_file_is_cleaned_and_compared(tmp_path: Path) -> None:
    scale = helper.make_node("Constant", [], ["two"], value=numpy_helper.from_array(np.array([2.0], np.float32)))
    nodes = [
        scale,
        helper.make_node("Mul", ["w", "two"], ["w2"], name="fold-me"),
        helper.make_node("MatMul", ["x", "w2"], ["h"], name="product"),
        helper.make_node("Identity", ["h"], ["i"]),
        helper.make_node("Relu", ["i"], ["y"], name="activation"),
    ]
    exported = adopt_onnx(_save(tmp_path, nodes), tmp_path / "out.onnx")
    assert exported.artifact.architecture == "onnx"
    assert exported.artifact.inputs[0].shape == ("n", 4)
    assert exported.artifact.opset == 17
    graph = onnx.load(exported.path).graph
    assert [node.op_type for node in graph.node] == ["MatMul", "Relu"]
    assert [node.name for node in graph.node] == ["product", "activation"]
    assert [(check.name, check.calls) for check in exported.checks] == [("y", 2)]


def test_local_functions_are_inlined(tmp_path: Path) -> None:
    body = [helper.make_node("MatMul", ["a", "b"], ["c"])]
    function = helper.make_function("own.ops", "Product", ["a", "b"], ["c"], body, [helper.make_opsetid("", 17)])
    file = _save(tmp_path, [helper.make_node("Product", ["x", "w"], ["y"], domain="own.ops")], functions=[function])
    exported = adopt_onnx(file, tmp_path / "out.onnx")
    model = onnx.load(exported.path)
    assert [node.op_type for node in model.graph.node] == ["MatMul"]
    assert not model.functions


def test_operators_of_other_makers_are_named_with_their_node(tmp_path: Path) -> None:
    file = _save(tmp_path, [helper.make_node("Magic", ["x", "w"], ["y"], name="spell", domain="own.ops")])
    with pytest.raises(UnsupportedModelError, match=r"'spell' is own\.ops\.Magic"):
        adopt_onnx(file, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_data_outside_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    file = _save(folder, [helper.make_node("MatMul", ["x", "w"], ["y"])])
    model = onnx.load(file)
    tensor = model.graph.initializer[0]
    (tmp_path / "secret").write_bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "../secret"), ("offset", "0"), ("length", "48")):
        tensor.external_data.add(key=key, value=value)
    file.write_bytes(model.SerializeToString())
    with pytest.raises(SourceError, match="outside its own folder"):
        adopt_onnx(file, tmp_path / "out.onnx")


@pytest.mark.parametrize("limit", [0, 1 << 20])
def test_external_data_beside_the_file_is_taken_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr("edgeq.converters.onnx.export.write.EXTERNAL_BYTES", limit)
    file = _save(tmp_path, [helper.make_node("MatMul", ["x", "w"], ["y"])])
    onnx.save(onnx.load(file), file, save_as_external_data=True, location="weights.bin", size_threshold=0)
    exported = adopt_onnx(file, tmp_path / "out.onnx")
    (tmp_path / "weights.bin").unlink()
    assert onnx.load(exported.path).graph.initializer[0].raw_data


def test_old_opsets_are_raised(tmp_path: Path) -> None:
    axes = helper.make_node("Unsqueeze", ["y0"], ["y1"], axes=[0])
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y0"]),
        axes,
        helper.make_node("Squeeze", ["y1"], ["y"], axes=[0]),
    ]
    exported = adopt_onnx(_save(tmp_path, nodes, opset=11), tmp_path / "out.onnx")
    assert exported.artifact.opset == 17
    assert any("raised from 11 to 17" in note for note in exported.notes)
    assert exported.checks[0].calls == 2


def test_weights_that_are_also_inputs_are_no_inputs_afterwards(tmp_path: Path) -> None:
    file = _save(
        tmp_path, [helper.make_node("MatMul", ["x", "w"], ["y"])], inputs=[_value("x", ["n", 4]), _value("w", [4, 3])]
    )
    exported = adopt_onnx(file, tmp_path / "out.onnx")
    assert [spec.name for spec in exported.artifact.inputs] == ["x"]
    assert [value.name for value in onnx.load(exported.path).graph.input] == ["x"]


def test_axes_without_a_name_get_one(tmp_path: Path) -> None:
    file = _save(tmp_path, [helper.make_node("MatMul", ["x", "w"], ["y"])], inputs=[_value("x", [None, 4])])
    exported = adopt_onnx(file, tmp_path / "out.onnx")
    assert exported.artifact.inputs[0].shape == ("x_axis_0", 4)
    assert onnx.load(exported.path).graph.input[0].type.tensor_type.shape.dim[0].dim_param == "x_axis_0"


def test_a_quantized_file_is_noted(tmp_path: Path) -> None:
    zero = numpy_helper.from_array(np.array(0, np.uint8), "zero")
    scale = numpy_helper.from_array(np.array(0.1, np.float32), "scale")
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], name="first"),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"]),
        helper.make_node("MatMul", ["d", "w"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes, "g", [_value("x", ["n", 4])], [_value("y", ["n", 3])], [_weights(4, 3), zero, scale]
    )
    file = tmp_path / "given.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), file)
    exported = adopt_onnx(file, tmp_path / "out.onnx")
    assert any("quantized already (QuantizeLinear at 'first')" in note for note in exported.notes)
    assert "QuantizeLinear" in {node.op_type for node in onnx.load(exported.path).graph.node}


def test_texts_as_inputs_are_refused(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "g",
        [_value("x", [1], TensorProto.STRING)],
        [_value("y", [1], TensorProto.STRING)],
    )
    file = tmp_path / "given.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), file)
    with pytest.raises((UnsupportedModelError, SourceError), match="'x'"):
        adopt_onnx(file, tmp_path / "out.onnx")


def test_damaged_files_and_wrong_inputs_are_one_line(tmp_path: Path) -> None:
    file = tmp_path / "given.onnx"
    file.write_bytes(b"no onnx")
    with pytest.raises(SourceError):
        adopt_onnx(file, tmp_path / "out.onnx")
    file = _save(tmp_path, [helper.make_node("MatMul", ["x", "w"], ["y"])])
    with pytest.raises(UsageError, match="no input 'z'"):
        adopt_onnx(file, tmp_path / "out.onnx", inputs=[{"z": np.zeros((1, 4), np.float32)}])
    assert not (tmp_path / "out.onnx").exists()
