"""What a tensor bundle will take on its device."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from edgeq.converters.onnx.graph import read_onnx
from edgeq.errors import UnsupportedModelError
from edgeq.profiles.device import Backend, DeviceProfile
from edgeq.profiles.onnx.cost import OnnxFigures, predict_onnx
from edgeq.tensor_types import AxisRange, TensorPrediction

__all__ = ["predict"]


def predict(
    model: Path, profile: DeviceProfile, backend: Backend, axes: Mapping[str, AxisRange]
) -> tuple[TensorPrediction, tuple[str, ...]]:
    """Memory at the largest sizes and latency at the usual ones, and what of it could not be predicted.

    Where no probe has measured ONNX Runtime on the device, bytes are those of file and weights, and of the profile's
    allowance for the process; there is no latency then.

    Args:
        model: the ONNX file.
        profile: the device.
        backend: of the bundle.
        axes: sizes of dynamic axes.
    """
    figures = None if profile.measured is None or backend.on_gpu else profile.measured.onnx
    why = f"ONNX Runtime was not probed on {profile.name}"
    if figures is not None:
        try:
            return _from_probe(model, figures, axes), ()
        except UnsupportedModelError as error:
            why = error.cause
    file_bytes = sum(path.stat().st_size for path in model.parent.glob(f"{model.name}*"))
    runtime = backend.runtime_bytes or 0
    plain = TensorPrediction(
        file_bytes=file_bytes,
        weights_bytes=file_bytes,
        activation_bytes=0,
        runtime_bytes=runtime,
        peak_memory_bytes=file_bytes + runtime,
    )
    return plain, (f"peak memory leaves activations out, and latency is not predicted: {why}",)


def _from_probe(model: Path, figures: OnnxFigures, axes: Mapping[str, AxisRange]) -> TensorPrediction:
    """Raises UnsupportedModelError for an operator that the cost model does not know."""
    largest = predict_onnx(read_onnx(model, {name: sizes.most for name, sizes in axes.items()}), figures)
    usual = predict_onnx(read_onnx(model, {name: sizes.usual for name, sizes in axes.items()}), figures)
    return TensorPrediction(
        file_bytes=largest.file_bytes,
        weights_bytes=largest.weights_bytes,
        activation_bytes=largest.activation_bytes,
        runtime_bytes=largest.runtime_bytes,
        peak_memory_bytes=largest.peak_memory_bytes,
        latency_ms=usual.latency_ms,
    )
