"""Outputs of two models against each other: figures by numpy, decisions, detections, a user's metric, bad input."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeq.converters.onnx.compare import Agreement, CandidateError, Derived, compare_outputs
from edgeq.errors import ConversionError, SessionError, UsageError

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

Feeds = dict[str, NDArray[np.float32]]


class MakeNetwork(Protocol):
    def __call__(self, *, name: str = "model", external: bool = False, extra: Any = ()) -> Path: ...


def disturbed(path: Path, amount: float, name: str = "w3") -> Path:
    """The network with noise on one of its weights."""
    model = onnx.load(path)
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
    values = onnx.numpy_helper.to_array(tensor)
    noise = np.random.default_rng(5).standard_normal(values.shape).astype(np.float32)
    tensor.CopyFrom(onnx.numpy_helper.from_array(values + np.float32(amount) * noise, name))
    other = path.with_name("disturbed.onnx")
    onnx.save(model, other)
    return other


def outputs(path: Path, images: list[Feeds]) -> list[NDArray[np.float64]]:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return [session.run(["logits"], feeds)[0].astype(np.float64) for feeds in images]


def test_figures_are_numpys(make_network: MakeNetwork, images: list[Feeds]) -> None:
    path = make_network()
    other = disturbed(path, 0.05)
    found = compare_outputs(path, other, iter(images), task="image-classification")
    ours, theirs = outputs(other, images), outputs(path, images)
    cosines = [float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)) for a, b in zip(ours, theirs, strict=True)]
    x, y = np.concatenate(theirs), np.concatenate(ours)
    (quality,) = found.outputs
    assert quality.name == "logits"
    assert quality.mean_cosine == pytest.approx(np.mean(cosines), rel=1e-5)
    assert quality.min_cosine == pytest.approx(min(cosines), rel=1e-5)
    assert quality.sqnr_db == pytest.approx(10 * math.log10((x**2).sum() / ((x - y) ** 2).sum()), abs=0.01)
    assert quality.max_error == pytest.approx(np.abs(x - y).max(), rel=1e-4)
    assert found.top1 == np.mean(x.argmax(axis=1) == y.argmax(axis=1))
    assert (found.inputs, found.metric, found.detection_map) == (4, None, None)
    record = found.quality("noise")
    assert (record.outputs, record.top1, record.source) == (found.outputs, found.top1, "noise")
    assert len(record.sha256) == 64


def test_a_model_is_like_itself(make_network: MakeNetwork, images: list[Feeds]) -> None:
    path = make_network()
    told: list[Any] = []
    found = compare_outputs(path, path, images, task="image-classification", progress=lambda *some: told.append(some))
    assert found.outputs[0].sqnr_db is None
    assert found.outputs[0].min_cosine == pytest.approx(1.0)
    assert (found.outputs[0].max_error, found.top1) == (0.0, 1.0)
    assert told[-1] == (4, 4, "Comparing with the float model")
    # Without classes nothing is decided, and the hash names the inputs.
    again = compare_outputs(path, path, images)
    assert again.top1 is None
    assert again.sha256 == found.sha256 != compare_outputs(path, path, images[1:]).sha256


def test_a_metric_sees_both_models(make_network: MakeNetwork, images: list[Feeds]) -> None:
    path = make_network()
    other = disturbed(path, 0.5)
    labels = [array.argmax(axis=1) for array in outputs(path, images)]

    def accuracy(index: int, inputs: Mapping[str, Any], made: Mapping[str, Any]) -> float:
        assert inputs["image"] is images[index]["image"]
        return float(np.mean(made["logits"].argmax(axis=1) == labels[index]))

    found = compare_outputs(path, other, images, metric=accuracy)
    assert found.metric is not None
    assert found.metric[1] == 1.0
    assert found.metric[0] == np.mean(
        [np.mean(a.argmax(axis=1) == b) for a, b in zip(outputs(other, images), labels, strict=True)]
    )


def test_a_metric_that_fails_is_named(make_network: MakeNetwork, images: list[Feeds]) -> None:
    path = make_network()

    def broken(index: int, inputs: Any, made: Any) -> float:
        return 1 / (1 - index)

    with pytest.raises(ConversionError, match="metric broken failed on input 1: ZeroDivisionError"):
        compare_outputs(path, path, images, metric=broken)
    with pytest.raises(ConversionError, match="gave nan on input 0"):
        compare_outputs(path, path, images, metric=lambda *_: math.nan)


def token_model(path: Path, scale: float) -> Path:
    """ids (n, s), attention_mask (n, s) -> logits (n, s, 2), which say whether an id times a scale is above 10."""
    info = onnx.helper.make_tensor_value_info
    weights = [
        onnx.numpy_helper.from_array(np.array([[-scale, scale]], np.float32), "w"),
        onnx.numpy_helper.from_array(np.array([10, -10], np.float32), "b"),
        onnx.numpy_helper.from_array(np.array([-1]), "last"),
    ]
    nodes = [
        onnx.helper.make_node("Mul", ["ids", "attention_mask"], ["kept"]),
        onnx.helper.make_node("Sub", ["ids", "kept"], ["rest"]),
        onnx.helper.make_node("Add", ["kept", "rest"], ["all"]),
        onnx.helper.make_node("Unsqueeze", ["all", "last"], ["column"]),
        onnx.helper.make_node("MatMul", ["column", "w"], ["product"]),
        onnx.helper.make_node("Add", ["product", "b"], ["logits"]),
    ]
    inputs = [info("ids", 1, ["n", "s"]), info("attention_mask", 1, ["n", "s"])]
    graph = onnx.helper.make_graph(nodes, "tokens", inputs, [info("logits", 1, ["n", "s", 2])], weights)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def test_padding_decides_nothing(tmp_path: Path) -> None:
    one, other = token_model(tmp_path / "one.onnx", 1.0), token_model(tmp_path / "other.onnx", 0.5)
    feeds = {
        "ids": np.array([[5, 15, 25, 15, 15]], np.float32),  # 15 is above 10, half of it is not
        "attention_mask": np.array([[1, 1, 1, 0, 0]], np.float32),
    }
    found = compare_outputs(one, other, [feeds], task="token-classification")
    assert found.top1 == pytest.approx(2 / 3)


def detector(path: Path, shift: float) -> Path:
    """pixels (n, 2, 3) -> the same as logits of two classes and nothing, and two boxes."""
    info = onnx.helper.make_tensor_value_info
    boxes = np.array([[[0.3, 0.3, 0.2, 0.2], [0.7, 0.7, 0.2, 0.2]]], np.float32)
    boxes[..., 0] += shift
    nodes = [
        onnx.helper.make_node("Identity", ["pixels"], ["logits"]),
        onnx.helper.make_node("ReduceMax", ["pixels", "axes"], ["top"], keepdims=1),
        onnx.helper.make_node("Sub", ["top", "top"], ["zero"]),
        onnx.helper.make_node("Add", ["zero", "boxes"], ["pred_boxes"]),
    ]
    weights = [onnx.numpy_helper.from_array(boxes, "boxes"), onnx.numpy_helper.from_array(np.array([2]), "axes")]
    outs = [info("logits", 1, ["n", 2, 3]), info("pred_boxes", 1, ["n", 2, 4])]
    graph = onnx.helper.make_graph(nodes, "detector", [info("pixels", 1, ["n", 2, 3])], outs, weights)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def test_detections_are_compared_with_the_float_models(tmp_path: Path) -> None:
    one = detector(tmp_path / "one.onnx", 0.0)
    pixels = np.array([[[5, 0, 0], [0, 5, 0]], [[5, 0, 0], [0, 0, 5]]], np.float32)
    inputs = [{"pixels": pixels}]
    same = compare_outputs(one, one, inputs, task="object-detection", classes=2)
    assert same.detection_map == 1.0
    # A shift by half of the width leaves an overlap of a third, which is none.
    away = compare_outputs(one, detector(tmp_path / "two.onnx", 0.1), inputs, task="object-detection", classes=2)
    assert away.detection_map == 0.0
    with pytest.raises(UsageError, match="number of classes"):
        compare_outputs(one, one, inputs, task="object-detection")


def test_detectors_with_other_outputs_are_refused(make_network: MakeNetwork, images: list[Feeds]) -> None:
    path = make_network()
    with pytest.raises(ConversionError, match="outputs logits is not known"):
        compare_outputs(path, path, images, task="object-detection", classes=9)


def test_models_that_do_not_match_are_refused(make_network: MakeNetwork, images: list[Feeds], tmp_path: Path) -> None:
    path = make_network()
    model = onnx.load(path)
    model.graph.output[0].name = "pool"
    del model.graph.output[0].type.tensor_type.shape.dim[:]
    model.graph.output[0].type.tensor_type.ClearField("shape")
    onnx.save(model, tmp_path / "pool.onnx")
    with pytest.raises(ConversionError, match="has not the float model's output 'logits'"):
        compare_outputs(path, tmp_path / "pool.onnx", images)
    with pytest.raises(ConversionError, match="has the inputs"):
        compare_outputs(path, token_model(tmp_path / "tokens.onnx", 1.0), images)
    with pytest.raises(UsageError, match="No inputs"):
        compare_outputs(path, path, [])
    with pytest.raises(
        ConversionError, match="'logits' of the quantized model holds NaN or infinite numbers on input 0"
    ):
        compare_outputs(path, disturbed(path, math.nan), images)


def test_sums_of_odd_arrays() -> None:
    zero = Agreement()
    zero.update(np.zeros(3), np.zeros(3))
    assert (zero.mean_cosine, zero.sqnr_db, zero.noise) == (1.0, None, 0.0)
    zero.update(np.zeros(3), np.ones(3))
    assert zero.min_cosine == 0.0
    assert zero.sqnr_db is not None
    assert zero.sqnr_db < -1000
    masked = Agreement()
    masked.update(np.array([1.0, -np.inf]), np.array([1.0, -3e38]))
    assert masked.max_error == 0.0
    integers = Agreement()
    integers.update(np.array([1, 2]), np.array([1, 3]))
    assert integers.max_error == 1.0
    with pytest.raises(ValueError, match="shape"):
        integers.update(np.zeros(2), np.zeros(3))


def classes_of(path: Path, shape: list[int | str], weight: float) -> Path:
    """x of a shape -> x times weights that grow along the second axis, as logits."""
    info = onnx.helper.make_tensor_value_info
    factors = np.linspace(1, weight, int(shape[1]), dtype=np.float32).reshape(-1, *[1] * (len(shape) - 2))
    nodes = [onnx.helper.make_node("Mul", ["x", "factors"], ["logits"])]
    weights = [onnx.numpy_helper.from_array(factors, "factors")]
    graph = onnx.helper.make_graph(nodes, "g", [info("x", 1, shape)], [info("logits", 1, shape)], weights)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10), path)
    return path


@pytest.mark.parametrize("task", ["image-segmentation", "semantic-segmentation"])
def test_classes_of_pixels_and_of_queries(tmp_path: Path, task: str) -> None:
    """Pixels have them in the second axis, queries in the last one: factors along the second axis change no query."""
    rng = np.random.default_rng(0)
    for shape, same in (([1, 3, 8, 8], False), ([1, 6, 4], True)):
        one, other = (classes_of(tmp_path / f"{w}.onnx", list(shape), w) for w in (1.0, 3.0))
        inputs = [{"x": rng.random(shape, np.float32)}]
        found = compare_outputs(one, other, inputs, task=task)
        assert (found.top1 == 1.0) == same


def test_derived_arrays_are_compared_after_the_outputs(make_network: MakeNetwork, images: list[Feeds]) -> None:
    path = make_network()
    signs: dict[str, Derived] = {"sign": lambda _, made: made["logits"] > np.float32(0)}
    found = compare_outputs(path, disturbed(path, 0.5), images, derived=signs)
    assert [output.name for output in found.outputs] == ["logits", "sign"]
    assert found.outputs[0].mean_cosine != found.outputs[1].mean_cosine


def test_what_a_candidate_is_to_blame_for(make_network: MakeNetwork, images: list[Feeds], tmp_path: Path) -> None:
    path = make_network()
    model = onnx.load(path)
    model.graph.node[0].domain = "com.microsoft"
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, tmp_path / "unknown.onnx")
    with pytest.raises(CandidateError, match=r"cannot load .*unknown\.onnx"):
        compare_outputs(path, tmp_path / "unknown.onnx", images)
    with pytest.raises(SessionError):
        compare_outputs(tmp_path / "unknown.onnx", path, images)
