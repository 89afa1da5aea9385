"""Dynamic INT8: weights as integers, activations put on a grid of their own in every call.

Written in the form that ONNX Runtime fuses to ``DynamicQuantizeMatMul`` (or ``MatMulIntegerToFloat`` where several
products share one grid): DynamicQuantizeLinear, MatMulInteger, Cast, and Mul by the product of both scales
(https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Set
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeq.converters.onnx.quantize.affine import quantize_weight
from edgeq.converters.onnx.quantize.embeddings import quantize_embeddings
from edgeq.converters.onnx.quantize.graph import Editor, array_of, open_editor, require_opset, save_model
from edgeq.converters.onnx.quantize.heads import read_heads_in_place
from edgeq.converters.onnx.quantize.narrow import quantize_narrow
from edgeq.converters.onnx.quantize.sites import Product, editor_products
from edgeq.errors import ConversionError

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["quantize_dynamic"]

_LEAST_OPSET = 11


def quantize_dynamic(
    model: Path,
    out: Path,
    *,
    keep_float: Set[str] = frozenset(),
    narrow_weights: bool = False,
    embeddings: bool = True,
) -> None:
    """Write a model whose matrix products compute on 8-bit integers; convolutions stay floats.

    Weights are signed, with a scale for each output channel; activations are unsigned, with any zero point, as
    DynamicQuantizeLinear makes them.

    Args:
        model: cleaned floats.
        out: is written; weights beside it if they are large.
        keep_float: names of nodes that stay floats.
        narrow_weights: of fewer steps, for CPUs that add products of bytes in 16 bits (x86 without VNNI).
        embeddings: whether tables that are looked up become integers too, with a scale for each row.

    Raises:
        ConversionError: an old opset, names that no node has, or nothing to quantize.
        SourceError: no sound ONNX file.
    """
    editor = open_editor(model)
    require_opset(editor, _LEAST_OPSET, "dynamic quantization")
    products = matrix_products(editor, keep_float)
    made = _Made(narrow_weights)
    for product in products:
        _rewrite(editor, product, made)
    if embeddings:
        quantize_embeddings(editor, keep_float)
    read_heads_in_place(editor)
    save_model(editor, out)


def matrix_products(editor: Editor, keep_float: Set[str]) -> tuple[Product, ...]:
    """Products with weights, without convolutions and without those that stay floats.

    Raises:
        ConversionError: names that no node has, or no product that is left.
    """
    unknown = sorted(set(keep_float) - {node.name for node in editor.graph if node.name})
    if unknown:
        raise ConversionError(f"No node is named {', '.join(map(repr, unknown[:5]))}", "Name nodes as they are listed")
    products = tuple(
        product
        for node, product in editor_products(editor).items()
        if node.op_type != "Conv" and node.name not in keep_float
    )
    if not products:
        raise ConversionError(
            "The model has no matrix product that could be quantized", "Quantize it statically, or ship it as it is"
        )
    return products


@dataclasses.dataclass(frozen=True)
class _Made:
    """What products share.

    Attributes:
        narrow: whether sums of two products must fit into 16 bits.
        grids: integers, scale and zero point of an activation.
        weights: the same of a weight, by its axis of output channels.
    """

    narrow: bool
    grids: dict[ir.Value, tuple[ir.Value, ...]] = dataclasses.field(default_factory=dict)
    weights: dict[tuple[ir.Value, int], tuple[ir.Value, ...]] = dataclasses.field(default_factory=dict)


def _weight_constants(editor: Editor, product: Product, narrow: bool) -> tuple[ir.Value, ...]:
    weight = array_of(product.weight)
    if weight is None:
        raise ConversionError(f"The weight of {product.name!r} is not constant", "Export the model again")
    integers, scales = (quantize_narrow if narrow else quantize_weight)(weight, product.axis)
    if product.axis == 0:
        integers = np.ascontiguousarray(integers.T)
    base = product.weight.name or product.name
    return (
        editor.constant(f"{base}_quantized", integers),
        editor.constant(f"{base}_scale", scales),
        editor.constant(f"{base}_zero_point", np.zeros(scales.shape, np.int8)),
    )


def _rewrite(editor: Editor, product: Product, made: _Made) -> None:
    import onnx_ir as ir

    node, name, key = product.node, product.name, (product.weight, product.axis)
    if product.activation not in made.grids:
        grid = editor.node(
            "DynamicQuantizeLinear", [product.activation], f"{product.activation.name}_quantize", before=node, outputs=3
        )
        made.grids[product.activation] = tuple(grid.outputs)
    if key not in made.weights:
        made.weights[key] = _weight_constants(editor, product, made.narrow)
    quantized, scale, zero = made.grids[product.activation]
    constants = made.weights[key]
    total = editor.node("MatMulInteger", [quantized, constants[0], zero, constants[2]], f"{name}_integer", before=node)
    floats = editor.node("Cast", total.outputs, f"{name}_cast", before=node, attributes={"to": ir.DataType.FLOAT.value})
    factor = editor.node("Mul", [scale, constants[1]], f"{name}_scales", before=node)
    last = editor.node(
        "Mul", [floats.outputs[0], factor.outputs[0]], f"{name}_scaled", before=node, like=node.outputs[0]
    )
    if product.bias is not None:
        last = editor.node("Add", [last.outputs[0], product.bias], f"{name}_biased", before=node, like=node.outputs[0])
    editor.replace(node.outputs[0], last.outputs[0])
    editor.remove([node])
