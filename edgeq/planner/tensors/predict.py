"""What a tensor bundle will take on its device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from edgeq.converters.onnx.graph import read_onnx
from edgeq.errors import UnsupportedModelError
from edgeq.profiles.device import Backend, DeviceProfile
from edgeq.profiles.onnx.cost import OnnxFigures, OnnxShape, predict_onnx, predict_onnx_memory
from edgeq.profiles.onnx.datasheet import least_ms, predict_gpu_memory, process_bytes
from edgeq.tensor_types import AxisRange, TensorPrediction

__all__ = ["predict"]

Read = Callable[[Mapping[str, int]], OnnxShape]


def predict(
    model: Path,
    profile: DeviceProfile,
    backend: Backend,
    axes: Mapping[str, AxisRange],
    *,
    disabled_optimizers: Collection[str] = (),
    beside_bytes: int = 0,
) -> tuple[TensorPrediction, tuple[str, ...]]:
    """Memory at the largest sizes and latency at the usual ones, and what of it is only a floor or an allowance.

    Where a probe has measured ONNX Runtime on the device its figures are taken. Elsewhere weights and activations
    follow from the graph, the process is the profile's allowance, and latency is a floor from the datasheet's figures.

    Args:
        model: the ONNX file.
        profile: the device.
        backend: of the bundle.
        axes: sizes of dynamic axes.
        disabled_optimizers: of ONNX Runtime, as the session will have them.
        beside_bytes: of what the process holds once the model is loaded, as a tokenizer.
    """

    @functools.cache
    def read_sizes(sizes: frozenset[tuple[str, int]]) -> OnnxShape:
        return read_onnx(model, dict(sizes), disabled_optimizers=disabled_optimizers, on_gpu=backend.on_gpu)

    def read(sizes: Mapping[str, int]) -> OnnxShape:
        return read_sizes(frozenset(sizes.items()))

    figures = None if profile.measured is None or backend.on_gpu else profile.measured.onnx
    try:
        if figures is not None:
            return _from_probe(read, figures, axes, beside_bytes), ()
        return _from_datasheet(read, profile, backend, axes, beside_bytes)
    except UnsupportedModelError as error:
        return _from_file(model, profile, backend, error.cause, beside_bytes)


def _largest(read: Read, axes: Mapping[str, AxisRange]) -> OnnxShape:
    return read({name: sizes.most for name, sizes in axes.items()})


def _usual(read: Read, axes: Mapping[str, AxisRange]) -> OnnxShape:
    return read({name: sizes.usual for name, sizes in axes.items()})


def _from_probe(read: Read, figures: OnnxFigures, axes: Mapping[str, AxisRange], more: int) -> TensorPrediction:
    """Raises UnsupportedModelError for an operator that the cost model does not know."""
    largest = predict_onnx(_largest(read, axes), figures)
    usual = predict_onnx(_usual(read, axes), figures)
    return TensorPrediction(
        file_bytes=largest.file_bytes,
        weights_bytes=largest.weights_bytes,
        activation_bytes=largest.activation_bytes,
        runtime_bytes=largest.runtime_bytes + more,
        peak_memory_bytes=max(largest.load_peak_bytes, largest.serve_peak_bytes + more),
        latency_ms=usual.latency_ms,
    )


def _from_datasheet(
    read: Read, profile: DeviceProfile, backend: Backend, axes: Mapping[str, AxisRange], more: int
) -> tuple[TensorPrediction, tuple[str, ...]]:
    """Raises UnsupportedModelError as `_from_probe` does."""
    shape = _largest(read, axes)
    process = process_bytes(profile, backend)
    beside = process or 0
    if backend.on_gpu:
        on_gpu = predict_gpu_memory(shape, unified=profile.memory.unified)
        weights, activations = on_gpu.weights_bytes, on_gpu.activation_bytes
        peak = beside + max(on_gpu.load_peak_bytes, weights + activations + more)
    else:
        on_cpu = predict_onnx_memory(shape, loaded_bytes=beside, runtime_bytes=beside)
        weights, activations = on_cpu.weights_bytes, on_cpu.activation_bytes
        peak = max(on_cpu.load_peak_bytes, on_cpu.serve_peak_bytes + more)
    latency = least_ms(_usual(read, axes), profile, backend)
    predicted = TensorPrediction(
        file_bytes=shape.file_bytes,
        weights_bytes=weights,
        activation_bytes=activations,
        runtime_bytes=beside + more,
        peak_memory_bytes=peak,
        latency_ms=latency,
        latency_is_floor=latency is not None,
    )
    return predicted, tuple(_datasheet_notes(profile, backend, process, latency))


def _datasheet_notes(profile: DeviceProfile, backend: Backend, process: int | None, latency: float | None) -> list[str]:
    notes = []
    if process is None:
        notes.append(f"peak memory leaves the process out: {profile.name} has no runtime_bytes for {backend.name}")
    elif backend.on_gpu:
        notes.append("peak memory is from datasheet figures: TensorRT's workspace comes on top, the budget bounds it")
    if latency is None:
        notes.append(f"latency is not predicted: {profile.name} has no clock and was not probed for {backend.name}")
    else:
        notes.append(
            "latency is a floor from datasheet figures, not a prediction: products and convolutions at the peak of the "
            "profile, and nothing else; edgeq devices probe or edgeq bench on the device tells what they take"
        )
    return notes


def _from_file(
    model: Path, profile: DeviceProfile, backend: Backend, why: str, more: int
) -> tuple[TensorPrediction, tuple[str, ...]]:
    """Of a graph that cannot be counted: its file, and the process."""
    file_bytes = sum(path.stat().st_size for path in model.parent.glob(f"{model.name}*"))
    runtime = (process_bytes(profile, backend) or 0) + more
    plain = TensorPrediction(
        file_bytes=file_bytes,
        weights_bytes=file_bytes,
        activation_bytes=0,
        runtime_bytes=runtime,
        peak_memory_bytes=file_bytes + runtime,
    )
    return plain, (f"peak memory leaves activations out, and latency is not predicted: {why}",)
