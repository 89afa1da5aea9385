"""ONNX Runtime's providers for GPUs: options as it documents them, and no silent fallback."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import edgeq
from edgeq.errors import SessionError, UsageError
from edgeq.profiles.onnx.session import import_onnxruntime, open_onnx_session
from edgeq.runtime.tensorrt.providers import gpu_providers, with_options
from edgeq.tensor_types import AxisRange, Scheme, TensorPlan, TensorPrediction, TensorSpec

INPUTS = (
    TensorSpec(name="images", dtype="float32", shape=("batch", 3, 8, 8)),
    TensorSpec(name="mask", dtype="int64", shape=("batch", "tokens")),
)
CUDA_OR_CPU = ["CUDAExecutionProvider", "CPUExecutionProvider"]
AXES = {"batch": AxisRange(least=1, usual=2, most=4), "tokens": AxisRange(least=8, usual=128, most=512)}


def _plan(backend: str, scheme: Scheme = "int8-static") -> TensorPlan:
    predicted = TensorPrediction(
        file_bytes=0, weights_bytes=0, activation_bytes=0, runtime_bytes=0, peak_memory_bytes=0
    )
    return TensorPlan(backend=backend, scheme=scheme, axes=AXES, predicted=predicted)


def test_tensorrt_computes_first_and_cuda_what_it_lacks(tmp_path: Path) -> None:
    (first, options), (second, _) = gpu_providers(
        _plan("tensorrt"), INPUTS, cache=tmp_path, workspace_bytes=1 << 30, dla_core=1
    )
    assert (first, second) == ("TensorrtExecutionProvider", "CUDAExecutionProvider")
    assert options["trt_profile_min_shapes"] == "images:1x3x8x8,mask:1x8"
    assert options["trt_profile_opt_shapes"] == "images:2x3x8x8,mask:2x128"
    assert options["trt_profile_max_shapes"] == "images:4x3x8x8,mask:4x512"
    assert options["trt_engine_cache_path"] == options["trt_timing_cache_path"] == str(tmp_path)
    assert options["trt_max_workspace_size"] == str(1 << 30)
    assert (options["trt_dla_enable"], options["trt_dla_core"]) == ("True", "1")
    assert (options["trt_int8_enable"], options["trt_fp16_enable"]) == ("True", "True")
    fixed = (TensorSpec(name="images", dtype="float32", shape=(1, 3, 8, 8)),)
    ((_, plain), _) = gpu_providers(_plan("tensorrt", "fp16"), fixed, cache=tmp_path)
    assert not [name for name in plain if "profile" in name]
    assert plain["trt_fp16_enable"] == "True"
    ((_, floats), _) = gpu_providers(_plan("tensorrt", "fp32"), fixed, cache=tmp_path)
    assert not {"trt_int8_enable", "trt_fp16_enable"} & floats.keys()


def test_the_other_backends_have_their_own(tmp_path: Path) -> None:
    ((name, options),) = gpu_providers(_plan("onnxruntime-cuda"), INPUTS, cache=tmp_path, memory_bytes=5, device=1)
    assert name == "CUDAExecutionProvider"
    assert options == {"device_id": "1", "arena_extend_strategy": "kSameAsRequested", "gpu_mem_limit": "5"}
    ((name, options), _) = gpu_providers(_plan("tensorrt-rtx"), INPUTS, cache=tmp_path, workspace_bytes=7)
    assert name == "NvTensorRTRTXExecutionProvider"
    assert options["nv_profile_max_shapes"] == "images:4x3x8x8,mask:4x512"
    assert (options["nv_runtime_cache_path"], options["nv_max_workspace_size"]) == (str(tmp_path), "7")


def test_plans_that_no_gpu_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="made for onnxruntime-cpu"):
        gpu_providers(_plan("onnxruntime-cpu"), INPUTS, cache=tmp_path)
    for scheme in ("fp8", "bf16"):
        with pytest.raises(UsageError, match=f"Not every version.* has an option for {scheme.upper()}"):
            gpu_providers(_plan("tensorrt", scheme), INPUTS, cache=tmp_path)
    strange = (TensorSpec(name="x", dtype="float32", shape=("height",)),)
    with pytest.raises(UsageError, match="dynamic axes height"):
        gpu_providers(_plan("tensorrt"), strange, cache=tmp_path)


def test_names_get_the_plans_options(tmp_path: Path) -> None:
    own = ("CUDAExecutionProvider", {"device_id": "3"})
    given: list[Any] = ["TensorrtExecutionProvider", own, "CPUExecutionProvider"]
    asked, second, third = with_options(given, _plan("tensorrt"), INPUTS, cache=tmp_path)
    assert isinstance(asked, tuple)
    first, options = asked
    assert first == "TensorrtExecutionProvider"
    assert options["trt_profile_max_shapes"] == "images:4x3x8x8,mask:4x512"
    assert (second, third) == (own, "CPUExecutionProvider")
    for backend in ("tensorrt", "onnxruntime-cuda", "onnxruntime-cpu"):  # CUDA computes what it can of any graph
        (cuda,) = with_options(["CUDAExecutionProvider"], _plan(backend, "fp8"), (), cache=tmp_path)
        assert isinstance(cuda, tuple)
        assert (cuda[0], cuda[1]["arena_extend_strategy"]) == ("CUDAExecutionProvider", "kSameAsRequested")
    assert with_options(["TensorrtExecutionProvider"], _plan("onnxruntime-cuda"), (), cache=tmp_path) == (
        "TensorrtExecutionProvider",
    )


@pytest.mark.skipif(
    "CUDAExecutionProvider" in import_onnxruntime().get_available_providers(), reason="this onnxruntime has CUDA"
)
@pytest.mark.parametrize("providers", [None, ["CUDAExecutionProvider"], CUDA_OR_CPU])
def test_a_build_without_cuda_does_not_compute_silently(
    tiny: ModuleType, tmp_path: Path, providers: list[str] | None
) -> None:
    """ONNX Runtime itself warns and computes on the CPU; the same bundle there is no silent way out."""
    graph = tiny.float_graph(tmp_path / "m.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bare = import_onnxruntime().InferenceSession(str(graph), providers=CUDA_OR_CPU)
    assert bare.get_providers() == ["CPUExecutionProvider"]
    bundle = tiny.write_tensor_bundle(tmp_path / "bundle", graph, backend="onnxruntime-cuda", scheme="fp32")
    with pytest.raises(
        SessionError, match="was not built with CUDAExecutionProvider, and would have computed on"
    ) as told:
        edgeq.load(bundle, providers=providers)
    assert "onnxruntime-gpu" in told.value.remedy


def test_a_provider_that_does_not_start_is_an_error(
    tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a build for CUDA without a driver: the provider is listed, the session comes without it."""
    ort = import_onnxruntime()
    monkeypatch.setattr(ort, "get_available_providers", lambda: CUDA_OR_CPU)
    graph = tiny.float_graph(tmp_path / "m.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(SessionError, match=r"(could not start|cannot load).*CUDAExecutionProvider"):
            open_onnx_session(graph, 1, providers=CUDA_OR_CPU)
