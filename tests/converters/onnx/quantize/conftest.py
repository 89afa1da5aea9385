"""Tiny models of the architectures that are quantized, with random weights."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

Feeds = dict[str, NDArray[Any]]


def _bert() -> tuple[Any, dict[str, Any]]:
    import torch

    tf = pytest.importorskip("transformers")

    config = tf.BertConfig(
        vocab_size=400,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=64,
        attn_implementation="eager",
    )
    ids = torch.randint(0, 400, (1, 24))
    return tf.BertModel(config, add_pooling_layer=False), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _vit() -> tuple[Any, dict[str, Any]]:
    import torch

    tf = pytest.importorskip("transformers")

    config = tf.ViTConfig(
        image_size=32,
        patch_size=8,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        attn_implementation="eager",
    )
    return tf.ViTModel(config, add_pooling_layer=False), {"pixel_values": torch.randn(1, 3, 32, 32)}


def _resnet() -> tuple[Any, dict[str, Any]]:
    import torch

    tf = pytest.importorskip("transformers")

    config = tf.ResNetConfig(embedding_size=16, hidden_sizes=[32, 64], depths=[2, 2], num_labels=10)
    return tf.ResNetForImageClassification(config), {"pixel_values": torch.randn(1, 3, 64, 64)}


def _mobilenet() -> tuple[Any, dict[str, Any]]:
    import torch

    tf = pytest.importorskip("transformers")

    config = tf.MobileNetV2Config(depth_multiplier=0.5, image_size=64, num_labels=10)
    return tf.MobileNetV2ForImageClassification(config), {"pixel_values": torch.randn(1, 3, 64, 64)}


def _efficientnet() -> tuple[Any, dict[str, Any]]:
    import torch

    tf = pytest.importorskip("transformers")

    config = tf.EfficientNetConfig(
        image_size=64,
        width_coefficient=0.5,
        depth_coefficient=0.3,
        hidden_dim=640,
        num_labels=10,
    )
    return tf.EfficientNetForImageClassification(config), {"pixel_values": torch.randn(1, 3, 64, 64)}


_MAKERS = {
    "bert": _bert,
    "vit": _vit,
    "resnet": _resnet,
    "mobilenet": _mobilenet,
    "efficientnet": _efficientnet,
}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function from an architecture's name to its exported model; each is exported once."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    pytest.importorskip("onnxscript")
    folder = tmp_path_factory.mktemp("tiny")

    def export(name: str) -> Path:
        path = folder / f"{name}.onnx"
        if path.exists():
            return path
        torch.manual_seed(0)
        model, inputs = _MAKERS[name]()
        _settle(model, inputs)

        class First(torch.nn.Module):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def forward(self, **given: Any) -> Any:
                return self.model(**given)[0]

        with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
            program = torch.onnx.export(
                First().eval(), (), kwargs=inputs, dynamo=True, opset_version=20, external_data=False, verbose=False
            )
        program.save(str(path))
        return path

    return export


def _settle(model: Any, inputs: Mapping[str, Any]) -> None:
    """Give normalizations the statistics of some inputs, as training would: activations neither die nor grow."""
    import torch

    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
            torch.nn.init.ones_(module.weight)  # some of transformers' initializations let activations die out
        if isinstance(module, torch.nn.Conv2d) and "pixel_values" in inputs:
            torch.nn.init.kaiming_normal_(module.weight)
    with torch.no_grad():
        if "pixel_values" in inputs:
            for _ in range(2):
                model(pixel_values=torch.randn(8, *inputs["pixel_values"].shape[1:]))
    model.eval()


@pytest.fixture(scope="session")
def make_feeds() -> Callable[..., Feeds]:
    """A function from a model and a seed to inputs."""
    import onnxruntime as ort

    def make(path: Path, seed: int = 0) -> Feeds:
        rng = np.random.default_rng(seed)
        feeds: Feeds = {}
        session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        for given in session.get_inputs():
            shape = [axis if isinstance(axis, int) else 24 for axis in given.shape]
            if "float" in given.type:
                feeds[given.name] = rng.standard_normal(shape).astype(np.float32)
            elif "mask" in given.name:
                feeds[given.name] = np.ones(shape, np.int64)
            else:
                feeds[given.name] = rng.integers(0, 400, shape)
        return feeds

    return make


@pytest.fixture(scope="session")
def run_model() -> Callable[..., NDArray[Any]]:
    """A function that runs a model and gives its first output."""
    import onnxruntime as ort

    def run(path: Path, feeds: Feeds, *, plain: bool = False, signed: bool = False) -> NDArray[Any]:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        if plain:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        if signed:
            options.add_session_config_entry("session.qdqisint8allowed", "1")
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return np.asarray(session.run(None, feeds)[0])

    return run


@pytest.fixture(scope="session")
def find_ranges(make_feeds: Callable[..., Feeds]) -> Callable[..., dict[str, Any]]:
    """A function from a model and names of its values to their least and largest elements over a few inputs."""
    from edgeq.converters.onnx.calibration.ranges import Range
    from edgeq.converters.onnx.quantize.graph import open_editor, save_model

    def find(path: Path, tensors: Sequence[str], count: int = 4) -> dict[str, Any]:
        import onnxruntime as ort

        editor = open_editor(path)
        values = {value.name: value for node in editor.graph for value in node.outputs}
        inputs = {value.name for value in editor.graph.inputs}
        leaving = {value.name for value in editor.graph.outputs}
        wanted = [name for name in tensors if name not in inputs]
        editor.graph.outputs.extend(values[name] for name in wanted if name not in leaving)
        watched = path.with_name(f"{path.stem}.watched.onnx")
        save_model(editor, watched)
        session = ort.InferenceSession(str(watched), providers=["CPUExecutionProvider"])
        found: dict[str, Any] = {}
        for seed in range(count):
            feeds = make_feeds(path, seed)
            arrays = dict(zip(wanted, map(np.asarray, session.run(wanted, feeds)), strict=True)) | feeds
            for name in tensors:
                low, high = float(arrays[name].min()), float(arrays[name].max())
                before = found.get(name)
                found[name] = Range(low, high) if before is None else before.union(Range(low, high))
        watched.unlink()
        return found

    return find


@pytest.fixture(scope="session")
def cosine() -> Callable[[NDArray[Any], NDArray[Any]], float]:
    """A function of two arrays."""

    def of(a: NDArray[Any], b: NDArray[Any]) -> float:
        x, y = a.ravel().astype(np.float64), b.ravel().astype(np.float64)
        return float(x @ y / max(np.linalg.norm(x) * np.linalg.norm(y), 1e-30))

    return of
