"""Small graphs, and bundles around them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest

from edgeq.bundle import describe_file, write_manifest
from edgeq.tensor_types import (
    AxisRange,
    Embedding,
    TensorArtifact,
    TensorManifest,
    TensorPlan,
    TensorPrediction,
    TensorSpec,
)
from edgeq.types import Budget, ModelSource, Target

Shape = tuple[int | str, ...]
WIDTH = 8


class MakeTensorBundle(Protocol):
    """The signature of the ``make_tensor_bundle`` fixture."""

    def __call__(
        self,
        model: Path,
        *,
        plan: dict[str, Any] | None = None,
        embedding: Embedding | None = None,
        tokenizer: Path | None = None,
        outputs: Sequence[TensorSpec] | None = None,
    ) -> Path:
        """Make a bundle around an ONNX file."""
        ...


@pytest.fixture(scope="session")
def linear_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``y = x @ w + b`` and ``mean = mean of y over the last axis``; x is float32 of (batch, 8)."""
    onnx = pytest.importorskip("onnx")
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((WIDTH, 4)), "b": rng.standard_normal(4), "last": np.array([-1])}
    helper, float32 = onnx.helper, onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["xw"]),
            helper.make_node("Add", ["xw", "b"], ["y"]),
            helper.make_node("ReduceMean", ["y", "last"], ["mean"], keepdims=0),
        ],
        "linear",
        [helper.make_tensor_value_info("x", float32, ["batch", WIDTH])],
        [
            helper.make_tensor_value_info("y", float32, ["batch", 4]),
            helper.make_tensor_value_info("mean", float32, ["batch"]),
        ],
        [
            onnx.numpy_helper.from_array(value.astype(np.int64 if name == "last" else np.float32), name)
            for name, value in weights.items()
        ],
    )
    path = tmp_path_factory.mktemp("linear") / "model.onnx"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, path)
    return path


def linear(path: Path, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """What ``y`` of `linear_onnx` is."""
    import onnx

    weights = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    y: np.ndarray[Any, Any] = x @ weights["w"] + weights["b"]
    return y


@pytest.fixture
def make_tensor_bundle(tmp_path: Path) -> MakeTensorBundle:
    """``make_tensor_bundle(path, plan={"threads": 1})``: the folder of a bundle."""

    def make(
        model: Path,
        *,
        plan: dict[str, Any] | None = None,
        embedding: Embedding | None = None,
        tokenizer: Path | None = None,
        outputs: Sequence[TensorSpec] | None = None,
    ) -> Path:
        import onnxruntime

        from edgeq.runtime.tensor.graph import read_specs

        folder = tmp_path / f"bundle-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        shutil.copy(model, folder / "model.onnx")
        files = [describe_file(folder, "model.onnx", "model")]
        if tokenizer is not None:
            for name in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(tokenizer / name, folder / name)
            files.append(describe_file(folder, "tokenizer.json", "tokenizer"))
            files.append(describe_file(folder, "tokenizer_config.json", "tokenizer-config"))
        session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        zeros = dict.fromkeys(
            ("file_bytes", "weights_bytes", "activation_bytes", "runtime_bytes", "peak_memory_bytes"), 0
        )
        settings: dict[str, Any] = {"backend": "onnxruntime-cpu", "scheme": "fp32", "threads": 1, **(plan or {})}
        manifest = TensorManifest(
            name="linear",
            source=ModelSource(id="linear", path=".", format="onnx", architecture="onnx", n_params=36, dtype="f32"),
            artifact=TensorArtifact(
                architecture="onnx",
                task="tensor",
                opset=20,
                inputs=read_specs(session.get_inputs(), "input"),
                outputs=tuple(outputs or read_specs(session.get_outputs(), "output")),
                embedding=embedding,
            ),
            plan=TensorPlan(predicted=TensorPrediction(**zeros), **settings),
            files=tuple(files),
            budget=Budget(),
            built_for="laptop-cpu",
            target=Target(arch="any", accelerator="cpu"),
            tools={"edgeq": "0"},
            created_utc="2026-01-01T00:00:00Z",
        )
        write_manifest(folder, manifest)
        return folder

    return make


@pytest.fixture(scope="session")
def axes() -> dict[str, AxisRange]:
    """Up to six rows."""
    return {"batch": AxisRange(least=1, usual=2, most=6)}
