"""ONNX Runtime's providers for NVIDIA GPUs, and the options that a plan asks for.

Whether they were really taken is looked at where sessions are opened (`edgeq.profiles.onnx.session`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgeq.errors import UsageError
from edgeq.tensor_types import TensorPlan, TensorSpec

__all__ = ["gpu_providers", "with_options"]

CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"
TENSORRT_RTX = "NvTensorRTRTXExecutionProvider"
_FIRST = {"onnxruntime-cuda": CUDA, "tensorrt": TENSORRT, "tensorrt-rtx": TENSORRT_RTX}

Provider = tuple[str, dict[str, str]]
Named = str | tuple[str, dict[str, Any]]


def gpu_providers(
    plan: TensorPlan,
    inputs: Sequence[TensorSpec],
    *,
    cache: Path,
    device: int = 0,
    workspace_bytes: int | None = None,
    memory_bytes: int | None = None,
    dla_core: int | None = None,
) -> list[Provider]:
    """Providers with their options for ``InferenceSession(providers=…)``, the one that shall compute first.

    Those of TensorRT are followed by CUDA's, which takes the nodes that TensorRT lacks.

    Args:
        plan: of the bundle.
        inputs: of the model.
        cache: a folder for engines and times of kernels.
        device: of CUDA.
        workspace_bytes: that one layer may take for scratch.
        memory_bytes: that CUDA's provider may take in all.
        dla_core: the deep learning accelerator to use, TensorRT only.

    Raises:
        UsageError: the plan is for a CPU, or for a precision that the provider cannot be asked for.
    """
    first = _FIRST.get(plan.backend)
    if first is None:
        raise UsageError(
            f"The bundle's graph is made for {plan.backend}, not for a GPU",
            "Convert the model again for a target with a GPU, such as --target jetson-orin",
        )
    shapes = _shapes(plan, inputs)
    cuda = (CUDA, _cuda(device, memory_bytes))
    if first == CUDA:
        return [cuda]
    if first == TENSORRT_RTX:
        options = {f"nv_profile_{kind}_shapes": text for kind, text in shapes.items()}
        if workspace_bytes is not None:
            options["nv_max_workspace_size"] = str(workspace_bytes)
        return [(first, {"device_id": str(device), "nv_runtime_cache_path": str(cache), **options}), cuda]
    return [(first, _tensorrt(plan, shapes, cache, device, workspace_bytes, dla_core)), cuda]


def _cuda(device: int, memory_bytes: int | None) -> dict[str, str]:
    # What is asked for and no more: the default doubles the arena each time.
    options = {"device_id": str(device), "arena_extend_strategy": "kSameAsRequested"}
    if memory_bytes is not None:
        options["gpu_mem_limit"] = str(memory_bytes)
    return options


def _tensorrt(
    plan: TensorPlan,
    shapes: Mapping[str, str],
    cache: Path,
    device: int,
    workspace_bytes: int | None,
    dla_core: int | None,
) -> dict[str, str]:
    if plan.scheme in ("bf16", "fp8"):
        raise UsageError(
            f"Not every version of ONNX Runtime's TensorRT provider has an option for {plan.scheme.upper()}",
            "Run the bundle with the native engine instead",
        )
    options = {
        "device_id": str(device),
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": str(cache),
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": str(cache),
        **{f"trt_profile_{kind}_shapes": text for kind, text in shapes.items()},
    }
    # The provider's networks are weakly typed: what the graph says is taken only where a flag allows it.
    if plan.scheme.startswith("int8"):
        options["trt_int8_enable"] = "True"
    # What a graph of INT8 leaves in floats is FP16 too.
    if plan.scheme == "fp16" or plan.scheme.startswith("int8"):
        options["trt_fp16_enable"] = "True"
    if workspace_bytes is not None:
        options["trt_max_workspace_size"] = str(workspace_bytes)
    if dla_core is not None:
        options |= {"trt_dla_enable": "True", "trt_dla_core": str(dla_core)}
    return options


def _shapes(plan: TensorPlan, inputs: Sequence[TensorSpec]) -> dict[str, str]:
    """``"images:1x3x224x224,…"`` for min, opt and max; nothing if no input is dynamic.

    Raises:
        UsageError: a dynamic axis without sizes.
    """
    names = {axis for spec in inputs for axis in spec.shape if isinstance(axis, str)}
    if not names:
        return {}
    unknown = sorted(names - plan.axes.keys())
    if unknown:
        raise UsageError(
            f"The plan has no sizes for the dynamic axes {', '.join(unknown)}", "Convert the model again with sizes"
        )

    def text(which: str) -> str:
        parts = []
        for spec in inputs:
            sizes = [axis if isinstance(axis, int) else getattr(plan.axes[axis], which) for axis in spec.shape]
            parts.append(f"{spec.name}:{'x'.join(map(str, sizes))}")
        return ",".join(parts)

    return {"min": text("least"), "opt": text("usual"), "max": text("most")}


def with_options(
    providers: Sequence[Named], plan: TensorPlan, inputs: Sequence[TensorSpec], *, cache: Path
) -> tuple[Named, ...]:
    """Providers that are given by name alone, with the options that follow from a plan.

    Args:
        providers: names, or names with options, which are left as they are.
        plan: of the bundle.
        inputs: of the model.
        cache: a folder for engines and times of kernels.

    Raises:
        UsageError: as `gpu_providers`.
    """
    first = _FIRST.get(plan.backend)

    def named(provider: Named) -> Named:
        if provider == CUDA:
            return (CUDA, _cuda(0, None))
        if provider == first:
            return gpu_providers(plan, inputs, cache=cache)[0]
        return provider

    return tuple(named(provider) for provider in providers)
