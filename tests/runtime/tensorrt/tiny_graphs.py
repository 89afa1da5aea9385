"""Graphs of a few nodes, made by hand: floats, INT8 and FP8 with explicit Q/DQ nodes as TensorRT takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET, IR_VERSION = 20, 10
CLASSES, CHANNELS, SIDE, WIDTH = 5, 8, 8, 16


def _save(path: Path, name: str, nodes: Sequence[onnx.NodeProto], inputs: Any, outputs: Any, weights: Any) -> Path:
    graph = helper.make_graph(list(nodes), name, list(inputs), list(outputs), list(weights))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def _array(name: str, values: npt.NDArray[Any]) -> onnx.TensorProto:
    return numpy_helper.from_array(values, name)


def _images(batch: int | str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info("images", TensorProto.FLOAT, [batch, 3, SIDE, SIDE])


def _scores(batch: int | str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info("scores", TensorProto.FLOAT, [batch, CLASSES])


def _conv_weights(rng: np.random.Generator) -> dict[str, npt.NDArray[np.float32]]:
    return {
        "conv.weight": rng.standard_normal((CHANNELS, 3, 3, 3)).astype(np.float32),
        "conv.bias": rng.standard_normal(CHANNELS).astype(np.float32),
        "fc.weight": rng.standard_normal((CLASSES, CHANNELS)).astype(np.float32),
        "fc.bias": rng.standard_normal(CLASSES).astype(np.float32),
    }


def _network(conv_input: str, conv_weight: str, fc_input: str, fc_weight: str) -> list[onnx.NodeProto]:
    """A convolution, its ReLU, the mean over the image, and a linear layer; what lies between is the caller's."""
    return [
        helper.make_node("Conv", [conv_input, conv_weight, "conv.bias"], ["c"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"], name="relu"),
        helper.make_node("GlobalAveragePool", ["r"], ["p"], name="pool"),
        helper.make_node("Flatten", ["p"], ["f"], name="flatten"),
        helper.make_node("Gemm", [fc_input, fc_weight, "fc.bias"], ["scores"], name="fc", transB=1),
    ]


def float_graph(path: Path, batch: int | str = "batch") -> Path:
    """A small classifier of images in FP32."""
    weights = _conv_weights(np.random.default_rng(0))
    nodes = _network("images", "conv.weight", "f", "fc.weight")
    return _save(path, "float", nodes, [_images(batch)], [_scores(batch)], [_array(*w) for w in weights.items()])


def _pair(tensor: str, out: str) -> list[onnx.NodeProto]:
    """A QuantizeLinear and its DequantizeLinear."""
    return [
        helper.make_node("QuantizeLinear", [tensor, f"{out}.scale", f"{out}.zero"], [f"{out}.q"], name=f"{out}.Q"),
        helper.make_node("DequantizeLinear", [f"{out}.q", f"{out}.scale", f"{out}.zero"], [out], name=f"{out}.DQ"),
    ]


def int8_graph(path: Path, batch: int | str = "batch", *, zero_point: int = 0, half: bool = False) -> Path:
    """The same in symmetric INT8: weights by output channel, activations by tensor, bias in floats.

    What is not quantized is FP32, or FP16 between two casts: Turing has no product of matrices that gives FP32.
    """
    real = np.float16 if half else np.float32
    weights = _conv_weights(np.random.default_rng(0))
    stored: list[onnx.TensorProto] = []
    nodes: list[onnx.NodeProto] = []
    for name, values in weights.items():
        if name.endswith("bias"):
            stored.append(_array(name, values.astype(real)))
            continue
        scale = np.abs(values).reshape(len(values), -1).max(axis=1) / 127
        shape = (-1,) + (1,) * (values.ndim - 1)
        quantized = np.clip(np.rint(values / scale.reshape(shape)), -127, 127).astype(np.int8)
        stored += [
            _array(f"{name}.q", quantized),
            _array(f"{name}.scale", scale.astype(real)),
            _array(f"{name}.zero", np.zeros(len(values), np.int8)),
        ]
        parts = [f"{name}.q", f"{name}.scale", f"{name}.zero"]
        nodes.append(helper.make_node("DequantizeLinear", parts, [name], name=f"{name}.DQ", axis=0))
    for name, scale_value in (("x", 4 / 127), ("y", 12 / 127)):
        stored += [
            _array(f"{name}.scale", np.asarray(scale_value, real)),
            _array(f"{name}.zero", np.asarray(zero_point, np.int8)),
        ]
    conv, relu, pool, flatten, linear = _network("x", "conv.weight", "y", "fc.weight")
    first = "images"
    if half:
        first = "images.half"
        nodes.append(helper.make_node("Cast", ["images"], [first], name="down", to=TensorProto.FLOAT16))
        linear.output[0] = "scores.half"
    nodes += [*_pair(first, "x"), conv, relu, pool, flatten, *_pair("f", "y"), linear]
    if half:
        nodes.append(helper.make_node("Cast", ["scores.half"], ["scores"], name="up", to=TensorProto.FLOAT))
    return _save(path, "int8", nodes, [_images(batch)], [_scores(batch)], stored)


def fp8_graph(path: Path, batch: int | str = "batch") -> Path:
    """One matrix product in FP8 E4M3."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((WIDTH, WIDTH)).astype(np.float32)
    scale = np.abs(values).max() / 448
    zero = np.zeros((), ml_dtypes.float8_e4m3fn)
    stored = [
        _array("w.q", (values / scale).astype(ml_dtypes.float8_e4m3fn)),
        _array("w.scale", np.asarray(scale, np.float32)),
        _array("w.zero", zero),
        _array("x.scale", np.asarray(4 / 448, np.float32)),
        _array("x.zero", zero),
    ]
    nodes = [
        *_pair("rows", "x"),
        helper.make_node("DequantizeLinear", ["w.q", "w.scale", "w.zero"], ["w"], name="w.DQ"),
        helper.make_node("MatMul", ["x", "w"], ["out"], name="product"),
    ]
    rows = helper.make_tensor_value_info("rows", TensorProto.FLOAT, [batch, WIDTH])
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, [batch, WIDTH])
    return _save(path, "fp8", nodes, [rows], [out], stored)


def half_graph(path: Path, batch: int | str = "batch") -> Path:
    """The same product in FP16, with floats outside."""
    values = np.random.default_rng(0).standard_normal((WIDTH, WIDTH)).astype(np.float16)
    nodes = [
        helper.make_node("Cast", ["rows"], ["x"], name="down", to=TensorProto.FLOAT16),
        helper.make_node("MatMul", ["x", "w"], ["y"], name="product"),
        helper.make_node("Cast", ["y"], ["out"], name="up", to=TensorProto.FLOAT),
    ]
    rows = helper.make_tensor_value_info("rows", TensorProto.FLOAT, [batch, WIDTH])
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, [batch, WIDTH])
    return _save(path, "half", nodes, [rows], [out], [_array("w", values)])


def unsupported_graph(path: Path) -> Path:
    """A node that TensorRT lacks, in the middle."""
    nodes = [
        helper.make_node("Relu", ["rows"], ["a"], name="before"),
        helper.make_node("Det", ["a"], ["b"], name="the_determinant"),
        helper.make_node("Relu", ["b"], ["out"], name="after"),
    ]
    rows = helper.make_tensor_value_info("rows", TensorProto.FLOAT, [2, 4, 4])
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, [2])
    return _save(path, "unsupported", nodes, [rows], [out], [])


def external_graph(path: Path, location: str) -> Path:
    """The float classifier with its weights in a file of that name."""
    model = onnx.load(float_graph(path))
    onnx.save(model, path, save_as_external_data=True, location="weights.data", size_threshold=0)
    if location != "weights.data":
        data = onnx.load(path, load_external_data=False)
        for tensor in data.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = location
        path.write_bytes(data.SerializeToString())
    return path


def calls(batches: Sequence[int], seed: int = 0) -> list[dict[str, npt.NDArray[Any]]]:
    """Inputs of the classifier."""
    rng = np.random.default_rng(seed)
    return [{"images": rng.standard_normal((batch, 3, SIDE, SIDE)).astype(np.float32)} for batch in batches]


def write_tensor_bundle(folder: Path, graph: Path, **plan: Any) -> Path:
    """A bundle around the classifier, by default for TensorRT-RTX and the laptop."""
    from edgeq.bundle import describe_file, write_manifest
    from edgeq.tensor_types import AxisRange, TensorArtifact, TensorManifest, TensorPlan, TensorPrediction, TensorSpec
    from edgeq.types import Budget, ModelSource, Target

    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(graph.read_bytes())
    size = graph.stat().st_size
    chosen: Mapping[str, Any] = {
        "backend": "tensorrt-rtx",
        "scheme": "int8-static",
        "activations": "s8",
        "axes": {"batch": AxisRange(least=1, usual=2, most=4)},
        **plan,
    }
    manifest = TensorManifest(
        name=folder.name,
        source=ModelSource(id="tiny", path="tiny", format="onnx", architecture="onnx", n_params=300, dtype="f32"),
        artifact=TensorArtifact(
            architecture="onnx",
            task="image-classification",
            opset=OPSET,
            inputs=(TensorSpec(name="images", dtype="float32", shape=("batch", 3, SIDE, SIDE)),),
            outputs=(TensorSpec(name="scores", dtype="float32", shape=("batch", CLASSES)),),
        ),
        plan=TensorPlan(
            predicted=TensorPrediction(
                file_bytes=size, weights_bytes=size, activation_bytes=0, runtime_bytes=0, peak_memory_bytes=size
            ),
            **chosen,
        ),
        files=(describe_file(folder, "model.onnx", "model"),),
        budget=Budget(),
        built_for="laptop-rtx",
        target=Target(arch="x86_64", accelerator="cuda:sm_89"),
        tools={},
        created_utc="2026-01-01T00:00:00+00:00",
    )
    write_manifest(folder, manifest)
    return folder
