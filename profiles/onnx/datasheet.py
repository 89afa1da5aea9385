"""What an ONNX model takes on a device that no probe has seen, from the graph and the figures of a datasheet.

Memory of weights and activations follows from the graph. Times are floors of the datasheet: the operations of all
matrix products and convolutions, or the bytes that must come from memory, the longer of the two (the roofline of
Williams, Waterman and Patterson, 2009). What stands between the products is left out, as if all of it were
fused, and activations as if they stayed in the caches. No floor is certain: a device may have a faster clock than its
profile says, and a convolution may be computed with fewer operations (Winograd).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from edgeq.profiles.device import Backend, DeviceProfile
from edgeq.profiles.onnx.cost import OnnxShape
from edgeq.profiles.onnx.memory import GraphNode, live_peak_bytes

__all__ = ["GpuMemory", "least_ms", "predict_gpu_memory", "process_bytes"]

# Operations a second over those of INT8, on tensor cores: FP32 is computed as TF32.
_OF_INT8 = {"int8": 1.0, "fp16": 1 / 2, "fp32": 1 / 4}
# Operations of a core in one clock, two for a multiply-add: two vector units of the width that the feature names. ONNX
# Runtime computes FP16 in FP32.
_FLOATS_PER_CLOCK = {"asimd": 16, "avx2": 32, "avx512f": 64}
_BYTES_PER_CLOCK = {
    "asimd": 32, "asimddp": 64, "i8mm": 128, "avx2": 64, "avx_vnni": 128, "avx512bw": 128, "avx512_vnni": 256,
    "amx_int8": 2048,
}  # fmt: skip
# The most that caches hold from one call to the next, by whether CPU and GPU share one memory: no profile states its
# own. More than the GPU of a Jetson has (4 to 32 MiB) or a Raspberry Pi, and what the GPU of a large laptop has.
_CACHE_BYTES = {True: 32 << 20, False: 64 << 20}
# TensorRT's buffers begin at multiples of it.
_ALIGNMENT_BYTES = 512


@dataclasses.dataclass(frozen=True)
class GpuMemory:
    """What an engine takes.

    Attributes:
        weights_bytes: on the device.
        activation_bytes: live at once, with what goes in and comes out.
        load_peak_bytes: of weights while it is loaded: the file lies in the host's memory, which is the device's too
            if they share one.
    """

    weights_bytes: int
    activation_bytes: int
    load_peak_bytes: int


def process_bytes(profile: DeviceProfile, backend: Backend) -> int | None:
    """Of a serving process beside the model: interpreter, libraries, driver and context; None where nobody says.

    A backend that does not say it takes what another one of the same processor takes.
    """
    alike = [other for other in profile.backends if other.on_gpu == backend.on_gpu and other.runtime_bytes is not None]
    chosen = backend if backend.runtime_bytes is not None else next(iter(alike), None)
    if chosen is None or chosen.runtime_bytes is None:
        return None
    return chosen.runtime_bytes + chosen.device_overhead_bytes


def predict_gpu_memory(shape: OnnxShape, *, unified: bool) -> GpuMemory:
    """Memory of an engine beside the process and TensorRT's workspace.

    Args:
        shape: the model at the largest sizes that it will be called with, read as ``on_gpu``.
        unified: whether the host's memory is the device's.
    """
    weights = sum(p.n_bytes for p in shape.parameters if p.kept)
    live = live_peak_bytes(shape.nodes, shape.values, shape.outputs)
    aligned = live + _ALIGNMENT_BYTES * len(shape.nodes) + shape.input_bytes
    return GpuMemory(weights, aligned, 2 * weights if unified else weights)


def least_ms(shape: OnnxShape, profile: DeviceProfile, backend: Backend) -> float | None:
    """Milliseconds that a call takes at the least, by the datasheet; None where it has no speed of computing.

    Weights beyond what caches may hold come from memory in every call, meanwhile others are computed with.

    Args:
        shape: the model at its usual sizes.
        profile: in its power mode.
        backend: of it.
    """
    speeds = _speeds(profile, backend)
    if not speeds:
        return None
    products = [node for node in shape.nodes if node.flops]
    compute_s = sum(node.flops / speeds[_precision(node, shape, speeds)] for node in products)
    read = {name for node in products for name in node.inputs}
    weights = sum(p.n_bytes for p in shape.parameters if p.name in read)
    moved = max(0, weights - _CACHE_BYTES[profile.memory.unified])
    return 1e3 * max(compute_s, moved / profile.peak_bandwidth_bytes_per_s)


def _speeds(profile: DeviceProfile, backend: Backend) -> dict[str, float]:
    """Operations a second by precision."""
    if backend.on_gpu:
        best = profile.int8_ops_per_s
        if best is None or profile.gpu is None:
            return {}
        speeds = {kind: share * best for kind, share in _OF_INT8.items()}
        if profile.gpu.fp8_ops_per_s is not None and profile.gpu.int8_ops_per_s is not None:
            speeds["fp8"] = profile.gpu.fp8_ops_per_s * best / profile.gpu.int8_ops_per_s
        return speeds
    peaks = _cpu_peaks(profile)
    if backend.compute_flops_per_s is not None:
        peaks |= dict.fromkeys(("fp16", "fp32"), backend.compute_flops_per_s)
    return peaks if {"int8", "fp32"} <= peaks.keys() else {}


def _cpu_peaks(profile: DeviceProfile) -> dict[str, float]:
    """Of all cores at their highest clock in the power mode; empty where the profile has no clock."""
    mode, features = profile.mode, set(profile.cpu.features)
    clock_hz = profile.cpu.clock_hz if mode is None else mode.cpu_clock_hz or profile.cpu.clock_hz
    cores = profile.cpu.cores if mode is None else mode.cpu_cores or profile.cpu.cores
    if clock_hz is None:
        return {}
    rate = clock_hz * min(cores, profile.threads or cores)
    floats = max((per_clock for name, per_clock in _FLOATS_PER_CLOCK.items() if name in features), default=0)
    bytes_ = max((per_clock for name, per_clock in _BYTES_PER_CLOCK.items() if name in features), default=floats)
    return {"int8": bytes_ * rate, "fp16": floats * rate, "fp32": floats * rate} if floats else {}


def _precision(node: GraphNode, shape: OnnxShape, speeds: Mapping[str, float]) -> str:
    if node.kind == "int8":
        types = {p.dtype for p in shape.parameters if p.name in node.inputs} if "fp8" in speeds else set()
        return "fp8" if any(kind.startswith("float8") for kind in types) else "int8"
    made = shape.values[node.outputs[0]]
    return "fp16" if made.item_bytes == 2 else "fp32"
