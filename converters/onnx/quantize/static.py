"""Static INT8: calibrated grids for activations, a scale for each output channel of the weights, as QDQ graphs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.onnx.quantize.affine import (
    Affine,
    Bounds,
    IntType,
    affine_of,
    least_scales,
    quantize_bias,
    quantize_weight,
)
from edgeq.converters.onnx.quantize.bias_correction import shift_of
from edgeq.converters.onnx.quantize.cpu_kernels import Quantized, fuse_bias, repeat_factors, widen_input
from edgeq.converters.onnx.quantize.graph import Editor, array_of, open_editor, require_opset, save_model
from edgeq.converters.onnx.quantize.heads import read_heads_in_place
from edgeq.converters.onnx.quantize.narrow import quantize_narrow
from edgeq.converters.onnx.quantize.placement import Placement, Point, place_for_cpu, place_for_tensorrt
from edgeq.converters.onnx.quantize.sites import Product
from edgeq.errors import ConversionError

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["Activations", "calibration_tensors", "is_tensorrt", "place_for", "quantize_static"]

Activations = Literal["u8", "s8"]

_TYPES: dict[str, IntType] = {"u8": "uint8", "s8": "int8"}
_LEAST_OPSET = 13  # scales for each channel
_STEPS, _NARROW_STEPS = 127, 63


@dataclasses.dataclass(frozen=True)
class _Span:
    low: float
    high: float


def is_tensorrt(backend: str) -> bool:
    """Whether a backend is TensorRT or TensorRT-RTX."""
    return backend.startswith("tensorrt")


def place_for(editor: Editor, backend: str, keep_float: Set[str]) -> Placement:
    """What is quantized for a backend.

    Raises:
        ConversionError: names that no node has, or a backend that computes nothing in static INT8.
    """
    unknown = sorted(set(keep_float) - {node.name for node in editor.graph if node.name})
    if unknown:
        raise ConversionError(f"No node is named {', '.join(map(repr, unknown[:5]))}", "Name nodes as they are listed")
    if is_tensorrt(backend):
        return place_for_tensorrt(editor, keep_float)
    if backend != "onnxruntime-cpu":
        raise ConversionError(
            f"{backend} has no INT8 kernels for QDQ graphs", "Quantize for tensorrt or onnxruntime-cpu, or use fp16"
        )
    return place_for_cpu(editor, keep_float)


def calibration_tensors(model: Path, backend: str, keep_float: Set[str] = frozenset()) -> tuple[str, ...]:
    """Names of the values whose ranges `quantize_static` asks for.

    Raises:
        ConversionError: see `quantize_static`.
        SourceError: no sound ONNX file.
    """
    return place_for(open_editor(model), backend, keep_float).tensors


def quantize_static(
    model: Path,
    out: Path,
    ranges: Mapping[str, Bounds],
    *,
    backend: str,
    activations: Activations,
    keep_float: Set[str] = frozenset(),
    narrow_weights: bool = False,
    means: Mapping[str, NDArray[np.float64]] | None = None,
) -> None:
    """Write a model whose products compute on 8-bit integers.

    LayerNormalization, Softmax, and residual sums of transformers stay floats; convolutional networks stay integers
    through pooling, sums, products, sigmoids and concatenations on ONNX Runtime's CPU kernels.

    Args:
        model: cleaned floats.
        out: is written; weights beside it if they are large.
        ranges: of each of `calibration_tensors`.
        backend: that it is made for.
        activations: ``"u8"`` with any zero point (x86), ``"s8"`` with any zero point (ARM) or, for TensorRT, with 0.
        keep_float: names of nodes that stay floats.
        narrow_weights: of fewer steps, for CPUs that add products of bytes in 16 bits (x86 without VNNI).
        means: of `edgeq.converters.onnx.quantize.bias_correction.channel_means`: biases take back what rounding the
            weights shifts outputs by; None leaves them as they are.

    Raises:
        ConversionError: a range that is missing or not finite, an old opset, activations that the backend does not
            take, names that no node has, or nothing to quantize.
        SourceError: no sound ONNX file.
    """
    editor = open_editor(model)
    require_opset(editor, _LEAST_OPSET, "a scale for each channel")
    symmetric = is_tensorrt(backend)
    if symmetric and activations != "s8":
        raise ConversionError("TensorRT takes no zero points", "Choose s8 activations")
    placement = place_for(editor, backend, keep_float)
    if not placement.products:
        raise ConversionError("The model has no node that could be quantized", "Ship it as it is")
    grids = _grids(placement, ranges, _TYPES[activations], symmetric=symmetric)
    writer = _Writer(editor, _NARROW_STEPS if narrow_weights else _STEPS, biases=not symmetric, means=means or {})
    for product in placement.products:
        writer.room(product, grids[product.activation])
    for product in placement.products:
        writer.weights(product, grids[product.activation])
    for point in placement.points:
        writer.point(point, grids[point.value])
    if not symmetric:
        for product in placement.products:
            source = writer.quantized[product.activation]
            if product.node.op_type == "MatMul":
                fuse_bias(editor, product, source)
            elif product.node.op_type == "Conv":
                widen_input(editor, product, source)
        repeat_factors(editor)
        read_heads_in_place(editor)
    save_model(editor, out)


def _grids(
    placement: Placement, ranges: Mapping[str, Bounds], dtype: IntType, *, symmetric: bool
) -> dict[ir.Value, Affine]:
    missing = [name for name in placement.tensors if name not in ranges]
    if missing:
        raise ConversionError(
            f"{len(missing)} tensors have no range, such as {missing[0]!r}", "Calibrate all of calibration_tensors()"
        )
    grids = {}
    for point in placement.points:
        name = point.root.name or ""
        fixed = placement.fixed(point)
        bounds: Bounds = _Span(*fixed) if fixed else ranges[name]
        limits = None if symmetric else placement.limits(point)
        if limits is not None:
            # What a Clip lets through lies between its bounds, and the grid must not reach beyond them.
            bounds = _Span(min(max(bounds.low, limits[0]), limits[1]), max(min(bounds.high, limits[1]), limits[0]))
        grids[point.value] = affine_of(name, bounds, dtype, symmetric=symmetric)
    return grids


class _Writer:
    """Puts Q and DQ nodes into a graph."""

    def __init__(self, editor: Editor, steps: int, *, biases: bool, means: Mapping[str, NDArray[np.float64]]) -> None:
        self.editor = editor
        self.steps = steps
        self.biases = biases
        self.means = means
        self.quantized: dict[ir.Value, Quantized] = {}
        self.least: dict[tuple[ir.Value, int], NDArray[np.float64]] = {}
        self.made: dict[tuple[ir.Value, int], tuple[Quantized, NDArray[np.float32]]] = {}

    def room(self, product: Product, grid: Affine) -> None:
        """Remember how small the scales of a weight may be, for the biases of all products that share it."""
        bias = self._integer_bias(product)
        if bias is None:
            return
        key, least = (product.weight, product.axis), least_scales(bias, grid.scale)
        self.least[key] = np.maximum(self.least.get(key, 0.0), least)

    def weights(self, product: Product, grid: Affine) -> None:
        """Let a product read its weight, and its bias if those are integers too, from integers."""
        key = (product.weight, product.axis)
        if key not in self.made:
            self.made[key] = self._quantized(product)
        constants, scales = self.made[key]
        self._dequantize(product, 1, constants, product.axis)
        bias = self._corrected_bias(product, constants, scales)
        if bias is None or product.bias is None:
            return
        if not self.biases:
            product.node.replace_input_with(2, self.editor.constant(f"{product.bias.name}_corrected", bias))
        else:
            steps, bias_scales = quantize_bias(bias, grid.scale, scales)
            self._dequantize(product, 2, self._constants(product.bias.name or "bias", steps, bias_scales), 0)

    def _corrected_bias(
        self, product: Product, constants: Quantized, scales: NDArray[np.float32]
    ) -> NDArray[np.float32] | None:
        """The bias with what rounding the weight shifts outputs by; as it is where means are not known."""
        bias, weight, integers = array_of(product.bias), array_of(product.weight), array_of(constants[0])
        means = self.means.get(product.activation.name or "")
        if means is None or bias is None or weight is None or integers is None or product.node.op_type != "Conv":
            return bias
        rounded = integers.astype(np.float32) * scales.reshape(-1, *[1] * (weight.ndim - 1))
        corrected: NDArray[np.float32] = (bias + shift_of(weight - rounded, means)).astype(np.float32)
        return corrected

    def _integer_bias(self, product: Product) -> NDArray[Any] | None:
        return array_of(product.bias) if self.biases else None

    def _quantized(self, product: Product) -> tuple[Quantized, NDArray[np.float32]]:
        weight = array_of(product.weight)
        if weight is None:
            raise ConversionError(f"The weight of {product.name!r} is not constant", "Export the model again")
        least = self.least.get((product.weight, product.axis))
        if self.steps == _NARROW_STEPS and weight.ndim == 2:
            integers, scales = quantize_narrow(weight, product.axis, least=least)
        else:
            integers, scales = quantize_weight(weight, product.axis, steps=self.steps, least=least)
        return self._constants(product.weight.name or product.name, integers, scales), scales

    def _constants(self, name: str, integers: NDArray[Any], scales: NDArray[np.float32]) -> Quantized:
        editor = self.editor
        return (
            editor.constant(f"{name}_quantized", integers),
            editor.constant(f"{name}_scale", scales),
            editor.constant(f"{name}_zero_point", np.zeros(scales.shape, integers.dtype)),
        )

    def _dequantize(self, product: Product, place: int, constants: Quantized, axis: int) -> None:
        """Each product gets a node of its own: runtimes fuse those that have one reader."""
        value = product.node.inputs[place]
        name = (value.name if value is not None else None) or product.name
        made = self.editor.node(
            "DequantizeLinear", constants, f"{name}_dequantize", before=product.node, attributes={"axis": axis}
        )
        product.node.replace_input_with(place, made.outputs[0])

    def point(self, point: Point, grid: Affine) -> None:
        """Put a value on its grid for its readers."""
        editor, value = self.editor, point.value
        uses = [use for use in value.uses() if point.readers is None or use.node in point.readers]
        leaves = point.readers is None and value.is_graph_output()
        scale = editor.constant(f"{value.name}_scale", np.array(grid.scale, np.float32))
        zero = editor.constant(f"{value.name}_zero_point", np.array(grid.zero_point, grid.dtype))
        source = value if point.folded is None else point.folded.inputs[0]
        quantized = editor.node("QuantizeLinear", [source, scale, zero], f"{value.name}_quantize", before=None)
        self.quantized[value] = (quantized.outputs[0], scale, zero)
        dequantized = editor.node(
            "DequantizeLinear",
            [quantized.outputs[0], scale, zero],
            f"{value.name}_dequantize",
            before=None,
            like=value,
        ).outputs[0]
        for use in uses:
            use.node.replace_input_with(use.idx, dequantized)
        if leaves:
            editor.replace(value, dequantized)
            # The output is read by the grid itself, which `replace` has just turned upon its own result.
            quantized.replace_input_with(0, source)
