"""Graphs made fit to live on."""

from __future__ import annotations

import pytest

from edgeq.converters.onnx.export.tidy import names_kept, tidy
from edgeq.errors import ConversionError

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx_ir")

import onnx
import onnx_ir as ir


def _graph(text: str, opset: int = 20) -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(f'<ir_version: 13, opset_import: ["": {opset}, "own": 1]> {text}'))


@pytest.mark.parametrize(("opset", "ir_version"), [(17, 8), (18, 8), (20, 9), (21, 10), (23, 10)])
def test_the_ir_version_is_one_that_old_runtimes_read(opset: int, ir_version: int) -> None:
    model = _graph("g (float[2] x) => (float[2] y) { y = Relu(x) }", opset)
    tidy(model)
    assert model.ir_version == ir_version
    assert dict(model.graph.opset_imports) == {"": opset}


@pytest.mark.parametrize(
    ("size", "attributes", "operator"),
    [
        (7, "kernel_shape = [40, 40], strides = [40, 40], ceil_mode = 1", "GlobalAveragePool"),
        (7, "kernel_shape = [7, 7]", "GlobalAveragePool"),
        (7, "kernel_shape = [7, 7], pads = [1, 1, 0, 0], strides = [7, 7]", "AveragePool"),
        (7, "kernel_shape = [5, 5], strides = [5, 5]", "AveragePool"),
    ],
)
def test_windows_over_the_whole_image_become_global(size: int, attributes: str, operator: str) -> None:
    model = _graph(f"g (float[n,3,{size},{size}] x) => (float[n,3,1,1] y) {{ y = AveragePool <{attributes}> (x) }}")
    tidy(model)
    assert [node.op_type for node in model.graph] == [operator]


def test_what_torch_wrote_about_this_machine_goes() -> None:
    model = _graph("g (float[2] x) => (float[2] y) { y = Relu(x) }")
    (node,) = model.graph
    node.metadata_props["pkg.torch.onnx.stack_trace"] = "File /home/somebody/model.py"
    node.metadata_props["pkg.torch.onnx.name_scopes"] = "['', 'model', 'model.head', 'relu']"
    node.outputs[0].metadata_props["pkg.torch"] = "somebody"
    tidy(model)
    assert b"somebody" not in ir.to_proto(model).SerializeToString()
    assert node.name == "head/Relu"


def test_names_are_unique_and_open_axes_have_one() -> None:
    model = _graph("g (float[2] x) => (float[?] y) { a = Relu(x) b = Relu(a) y = Relu(b) }")
    tidy(model)
    assert [node.name for node in model.graph] == ["Relu", "Relu_1", "Relu_2"]
    shape = model.graph.outputs[0].shape
    assert shape is not None
    assert str(shape[0]) == "y_axis_0"


def test_an_optimizer_that_renames_inputs_is_refused() -> None:
    model = _graph("g (float[2] x) => (float[2] y) { y = Relu(x) }")
    with pytest.raises(ConversionError, match="made 'other' of its input or output 'x'"), names_kept(model):
        model.graph.inputs[0].name = "other"
