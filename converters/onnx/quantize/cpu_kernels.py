"""Forms in which ONNX Runtime's integer kernels on a CPU find products that are already quantized."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgeq.converters.onnx.quantize.graph import Editor, array_of, attribute_int
from edgeq.converters.onnx.quantize.sites import Product, bias_behind

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["Quantized", "fuse_bias", "widen_input"]

Quantized = tuple["ir.Value", "ir.Value", "ir.Value"]
"""Integers, scale and zero point of a value."""

# The kernels for convolutions that need no copy of their input take channels by fours.
_CHANNELS = 4
_MOST_CHANNELS = 16  # beyond, three channels too many are no burden, and no gain either


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
