"""What rounding a convolution's weights shifts its outputs by on average, taken back by its bias.

A depthwise channel has nine weights, whose errors do not cancel out; its outputs are then all too large or too small.
The shift is the sum of the weights' errors times the means of the inputs (Nagel et al., Data-Free Quantization Through
Weight Equalization and Bias Correction, https://arxiv.org/abs/1906.04721, section 4.2), here with measured means.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.onnx.quantize.graph import Editor, open_editor, save_model
from edgeq.converters.onnx.quantize.sites import editor_products
from edgeq.errors import ConversionError
from edgeq.profiles.onnx.session import open_onnx_session

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["channel_means", "shift_of"]

_CHANNELS = 1  # axis of an image
_AXES_ARE_INPUTS = 18  # of ReduceMean, since this opset


def channel_means(
    model: Path, inputs: Iterable[Mapping[str, NDArray[Any]]], *, threads: int = 1
) -> dict[str, NDArray[np.float64]]:
    """Mean of each channel of all that convolutions with a bias read.

    Args:
        model: cleaned floats.
        inputs: of one call each.
        threads: of the session.

    Returns:
        Name of the value to means, shape [channels].

    Raises:
        ConversionError: no inputs, or a value that is not finite.
        SessionError: the model cannot be run.
    """
    editor = open_editor(model)
    products = editor_products(editor).values()
    read = {p.activation: p for p in products if p.node.op_type == "Conv" and p.bias is not None}
    if not read:
        return {}
    names: dict[str, str] = {}  # of a value's means to the value
    for value, product in read.items():
        kernel = len(product.weight.shape or ()) - 2
        mean = _mean(editor, value, [0, *range(_CHANNELS + 1, _CHANNELS + 1 + kernel)])
        editor.graph.outputs.append(mean.outputs[0])
        names[mean.outputs[0].name or ""] = value.name or ""
    sums: dict[str, NDArray[np.float64]] = {}
    count = 0
    with tempfile.TemporaryDirectory() as folder:
        watched = Path(folder) / "watched.onnx"
        save_model(editor, watched)
        session = open_onnx_session(watched, threads)
        for feeds in inputs:
            count += 1
            for name, found in zip(names.values(), session.run(list(names), dict(feeds)), strict=True):
                sums[name] = sums.get(name, 0.0) + np.asarray(found, np.float64)
    if not count:
        raise ConversionError("There are no inputs to calibrate with", "Give at least one")
    for name, total in sums.items():
        if not np.isfinite(total).all():
            raise ConversionError(f"The value {name!r} is not finite", "Calibrate with inputs that give finite numbers")
    return {name: total / count for name, total in sums.items()}


def _mean(editor: Editor, value: ir.Value, axes: list[int]) -> ir.Node:
    name = f"{value.name}_mean"
    if editor.opset < _AXES_ARE_INPUTS:
        return editor.node("ReduceMean", [value], name, before=None, attributes={"axes": axes, "keepdims": 0})
    given = editor.constant("mean_axes", np.array(axes, np.int64))
    return editor.node("ReduceMean", [value, given], name, before=None, attributes={"keepdims": 0})


def shift_of(error: NDArray[Any], means: NDArray[np.float64]) -> NDArray[np.float64]:
    """What a convolution's outputs lack on average.

    Args:
        error: of the weights, floats minus rounded ones, shape [outputs, inputs of a group, kernel …].
        means: of the input's channels, shape [inputs].

    Returns:
        Of each output channel; zero padding is taken for the mean.
    """
    outputs, inputs = error.shape[:2]
    taps = error.astype(np.float64).reshape(outputs, inputs, -1).sum(axis=2)
    groups = means.size // inputs
    shift: NDArray[np.float64] = np.einsum("goi,gi->go", taps.reshape(groups, -1, inputs), means.reshape(groups, -1))
    return shift.ravel()
