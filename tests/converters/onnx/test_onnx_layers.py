"""Layers of a quantized model against the float one's, and their picture."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeq.converters.onnx.layer_picture import draw_layers
from edgeq.converters.onnx.layers import LayerError, compare_layers, worst_layers
from edgeq.errors import ConversionError, UsageError

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

Feeds = dict[str, NDArray[np.float32]]
LAYERS = ["c1", "r1", "c2", "sum", "r2", "pool", "logits"]


class MakeNetwork(Protocol):
    def __call__(self, *, name: str = "model", external: bool = False, extra: Any = ()) -> Path: ...


def changed(path: Path, weight: str, amount: float) -> Path:
    model = onnx.load(path)
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == weight)
    values = onnx.numpy_helper.to_array(tensor)
    noise = np.random.default_rng(3).standard_normal(values.shape).astype(np.float32)
    tensor.CopyFrom(onnx.numpy_helper.from_array(values + np.float32(amount) * noise, weight))
    other = path.with_name(f"changed_{weight}.onnx")
    onnx.save(model, other)
    return other


def quantized(path: Path, images: list[Feeds], **more: Any) -> Path:
    """As onnxruntime quantizes it: QDQ, per tensor."""
    quantization = pytest.importorskip("onnxruntime.quantization")

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self.left = list(images)

        def get_next(self) -> Feeds | None:
            return self.left.pop() if self.left else None

    other = path.with_name("quantized.onnx")
    quantization.quantize_static(path, other, Reader(), quant_format=quantization.QuantFormat.QDQ, **more)
    return other


def tensors(path: Path, names: list[str], images: list[Feeds]) -> list[dict[str, NDArray[np.float64]]]:
    model = onnx.load(path)
    outputs = {value.name for value in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in outputs)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [
        {name: value.astype(np.float64) for name, value in zip(names, session.run(names, feeds), strict=True)}
        for feeds in images
    ]


def noise(reference: list[Any], candidate: list[Any]) -> float:
    error = sum(float(((x - y) ** 2).sum()) for x, y in zip(reference, candidate, strict=True))
    return error / sum(float((x**2).sum()) for x in reference)


def test_the_layer_with_other_weights_is_found(make_network: MakeNetwork, images: list[Feeds]) -> None:
    path = make_network()
    other = changed(path, "w2", 0.05)
    layers = compare_layers(path, other, iter(images))
    assert [layer.name for layer in layers] == LAYERS
    by_name = {layer.name: layer for layer in layers}
    # Layers before have no error at all, those after carry it but add none.
    assert by_name["c1"].noise < 1e-12
    assert by_name["r1"].noise < 1e-12
    assert worst_layers(layers)[0].name == "c2"
    assert by_name["c2"].alone == by_name["c2"].noise > 1e-5
    assert all(by_name[name].alone < 1e-10 for name in LAYERS if name != "c2")
    assert all(by_name[name].noise > 1e-6 for name in ("sum", "r2", "pool", "logits"))
    assert (by_name["c2"].node, by_name["c2"].op_type, by_name["c2"].quantized) == ("node_c2", "Conv", False)
    # Accumulated errors are those of the whole models side by side.
    ours, theirs = tensors(other, LAYERS, images), tensors(path, LAYERS, images)
    for name in LAYERS[2:]:
        expected = noise([call[name] for call in theirs], [call[name] for call in ours])
        assert by_name[name].noise == pytest.approx(expected, rel=1e-3)
        assert by_name[name].sqnr_db == pytest.approx(-10 * math.log10(expected), abs=0.01)
        assert by_name[name].max_error > 0
        assert by_name[name].cosine < 1


def test_layers_of_a_quantized_model(make_network: MakeNetwork, images: list[Feeds]) -> None:
    path = make_network()
    other = quantized(path, images)
    told: list[Any] = []
    layers = compare_layers(path, other, images, progress=lambda *some: told.append(some))
    assert told[-1] == (4, 4, "Comparing layers")
    by_name = {layer.name: layer for layer in layers}
    # The quantizer folded the ReLUs' predecessors or not; what both graphs have is compared.
    assert {"r1", "c2", "r2", "pool", "logits"} <= by_name.keys()
    assert by_name["c2"].quantized
    assert all((layer.sqnr_db or 99) > 15 for layer in layers)
    # The output of the whole graph has the error of its last layer.
    expected = [call["logits"] for call in tensors(path, ["logits"], images)]
    found = [call["logits"] for call in tensors(other, ["logits"], images)]
    assert by_name["logits"].noise == pytest.approx(noise(expected, found), rel=0.3)
    # Errors add up: the last one is larger than that of the last layer alone.
    assert by_name["logits"].noise > by_name["logits"].alone > 0


def test_a_layer_in_too_few_bits_stands_out(make_network: MakeNetwork, images: list[Feeds]) -> None:
    """Ranges of one tensor ten times too wide, as bad calibration makes them."""
    path = make_network()
    other = quantized(path, images)
    model = onnx.load(other)
    (quantize,) = (n for n in model.graph.node if n.op_type == "QuantizeLinear" and n.input[0] == "c2")
    (scale,) = (t for t in model.graph.initializer if t.name == quantize.input[1])
    scale.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(scale) * np.float32(20), scale.name))
    onnx.save(model, other)
    layers = compare_layers(path, other, images)
    assert worst_layers(layers, 1)[0].name == "c2"
    assert worst_layers(layers, 1)[0].alone > 20 * sorted(layer.alone for layer in layers)[-2]


def test_a_relu_that_the_grid_takes_over_is_part_of_the_layer(make_network: MakeNetwork, images: list[Feeds]) -> None:
    path = make_network()
    model = onnx.load(path)
    top = max(float(call["r1"].max()) for call in tensors(path, ["r1"], images))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(top / 255, np.float32), "scale"))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(0, np.uint8), "zero"))
    nodes = [node for node in model.graph.node if node.output[0] != "r1"]
    for node in nodes:
        node.input[:] = ["r1_read" if name == "r1" else name for name in node.input]
    nodes.insert(1, onnx.helper.make_node("QuantizeLinear", ["c1", "scale", "zero"], ["r1_integers"]))
    nodes.insert(2, onnx.helper.make_node("DequantizeLinear", ["r1_integers", "scale", "zero"], ["r1_read"]))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    other = path.with_name("folded.onnx")
    onnx.save(model, other)
    layers = compare_layers(path, other, images)
    assert [layer.name for layer in layers] == ["r1", "c2", "sum", "r2", "pool", "logits"]
    first = layers[0]
    assert (first.node, first.op_type, first.quantized) == ("node_c1", "Conv", False)
    found = [call["r1_read"] for call in tensors(other, ["r1_read"], images)]
    expected = [call["r1"] for call in tensors(path, ["r1"], images)]
    assert first.noise == pytest.approx(noise(expected, found), rel=1e-3)
    # All error comes from there.
    assert first.alone == first.noise > 1e-6
    assert max(layer.alone for layer in layers[1:]) < 1e-10
    assert min(layer.noise for layer in layers[1:]) > 1e-9


def test_a_layer_whose_result_is_rounded_computes_in_floats(tmp_path: Path) -> None:
    """A bias is added by the integer product, Tanh is rounded for the next one, and that reads integers."""
    helper, rng = onnx.helper, np.random.default_rng(0)
    weights = {name: rng.integers(-127, 128, (8, 8), np.int8) for name in ("w1", "w2")}
    step, bias = np.array(0.01, np.float32), rng.standard_normal(8).astype(np.float32)
    floats = {name: step * values.astype(np.float32) for name, values in weights.items()}
    plain = [
        helper.make_node("MatMul", ["x", "w1"], ["m"], name="first"),
        helper.make_node("Add", ["m", "b"], ["a"], name="bias"),
        helper.make_node("Tanh", ["a"], ["t"]),
        helper.make_node("MatMul", ["t", "w2"], ["y"]),
    ]
    fused = ["x_integers", "w1", "step", "step", "zero", "weight_zero", "b"]
    integers = [
        helper.make_node("QuantizeLinear", ["x", "step", "zero"], ["x_integers"]),
        helper.make_node("MatMulIntegerToFloat", fused, ["a"], domain="com.microsoft"),
        helper.make_node("Tanh", ["a"], ["t"]),
        helper.make_node("QuantizeLinear", ["t", "step", "zero"], ["t_integers"]),
        helper.make_node("DequantizeLinear", ["t_integers", "step", "zero"], ["t_read"]),
        helper.make_node("DequantizeLinear", ["w2", "step", "weight_zero"], ["w2_read"]),
        helper.make_node("MatMul", ["t_read", "w2_read"], ["y"]),
    ]
    zeros = {"step": step, "zero": np.array(128, np.uint8), "weight_zero": np.array(0, np.int8)}
    models: dict[str, tuple[Any, dict[str, Any]]] = {
        "plain": (plain, {**floats, "b": bias}),
        "integers": (integers, {**weights, **zeros, "b": bias}),
    }
    for name, (nodes, values) in models.items():
        ends = [[helper.make_tensor_value_info(end, 1, [4, 8])] for end in ("x", "y")]
        given = [onnx.numpy_helper.from_array(value, key) for key, value in values.items()]
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
        graph = helper.make_graph(nodes, name, *ends, given)
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / f"{name}.onnx")
    feeds = {"x": rng.uniform(-1, 1, (4, 8)).astype(np.float32)}
    layers = compare_layers(tmp_path / "plain.onnx", tmp_path / "integers.onnx", [feeds])
    found = [(layer.name, layer.op_type, layer.quantized) for layer in layers]
    assert found == [("a", "MatMul", True), ("t", "Tanh", False), ("y", "MatMul", True)]
    assert layers[0].node == "first"


def test_half_precision_is_compared_in_its_own_type(make_network: MakeNetwork, images: list[Feeds]) -> None:
    path = make_network()
    model = onnx.load(path)
    half = 10
    for tensor in model.graph.initializer:
        tensor.CopyFrom(
            onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor).astype(np.float16), tensor.name)
        )
    nodes = list(model.graph.node)
    del model.graph.node[:]
    nodes[0].input[0] = "half"
    nodes[-1].output[0] = "half_logits"
    casts = [
        onnx.helper.make_node("Cast", ["image"], ["half"], to=half),
        onnx.helper.make_node("Cast", ["half_logits"], ["logits"], to=1),
    ]
    model.graph.node.extend([casts[0], *nodes, casts[1]])
    other = path.with_name("half.onnx")
    onnx.save(model, other)
    layers = compare_layers(path, other, images)
    assert [layer.name for layer in layers] == LAYERS
    assert all(0 < layer.noise < 1e-5 for layer in layers)


def test_models_without_anything_in_common_are_refused(
    make_network: MakeNetwork, images: list[Feeds], tmp_path: Path
) -> None:
    path = make_network()
    model = onnx.load(path)
    for node in model.graph.node:
        node.input[:] = [name if name[0] in "iwb" else f"{name}_new" for name in node.input]
        node.output[:] = [f"{name}_new" for name in node.output]
    model.graph.output[0].name = "logits_new"
    onnx.save(model, tmp_path / "renamed.onnx")
    with pytest.raises(ConversionError, match="no tensor in common"):
        compare_layers(path, tmp_path / "renamed.onnx", images)
    with pytest.raises(UsageError, match="No inputs"):
        compare_layers(path, path, [])
    with pytest.raises(ConversionError, match="'c2' of the quantized model holds NaN"):
        compare_layers(path, changed(path, "w2", math.nan), images)


def layer(number: int, alone: float, accumulated: float) -> LayerError:
    name = f"model.encoder.layers.{number // 8}.attention.self.projection_{number}"
    return LayerError(
        name=name,
        node=name,
        op_type="MatMul",
        quantized=True,
        cosine=0.999,
        noise=accumulated,
        alone=alone,
        max_error=0.1,
    )


def texts(svg: bytes) -> list[str]:
    return re.findall(r">([^<>]+)</text>", svg.decode())


@pytest.mark.parametrize("count", [1, 30, 300])
def test_pictures_name_the_worst_layers(count: int) -> None:
    pytest.importorskip("matplotlib")
    rng = np.random.default_rng(0)
    alone = 10 ** rng.uniform(-6, -4, count)
    alone[count // 2] = 0.01
    layers = [layer(n, a, float(t)) for n, (a, t) in enumerate(zip(alone.tolist(), np.cumsum(alone), strict=True))]
    picture = draw_layers(layers, "a model on a laptop", ".svg")
    written = texts(picture)
    assert "a model on a laptop" in written
    assert any(text.startswith("1  ") and text.endswith(f"projection_{count // 2}") for text in written)
    assert f"MatMul, layer {count // 2 + 1}: 10 %" in written
    assert sum(1 for text in written if re.fullmatch(r"[1-8]  .*", text)) == min(count, 8)
    assert any(text.startswith("last layer: ") for text in written)
    if count == 30:
        assert picture == draw_layers(layers, "a model on a laptop", ".svg")
        assert draw_layers(layers, "a model on a laptop", ".png").startswith(b"\x89PNG")


def test_a_model_without_error_has_a_picture_too() -> None:
    pytest.importorskip("matplotlib")
    written = texts(draw_layers([layer(n, 0.0, 0.0) for n in range(4)], "the same", ".svg"))
    assert any("no error" in text for text in written)


def test_pictures_that_cannot_be_are_refused() -> None:
    with pytest.raises(UsageError, match="no kind of picture"):
        draw_layers([layer(0, 0.1, 0.1)], "t", ".bmp")
    with pytest.raises(UsageError, match="no layers"):
        draw_layers([], "t", ".svg")
