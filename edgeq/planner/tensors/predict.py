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


def predict(model: Path, profile: DeviceProfile, backend: Backend, axes: Mapping[str, AxisRange]) -> TensorPrediction:
    """Memory at the largest sizes and latency at the usual ones.

    Where no probe has measured ONNX Runtime on the device, bytes are those of file and weights, and of the profile's
    allowance for the process; there is no latency then.

    Args:
        model: the ONNX file.
        profile: the device.
        backend: of the bundle.
        axes: sizes of dynamic axes.
    """
    file_bytes = sum(path.stat().st_size for path in model.parent.glob(f"{model.name}*"))
    figures = None if profile.measured is None or backend.on_gpu else profile.measured.onnx
    runtime = backend.runtime_bytes or 0
    plain = TensorPrediction(
        file_bytes=file_bytes,
        weights_bytes=file_bytes,
        activation_bytes=0,
        runtime_bytes=runtime,
        peak_memory_bytes=file_bytes + runtime,
    )
    return plain if figures is None else _from_probe(model, figures, axes) or plain


def _from_probe(model: Path, figures: OnnxFigures, axes: Mapping[str, AxisRange]) -> TensorPrediction | None:
    """None for a model with an operator that the cost model does not know."""
    try:
        largest = predict_onnx(read_onnx(model, {name: sizes.most for name, sizes in axes.items()}), figures)
        usual = predict_onnx(read_onnx(model, {name: sizes.usual for name, sizes in axes.items()}), figures)
    except UnsupportedModelError:
        return None
    return TensorPrediction(
        file_bytes=largest.file_bytes,
        weights_bytes=largest.weights_bytes,
        activation_bytes=largest.activation_bytes,
        runtime_bytes=largest.runtime_bytes,
        peak_memory_bytes=largest.peak_memory_bytes,
        latency_ms=usual.latency_ms,
    )
