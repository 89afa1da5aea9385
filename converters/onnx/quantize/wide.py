"""Several products of one input, such as queries, keys and values, as one wide product and a Split.

Each column of the wide product is the same sum as before. One grid serves all of it when it is quantized in each call.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from edgeq.converters.onnx.quantize.graph import Editor, array_of
from edgeq.converters.onnx.quantize.sites import Product, bias_behind, editor_products

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["join_products"]


@dataclasses.dataclass(frozen=True)
class _Branch:
    """One product with its bias."""

    product: Product
    bias: ir.Value | None
    last: ir.Node


def join_products(editor: Editor) -> int:
    """Join all MatMuls with constant weights that read the same value, each with or each without a bias behind it.

    Returns:
        How many wide products were made.
    """
    groups: dict[tuple[ir.Value, bool], list[_Branch]] = {}
    for node, product in editor_products(editor).items():
        if node.op_type != "MatMul":
            continue
        branch = _branch(product)
        if branch is not None:
            groups.setdefault((product.activation, branch.bias is not None), []).append(branch)
    count = 0
    for branches in groups.values():
        if len(branches) > 1:
            _join(editor, branches)
            count += 1
    return count


def _branch(product: Product) -> _Branch | None:
    if product.node.outputs[0].is_graph_output():
        return None
    found = bias_behind(product)
    if found is None:
        return _Branch(product, None, product.node)
    after, bias = found
    return None if after.outputs[0].is_graph_output() else _Branch(product, bias, after)


def _join(editor: Editor, branches: list[_Branch]) -> None:
    first = branches[0].product
    weights = [array for branch in branches if (array := array_of(branch.product.weight)) is not None]
    columns = [weight.shape[1] for weight in weights]
    name = f"{first.name}_wide"
    before = first.node
    wide = editor.constant(f"{first.weight.name}_wide", np.concatenate(weights, axis=1))
    made = editor.node("MatMul", [first.activation, wide], name, before=before)
    biases = [array for branch in branches if (array := array_of(branch.bias)) is not None]
    if biases:
        bias = editor.constant(f"{name}_bias", np.concatenate(biases))
        made = editor.node("Add", [made.outputs[0], bias], f"{name}_biased", before=before)
    sizes = editor.constant(f"{name}_columns", np.array(columns, np.int64))
    parts = editor.node(
        "Split", [made.outputs[0], sizes], f"{name}_parts", before=before, attributes={"axis": -1}, outputs=len(columns)
    )
    for branch, part in zip(branches, parts.outputs, strict=True):
        old = branch.last.outputs[0]
        part.type, part.shape = old.type, old.shape
        editor.replace(old, part)
    editor.tidy()
