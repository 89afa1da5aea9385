"""Forms in which ONNX Runtime's integer kernels on a CPU find products that are already quantized."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgeq.converters.onnx.quantize.graph import Editor, array_of, attribute_int, sizes_of, sole_reader
from edgeq.converters.onnx.quantize.sites import Product, bias_behind

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["Quantized", "fuse_bias", "repeat_factors", "widen_input"]

Quantized = tuple["ir.Value", "ir.Value", "ir.Value"]
"""Integers, scale and zero point of a value."""

# The kernels for convolutions that need no copy of their input take channels by fours.
_CHANNELS = 4
_MOST_CHANNELS = 16  # beyond, three channels too many are no burden, and no gain either
# Pixels from which a factor for each channel is repeated: 6 to 9 ns for each against 10 to 20 us for the nodes that do.
_FEWEST_PIXELS = 3000


def fuse_bias(editor: Editor, product: Product, source: Quantized) -> None:
    """Write a MatMul of integers as the operator that adds its bias too.

    ONNX Runtime first makes a Gemm of a MatMul and the Add behind it, and then finds no integer kernel for it.

    Args:
        editor: of the model.
        product: a MatMul whose weight is dequantized.
        source: of its activation.
    """
    node, (quantized, scale, zero) = product.node, source
    weight, weight_scale, weight_zero = _integers(node, 1)
    inputs: list[ir.Value | None] = [quantized, weight, scale, weight_scale, zero, weight_zero]
    last, found = node, bias_behind(product)
    if found is not None:
        last, bias = found
        inputs.append(bias)
    made = editor.node(
        "MatMulIntegerToFloat",
        inputs,
        f"{product.name}_integer",
        before=node,
        domain="com.microsoft",
        like=last.outputs[0],
    )
    editor.replace(last.outputs[0], made.outputs[0])


def widen_input(editor: Editor, product: Product, source: Quantized) -> None:
    """Give the first convolution, of images of three channels, a fourth one of zeros.

    Args:
        editor: of the model.
        product: a convolution whose weight is dequantized.
        source: of its activation.
    """
    node = product.node
    weight, scales, zeros = _integers(node, 1)
    integers = array_of(weight)
    if integers is None or integers.ndim != 4 or attribute_int(node, "group", 1) != 1:
        return
    more = -integers.shape[1] % _CHANNELS
    if not more or integers.shape[1] > _MOST_CHANNELS:
        return
    quantized, scale, zero = source
    name = node.name or "conv"
    ends = editor.constant(f"{name}_more_channels", np.array([0, 0, 0, 0, 0, more, 0, 0], np.int64))
    padded = editor.node("Pad", [quantized, ends, zero], f"{name}_widened", before=None)
    floats = editor.node("DequantizeLinear", [padded.outputs[0], scale, zero], f"{name}_widened_floats", before=None)
    wide = editor.constant(f"{weight.name}_wide", np.pad(integers, ((0, 0), (0, more), (0, 0), (0, 0))))
    kernel = editor.node(
        "DequantizeLinear", [wide, scales, zeros], f"{name}_widened_weight", before=None, attributes={"axis": 0}
    )
    node.replace_input_with(0, floats.outputs[0])
    node.replace_input_with(1, kernel.outputs[0])


def repeat_factors(editor: Editor) -> int:
    """Let products with a factor for each channel, as of squeeze-and-excitation, read it once for each column.

    Channels lie last in ONNX Runtime's integer layout, where its kernel starts anew at each pixel; a factor that is
    repeated along the rows lets it go through a whole row. Every result stays the same.

    Args:
        editor: of a model whose grids are written.

    Returns:
        How many factors are repeated.
    """
    count = 0
    for node in editor.nodes("Mul"):
        after = sole_reader(node.outputs[0])
        if after is None or after.op_type != "QuantizeLinear" or not all(map(_grid_of, node.inputs)):
            continue
        for place in (0, 1):
            factor, columns = node.inputs[place], _columns(node, place)
            grid = _grid_of(factor)
            if not columns or not grid:
                continue
            name = node.name or "mul"
            row = editor.constant(f"{name}_row", np.array([1, 1, 1, columns], np.int64))
            made = editor.node("Expand", [factor, row], f"{name}_repeated", before=node)
            # On the same grid again, so that bytes are repeated.
            made = editor.node("QuantizeLinear", [made.outputs[0], *grid], f"{name}_repeated_quantize", before=node)
            made = editor.node("DequantizeLinear", [made.outputs[0], *grid], f"{name}_repeated_floats", before=node)
            node.replace_input_with(place, made.outputs[0])
            count += 1
            break
    return count


def _columns(node: ir.Node, place: int) -> int:
    """Of the image that a factor for each channel is multiplied with; 0 if it is no such factor, or a small image."""
    factor, image = sizes_of(node.inputs[place]), sizes_of(node.inputs[1 - place])
    if factor is None or image is None or len(factor) != 4 or len(image) != 4:
        return 0
    (channels, *pixel), (own, height, width) = factor[1:], image[1:]
    fits = pixel == [1, 1] and channels is not None and channels == own and factor[0] == image[0]
    return width if fits and height and width and height * width >= _FEWEST_PIXELS else 0


def _grid_of(value: ir.Value | None) -> tuple[ir.Value | None, ...]:
    """Scale and zero point of a dequantized value; empty if it is none."""
    maker = None if value is None else value.producer()
    return tuple(maker.inputs[1:3]) if maker is not None and maker.op_type == "DequantizeLinear" else ()


def _integers(node: ir.Node, place: int) -> Quantized:
    """What is dequantized to make an input of a node."""
    value = node.inputs[place]
    maker = None if value is None else value.producer()
    assert maker is not None
    integers, scale, zero = maker.inputs
    assert integers is not None
    assert scale is not None
    assert zero is not None
    return integers, scale, zero
