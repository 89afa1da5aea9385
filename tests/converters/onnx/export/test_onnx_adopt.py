"""ONNX files from elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeq.converters.onnx.export.adopt import adopt_onnx, check_adopted
from edgeq.errors import ConversionError, SourceError, UnsupportedModelError, UsageError

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
    assert exported.artifact.opset == 20
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
    assert exported.artifact.opset == 20
    assert any("raised from 11 to 20" in note for note in exported.notes)
    assert exported.checks[0].calls == 2


def test_an_opset_is_raised_no_further_than_the_target_takes(tmp_path: Path) -> None:
    mean = helper.make_node("ReduceMean", ["h"], ["m"], axes=[0], keepdims=1)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), mean, helper.make_node("Sub", ["h", "m"], ["y"])]
    file = _save(tmp_path, nodes, opset=13)
    for newest, opset in ((None, 20), (24, 20), (19, 19), (13, 13)):
        exported = adopt_onnx(file, tmp_path / f"{newest}.onnx", newest_opset=newest)
        assert exported.artifact.opset == opset
        assert exported.checks[0].calls == 2
        assert any("raised from 13" in note for note in exported.notes) == (opset > 13)


def test_an_opset_that_cannot_be_raised_stays_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = _save(tmp_path, [helper.make_node("MatMul", ["x", "w"], ["y"])])
    with monkeypatch.context() as small:
        small.setattr("edgeq.converters.onnx.export.adopt._MOST_CONVERTED_BYTES", 0)
        exported = adopt_onnx(file, tmp_path / "out.onnx")
        assert exported.artifact.opset == 17
        assert any("stays 17, less than 20" in n and "cannot be raised: it is larger" in n for n in exported.notes)
        with pytest.raises(ConversionError, match=r"opset 11 of .* cannot be raised"):
            adopt_onnx(_save(tmp_path, [helper.make_node("MatMul", ["x", "w"], ["y"])], opset=11), tmp_path / "b.onnx")
    branches = {"then_branch": _body("a", "a_out"), "else_branch": _body("b", "b_out")}
    yes = helper.make_node("Constant", [], ["yes"], value=numpy_helper.from_array(np.array(True)))
    given = [yes, helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("If", ["yes"], ["y"], **branches)]
    controlled = adopt_onnx(_save(tmp_path, given), tmp_path / "c.onnx")
    assert controlled.artifact.opset == 17
    assert any("control flow, whose bodies cannot be raised" in note for note in controlled.notes)


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


def test_an_input_that_is_an_output_too_keeps_its_name(tmp_path: Path) -> None:
    product = helper.make_node("MatMul", ["x", "w"], ["y"], name="product")
    file = _save(tmp_path, [product])
    model = onnx.load(file)
    model.graph.output.insert(0, _value("x", ["n", 4]))
    onnx.save(model, file)
    exported = adopt_onnx(file, tmp_path / "out.onnx")
    assert [spec.name for spec in exported.artifact.inputs] == ["x"]
    assert [spec.name for spec in exported.artifact.outputs] == ["x", "y"]
    assert [node.op_type for node in onnx.load(exported.path).graph.node] == ["MatMul"]
    assert [(check.name, check.calls) for check in exported.checks] == [("x", 2), ("y", 2)]


def _function_of_input(folder: Path, op_type: str) -> Path:
    return _save(
        folder,
        [helper.make_node(op_type, ["x"], ["h"]), helper.make_node("MatMul", ["h", "w"], ["y"])],
        inputs=[_value("x", ["n", 4])],
    )


@pytest.mark.parametrize("op_type", ["Log", "Sqrt", "Acosh"])
def test_random_inputs_outside_of_the_domain_are_left_out(tmp_path: Path, op_type: str) -> None:
    file = _function_of_input(tmp_path, op_type)
    exported = adopt_onnx(file, tmp_path / "out.onnx")
    assert any("NaN or infinity for them at 'y'" in note for note in exported.notes)
    compared = not any("was not compared" in note for note in exported.notes)
    assert compared == bool(exported.checks) == (op_type != "Acosh")  # of numbers from 1 on alone
    real = {"x": np.full((2, 4), 1.5, np.float32)}
    again = check_adopted(file, exported, [real, real])
    assert [(check.name, check.calls) for check in again.checks] == [("y", 2)]
    assert not any("was not compared" in note for note in again.notes)
    assert check_adopted(file, exported, []) == exported
    wrong = {"x": np.full((2, 4), -1.5, np.float32)}
    with pytest.raises(SourceError, match="The model itself gives NaN or infinity at 'y'"):
        check_adopted(file, exported, [wrong])
    with pytest.raises(SourceError, match="The model itself gives NaN or infinity at 'y'"):
        adopt_onnx(file, tmp_path / "other.onnx", inputs=[wrong])


def test_weights_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    file = _save(tmp_path, [helper.make_node("MatMul", ["x", "w"], ["y"])])
    model = onnx.load(file)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.full((4, 3), np.nan, np.float32), "w"))
    onnx.save(model, file)
    with pytest.raises(SourceError, match="The weight 'w' holds NaN"):
        adopt_onnx(file, tmp_path / "out.onnx")


@pytest.mark.parametrize("op_type", ["RandomNormalLike", "Dropout"])
def test_a_random_model_is_called_random(tmp_path: Path, op_type: str) -> None:
    training = numpy_helper.from_array(np.array(True), "training")
    inputs = ["h"] if op_type == "RandomNormalLike" else ["h", "", "training"]
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node(op_type, inputs, ["y"])]
    graph = helper.make_graph(nodes, "g", [_value("x", ["n", 4])], [_value("y", ["n", 3])], [_weights(4, 3), training])
    file = tmp_path / "given.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), file)
    with pytest.raises(UnsupportedModelError, match="The model is random: two calls with the same inputs differ"):
        adopt_onnx(file, tmp_path / "out.onnx")


def test_an_opset_that_the_target_does_not_take_is_lowered(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Cast", ["r"], ["y"], to=TensorProto.FLOAT),
    ]
    file = _save(tmp_path, nodes, opset=24)
    exported = adopt_onnx(file, tmp_path / "out.onnx", newest_opset=20)
    assert exported.artifact.opset == 20
    model = onnx.load(exported.path)
    assert (model.opset_import[0].version, model.ir_version) == (20, 9)
    assert any("lowered from 24 to 20" in note for note in exported.notes)
    assert exported.checks[0].calls == 2
    kept = adopt_onnx(file, tmp_path / "kept.onnx", newest_opset=24)
    assert (kept.artifact.opset, kept.notes) == (24, ())


def test_an_opset_that_cannot_be_lowered_is_refused_with_the_limit(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Swish", ["h"], ["y"])]
    with pytest.raises(
        ConversionError, match="uses opset 24, the target takes up to 20, and it cannot be lowered: No Previous"
    ):
        adopt_onnx(_save(tmp_path, nodes, opset=24), tmp_path / "out.onnx", newest_opset=20)
    assert not (tmp_path / "out.onnx").exists()


def _body(name: str, out: str) -> Any:
    weight = numpy_helper.from_array(np.ones(3, np.float32), f"{name}_w")
    node = helper.make_node("Add", ["h", f"{name}_w"], [out])
    return helper.make_graph([node], name, [], [_value(out, ["n", 3])], [weight])


@pytest.mark.parametrize("place", ["constant", "body", "sparse"])
@pytest.mark.parametrize("location", ["../secret.bin", "link.bin"])
def test_data_outside_of_the_folder_is_refused_wherever_it_stands(tmp_path: Path, place: str, location: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(12))
    (folder / "link.bin").symlink_to("../secret.bin")
    file = _save(folder, [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Relu", ["h"], ["y"])])
    model = onnx.load(file)
    tensor: TensorProto
    if place == "body":
        branches = {"then_branch": _body("a", "a_out"), "else_branch": _body("b", "b_out")}
        model.graph.node[1].CopyFrom(helper.make_node("If", ["yes"], ["y"], **branches))
        model.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
        tensor = model.graph.node[1].attribute[1].g.initializer[0]
    elif place == "constant":
        held = numpy_helper.from_array(np.ones(3, np.float32), "c")
        model.graph.node.insert(0, helper.make_node("Constant", [], ["c"], value=held))
        model.graph.node[2].CopyFrom(helper.make_node("Add", ["h", "c"], ["y"]))
        tensor = model.graph.node[0].attribute[0].t
    else:
        values = numpy_helper.from_array(np.ones(3, np.float32), "values")
        at = numpy_helper.from_array(np.arange(3), "at")
        dense = helper.make_node("Constant", [], ["c"], sparse_value=helper.make_sparse_tensor(values, at, [3]))
        model.graph.node.insert(0, dense)
        tensor = model.graph.node[0].attribute[0].sparse_tensor.values
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", "12")):
        tensor.external_data.add(key=key, value=value)
    file.write_bytes(model.SerializeToString())
    with pytest.raises(SourceError, match="outside its own folder"):
        adopt_onnx(file, tmp_path / "out.onnx")


def test_names_written_twice_and_nodes_that_give_nothing(tmp_path: Path) -> None:
    twice = [helper.make_node("MatMul", ["x", "w"], ["y"]), helper.make_node("MatMul", ["x", "w"], ["y"], name="again")]
    with pytest.raises(SourceError, match="The name 'y' is written twice, the second time by 'again'"):
        adopt_onnx(_save(tmp_path, twice), tmp_path / "out.onnx")
    nothing = [helper.make_node("MatMul", ["x", "w"], ["y"]), helper.make_node("Log", ["y"], [], domain="own.ops")]
    with pytest.raises(SourceError, match=r"operator own\.ops\.Log has no outputs"):
        adopt_onnx(_save(tmp_path, nothing), tmp_path / "out.onnx")
