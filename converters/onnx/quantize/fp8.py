"""FP8 E4M3 for TensorRT: inputs and weights of products as float8e4m3fn, with one scale for each tensor.

The scale is the largest absolute value over 448, the largest number of the type. Quantization to FP8 exists since opset
19 (https://onnx.ai/onnx/technical/float8.html), in TensorRT on compute capability 8.9 and newer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.onnx.quantize.affine import FP8_MAX, Bounds
from edgeq.converters.onnx.quantize.graph import Editor, array_of, open_editor, require_opset, save_model
from edgeq.converters.onnx.quantize.placement import place_for_tensorrt
from edgeq.converters.onnx.quantize.sites import Product
from edgeq.errors import ConversionError

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["fp8_scale", "fp8_tensors", "quantize_fp8", "round_fp8"]

_LEAST_OPSET = 19
_LEAST_SCALE = 2.0**-60


def fp8_tensors(model: Path, keep_float: Set[str] = frozenset()) -> tuple[str, ...]:
    """Names of the values whose ranges `quantize_fp8` asks for.

    Raises:
        SourceError: no sound ONNX file.
    """
    return place_for_tensorrt(open_editor(model), keep_float, residuals=False).tensors


def quantize_fp8(model: Path, out: Path, ranges: Mapping[str, Bounds], *, keep_float: Set[str] = frozenset()) -> None:
    """Write a model whose products read FP8.

    Args:
        model: cleaned floats of opset 19 or newer.
        out: is written; weights beside it if they are large.
        ranges: of each of `fp8_tensors`.
        keep_float: names of nodes that stay floats.

    Raises:
        ConversionError: a range that is missing or not finite, an old opset, or nothing to quantize.
        SourceError: no sound ONNX file.
    """
    editor = open_editor(model)
    require_opset(editor, _LEAST_OPSET, "FP8")
    placement = place_for_tensorrt(editor, keep_float, residuals=False)
    if not placement.products:
        raise ConversionError("The model has no node that could be quantized", "Ship it as it is")
    missing = [name for name in placement.tensors if name not in ranges]
    if missing:
        raise ConversionError(
            f"{len(missing)} tensors have no range, such as {missing[0]!r}", "Calibrate all of fp8_tensors()"
        )
    for product in placement.products:
        _weight(editor, product)
    for point in placement.points:
        value = point.value
        bounds = ranges[value.name or ""]
        scale, zero = _grid(
            editor, value.name or "", fp8_scale(value.name or "", max(abs(bounds.low), abs(bounds.high)))
        )
        uses = [use for use in value.uses() if use.node in (point.readers or ())]
        quantized = editor.node("QuantizeLinear", [value, scale, zero], f"{value.name}_quantize", before=None)
        floats = editor.node(
            "DequantizeLinear", [quantized.outputs[0], scale, zero], f"{value.name}_dequantize", before=None, like=value
        )
        for use in uses:
            use.node.replace_input_with(use.idx, floats.outputs[0])
    save_model(editor, out)


def round_fp8(x: NDArray[Any], scale: float) -> NDArray[Any]:
    """Numbers of float8e4m3fn nearest to ``x / scale``; what is larger than 448 becomes 448."""
    import ml_dtypes

    scaled = np.clip(x.astype(np.float32) / np.float32(scale), -FP8_MAX, FP8_MAX)
    rounded: NDArray[Any] = scaled.astype(ml_dtypes.float8_e4m3fn)
    return rounded


def fp8_scale(name: str, peak: float) -> float:
    """The scale of a tensor whose largest absolute value is ``peak``.

    Raises:
        ConversionError: it is not finite.
    """
    if not math.isfinite(peak):
        raise ConversionError(f"The range of {name!r} is not finite", "Calibrate with inputs that give finite numbers")
    return float(np.float32(max(peak / FP8_MAX, _LEAST_SCALE) if peak > 0 else 1.0))


def _grid(editor: Editor, name: str, scale: float) -> tuple[ir.Value, ir.Value]:
    import ml_dtypes
    import onnx_ir as ir

    return (
        editor.constant(f"{name}_scale", np.array(scale, np.float32)),
        editor.constant(f"{name}_zero_point", np.zeros((), ml_dtypes.float8_e4m3fn), ir.DataType.FLOAT8E4M3FN),
    )


def _weight(editor: Editor, product: Product) -> None:
    import onnx_ir as ir

    weight = array_of(product.weight)
    if weight is None:
        raise ConversionError(f"The weight of {product.name!r} is not constant", "Export the model again")
    name = product.weight.name or product.name
    scale = fp8_scale(name, float(np.abs(weight).max(initial=0.0)))
    inputs = (
        editor.constant(f"{name}_fp8", round_fp8(weight, scale), ir.DataType.FLOAT8E4M3FN),
        *_grid(editor, name, scale),
    )
    floats = editor.node("DequantizeLinear", inputs, f"{name}_dequantize", before=product.node)
    product.node.replace_input_with(1, floats.outputs[0])
