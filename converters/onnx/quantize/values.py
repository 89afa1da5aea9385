"""Attention's values: where each channel behind attention comes from one channel of the product that makes values.

Each row of Softmax sums to one, so a factor and a summand of a channel pass from values through attention unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from edgeq.converters.onnx.quantize.graph import attribute_int, attribute_ints, sizes_of, sole_reader
from edgeq.converters.onnx.quantize.sites import Product, bias_behind

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["values_of"]

_HEADS_FIRST = (0, 2, 1, 3)


def values_of(value: ir.Value, products: Mapping[ir.Node, Product]) -> Product | None:
    """The product that makes the values which attention mixes to a value, channel for channel; None if none is seen.

    Seen is ``Reshape(Transpose(Softmax @ Transpose(Reshape(x W + b))))`` over four axes of which both Transposes
    exchange the middle ones, with nothing else reading what lies in between.

    Args:
        value: of shape [..., channels].
        products: all of the graph, by node.
    """
    mixed = _source(_source(value, "Reshape"), "Transpose")
    attention = None if mixed is None else mixed.producer()
    if mixed is None or attention is None or attention.op_type != "MatMul" or attention.domain != "":
        return None
    shares, values = attention.inputs
    softmax = None if shares is None else shares.producer()
    if softmax is None or softmax.op_type != "Softmax" or attribute_int(softmax, "axis", -1) not in (-1, 3):
        return None
    made = _source(_source(values, "Transpose"), "Reshape")
    if values is None or made is None or not _same_heads(values, mixed, sizes_of(value)):
        return None
    return _product_of(made, products)


def _source(value: ir.Value | None, op_type: str) -> ir.Value | None:
    """What a node of some type takes that makes a value, if nothing else reads that."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != op_type or node.domain != "":
        return None
    if op_type == "Transpose" and attribute_ints(node, "perm") != _HEADS_FIRST:
        return None
    source = node.inputs[0]
    return None if source is None or sole_reader(source) is not node else source


def _same_heads(values: ir.Value, mixed: ir.Value, channels: tuple[int | None, ...] | None) -> bool:
    """Whether values and what is mixed of them have as many heads of as many channels, and those are all channels."""
    first, second = sizes_of(values) or (), sizes_of(mixed) or ()
    if len(first) != 4 or len(second) != 4 or not channels:
        return False
    heads, width = first[1], first[3]
    if heads is None or width is None or (second[1], second[3]) != (heads, width):
        return False
    return channels[-1] == heads * width


def _product_of(value: ir.Value, products: Mapping[ir.Node, Product]) -> Product | None:
    """The product that makes a value, itself or with the bias behind it."""
    node = value.producer()
    if node is None or node in products:
        return None if node is None else products[node]
    for given in node.inputs:
        maker = None if given is None else given.producer()
        if maker is not None and maker in products:
            found = bias_behind(products[maker])
            return products[maker] if found is not None and found[0] is node else None
    return None
