"""What a device can compute a model in, and why it cannot compute it in something else."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from edgeq.errors import UsageError
from edgeq.planner.tensors.job import Precision
from edgeq.profiles.device import Backend, DeviceProfile
from edgeq.runtime.tensorrt.versions import OLDEST
from edgeq.tensor_types import Scheme

__all__ = [
    "TENSOR_BACKENDS",
    "activations_of",
    "choose_backend",
    "impossible_schemes",
    "possible_schemes",
    "schemes_for",
]

TENSOR_BACKENDS = ("onnxruntime-cpu", "tensorrt", "tensorrt-rtx", "onnxruntime-cuda")
_BY_PRECISION: dict[Precision, tuple[Scheme, ...]] = {
    "fp32": ("fp32",),
    "fp16": ("fp16",),
    "bf16": ("bf16",),
    "int8": ("int8-static", "int8-dynamic"),
    "int8-static": ("int8-static",),
    "int8-dynamic": ("int8-dynamic",),
    "int8-weights": ("int8-weights",),
    "int4-weights": ("int4-weights",),
    "fp8": ("fp8",),
}
_ON_CPU: tuple[Scheme, ...] = ("fp32", "int8-static", "int8-dynamic", "int8-weights", "int4-weights")
_ON_GPU: tuple[Scheme, ...] = ("fp32", "fp16", "int8-static", "fp8")
# ONNX Runtime's CUDA kernels lack BF16 for Clip, GlobalAveragePool, MaxPool and others (its docs/OperatorKernels.md).
_ON_TENSORRT: tuple[Scheme, ...] = (*_ON_GPU, "bf16")
# What a profile must list under precisions for a scheme.
_NEEDS: dict[Scheme, str] = {
    "fp32": "fp32",
    "fp16": "fp16",
    "bf16": "bf16",
    "int8-static": "int8",
    "int8-dynamic": "int8",
    "int8-weights": "int8",
    "int4-weights": "int4",
    "fp8": "fp8",
}
# The least compute capability, to say so.
_CAPABILITIES: dict[Precision, str] = {"bf16": "8.0", "fp8": "8.9"}
# The fastest first; a scheme that is not tried unasked is not here.
_AUTO: dict[bool, tuple[Scheme, ...]] = {
    True: ("int8-static", "fp16", "fp32"),
    False: ("int8-static", "int8-dynamic", "fp32"),
}


def choose_backend(profile: DeviceProfile, wanted: str | None) -> Backend:
    """The backend that a tensor model is made for.

    Args:
        profile: the device.
        wanted: its name; None for the profile's first that runs ONNX models.

    Raises:
        UsageError: the device has no such backend, or only versions of TensorRT that are too old.
    """
    there = [backend for backend in profile.backends if backend.name in TENSOR_BACKENDS]
    names = ", ".join(backend.name for backend in there) or "none"
    if not there:
        raise UsageError(
            f"{profile.name} has no backend for models that are called with arrays",
            f"Add one of {', '.join(TENSOR_BACKENDS)} under backends in its profile",
        )
    found = next((backend for backend in there if wanted in (None, backend.name)), None)
    if found is None:
        raise UsageError(f"{profile.name} has no backend {wanted!r}", f"Choose one of {names}")
    _refuse_old_tensorrt(profile, found, there)
    return found


def _refuse_old_tensorrt(profile: DeviceProfile, backend: Backend, there: Sequence[Backend]) -> None:
    """Refuse TensorRT where no software of the device has a version that edgeq can build engines with."""
    found = {entry.tensorrt or "": re.match(r"(\d+)(?:\.(\d+))?", entry.tensorrt or "") for entry in profile.software}
    least = OLDEST["tensorrt"]
    # Of "10" alone the second number is not known, and may be new enough.
    versions = {text: (int(match[1]), int(match[2] or least[1])) for text, match in found.items() if match is not None}
    if backend.name != "tensorrt" or not versions:
        return
    newest = max(versions, key=lambda text: versions[text])
    if versions[newest] >= least:
        return
    cpu = any(other.name == "onnxruntime-cpu" for other in there)
    raise UsageError(
        f"{profile.name} has TensorRT {newest} at most, and edgeq needs {'.'.join(map(str, least))} or later",
        "Let its CPU compute: --backend onnxruntime-cpu" if cpu else "Choose another device",
    )


def schemes_for(profile: DeviceProfile, backend: Backend, precision: Precision) -> tuple[Scheme, ...]:
    """Schemes to try, in the order of preference; the float model is always one of them for ``"auto"``.

    Raises:
        UsageError: the device cannot compute in that precision, with the reason.
    """
    able = possible_schemes(backend)
    if precision == "auto":
        return tuple(scheme for scheme in _AUTO[backend.on_gpu] if scheme in able)
    found: tuple[Scheme, ...] = tuple(scheme for scheme in _BY_PRECISION[precision] if scheme in able)
    if found:
        return found
    raise UsageError(
        f"{profile.name} cannot run {precision} with {backend.name}: {_reason(profile, backend, precision)}",
        f"Choose one of auto, {', '.join(dict.fromkeys(scheme for scheme in able))}",
    )


def impossible_schemes(profile: DeviceProfile, backend: Backend) -> dict[Scheme, str]:
    """Schemes that the device cannot compute with a backend, with the reason."""
    able = possible_schemes(backend)
    return {scheme: _reason(profile, backend, scheme) for scheme in _NEEDS if scheme not in able}


def possible_schemes(backend: Backend) -> list[Scheme]:
    """Schemes that can be asked for with a backend."""
    there = _ON_TENSORRT if backend.name.startswith("tensorrt") else _ON_GPU if backend.on_gpu else _ON_CPU
    return [scheme for scheme in there if _NEEDS[scheme] in _known(backend)]


def _known(backend: Backend) -> Sequence[str]:
    """Precisions; every backend runs FP32."""
    return ("fp32", *backend.precisions)


def _reason(profile: DeviceProfile, backend: Backend, precision: Precision) -> str:
    if backend.on_gpu and precision in ("int8-dynamic", "int8-weights", "int4-weights"):
        return "TensorRT takes explicit Q/DQ with fixed scales"
    if backend.on_gpu and precision == "bf16" and "bf16" in _known(backend):
        return "ONNX Runtime's CUDA kernels lack BF16 for many operators, and TensorRT has it"
    if profile.gpu is not None and precision in _CAPABILITIES and (backend.on_gpu or precision == "fp8"):
        least = _CAPABILITIES[precision]
        return f"{precision.upper()} needs compute capability {least}, its GPU has {profile.gpu.compute_capability}"
    on_cpu = {"fp16": "ONNX Runtime computes FP16 in FP32 on a CPU", "bf16": "ONNX Runtime's CPU kernels lack BF16"}
    if not backend.on_gpu and precision in on_cpu:
        return on_cpu[precision]
    return f"its precisions there are {', '.join(backend.precisions)}"


def activations_of(profile: DeviceProfile, backend: Backend) -> Literal["u8", "s8"]:
    """The kind of INT8 activation that the device's kernels are fast with.

    x86 multiplies unsigned by signed bytes; ARM's dot products and TensorRT take signed ones alone.
    """
    return "u8" if not backend.on_gpu and profile.arch != "aarch64" else "s8"
