"""Attention that reads its heads where they lie, for ONNX Runtime's CPU kernels.

Exporters move heads before each product, from [1, tokens, heads, width] to [1, heads, tokens, width], which copies
queries, keys and values. FusedMatMul takes the batch of a product from the middle of three axes (``transBatchA`` and
``transBatchB``, onnxruntime's docs/ContribOperators.md): then nothing but the result is moved, and every number stays
the same. That leaves no axis for a batch of calls, so it is for graphs that take one at a time.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from edgeq.converters.onnx.quantize.graph import Editor, array_of, attribute_int, attribute_ints, sizes_of, sole_reader

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["read_heads_in_place"]

_HEADS_FIRST = (0, 2, 1, 3)
_KEYS_LAST = (0, 2, 3, 1)  # and so are those of keys, for the product of queries with them


@dataclasses.dataclass(frozen=True)
class _Attention:
    """``Reshape(Transpose(Softmax(scale * (queries @ keys) + mask) @ values))``.

    Attributes:
        queries: likewise keys and values: [1, tokens, heads, width].
        scale: of the scores.
        mask: that is added to them; None without one.
        softmax: over the keys.
        reshape: that puts heads side by side again.
    """

    queries: ir.Value
    keys: ir.Value
    values: ir.Value
    scale: float
    mask: ir.Value | None
    softmax: ir.Node
    reshape: ir.Node


def read_heads_in_place(editor: Editor) -> int:
    """Let attention of one call at a time multiply its heads where they lie.

    Args:
        editor: of a model whose shapes are known.

    Returns:
        How many attentions were rewritten.
    """
    masks: dict[ir.Value, ir.Value] = {}
    count = 0
    for softmax in editor.nodes("Softmax"):
        found = _attention(softmax)
        if found is not None:
            _rewrite(editor, found, masks)
            count += 1
    return count


def _attention(softmax: ir.Node) -> _Attention | None:
    """What a Softmax is the middle of; None if it is something else, or reads what others read too."""
    scores, scale, mask = _scores(softmax.inputs[0])
    mixed = sole_reader(softmax.outputs[0])
    if scores is None or attribute_int(softmax, "axis", -1) not in (-1, 3) or not _fits(mask):
        return None
    if mixed is None or mixed.op_type != "MatMul" or mixed.inputs[0] is not softmax.outputs[0]:
        return None
    moved = sole_reader(mixed.outputs[0])
    reshape = None if moved is None else sole_reader(moved.outputs[0])
    if moved is None or not _moves(moved, _HEADS_FIRST) or reshape is None or not _takes_any_rank(reshape):
        return None
    queries, keys = _heads(scores.inputs[0], _HEADS_FIRST), _heads(scores.inputs[1], _KEYS_LAST)
    values = _heads(mixed.inputs[1], _HEADS_FIRST)
    if queries is None or keys is None or values is None:
        return None
    return _Attention(queries, keys, values, scale, mask, softmax, reshape)


def _scores(value: ir.Value | None) -> tuple[ir.Node | None, float, ir.Value | None]:
    """The product behind Softmax's input, its scale, and the mask."""
    node, mask = _maker(value), None
    if node is not None and node.op_type == "Add":
        first, second = node.inputs
        if _scaled(first)[0] is None:
            first, second = second, first
        value, mask = first, second
    return (*_scaled(value), mask)


def _scaled(value: ir.Value | None) -> tuple[ir.Node | None, float]:
    """A product, perhaps times a number."""
    node = _maker(value)
    if node is None:
        return None, 1.0
    if node.op_type == "MatMul":
        return node, 1.0
    if node.op_type not in ("Mul", "Div"):
        return None, 1.0
    places = (1, 0) if node.op_type == "Mul" else (1,)
    for place in places:
        number, product = array_of(node.inputs[place]), _maker(node.inputs[1 - place])
        if number is not None and number.size == 1 and product is not None and product.op_type == "MatMul":
            factor = float(number.reshape(()))
            return product, factor if node.op_type == "Mul" else 1.0 / factor
    return None, 1.0


def _maker(value: ir.Value | None) -> ir.Node | None:
    """The standard node that makes a value, if one node alone reads that."""
    node = None if value is None else value.producer()
    return node if value is not None and node is not None and node.domain == "" and sole_reader(value) else None


def _moves(node: ir.Node, order: tuple[int, ...]) -> bool:
    return node.op_type == "Transpose" and node.domain == "" and attribute_ints(node, "perm") == order


def _heads(value: ir.Value | None, order: tuple[int, ...]) -> ir.Value | None:
    """What is moved to a value, if it is [1, tokens, heads, width] of floats."""
    import onnx_ir as ir

    node = None if value is None else value.producer()
    source = None if node is None or not _moves(node, order) else node.inputs[0]
    if source is None or source.dtype != ir.DataType.FLOAT:  # the kernel knows no other type
        return None
    sizes = sizes_of(source) or ()
    return source if len(sizes) == len(order) and sizes[0] == 1 and None not in sizes[2:] else None


def _fits(mask: ir.Value | None) -> bool:
    """Whether a mask has no batch: at most four axes, the first of them of one."""
    if mask is None:
        return True
    sizes = sizes_of(mask)
    return sizes is not None and (len(sizes) < 4 or (len(sizes) == 4 and sizes[0] == 1))


def _takes_any_rank(node: ir.Node) -> bool:
    """Whether a Reshape copies no axis of what it reads."""
    sizes = array_of(node.inputs[1]) if node.op_type == "Reshape" and node.domain == "" else None
    return sizes is not None and bool(np.all(sizes != 0))


def _rewrite(editor: Editor, found: _Attention, masks: dict[ir.Value, ir.Value]) -> None:
    name, before = found.softmax.name or "attention", found.softmax
    domain = "com.microsoft"
    sides = (("queries", found.queries), ("keys", found.keys), ("values", found.values))
    queries, keys, values = (_without_batch(editor, value, f"{name}_{side}", before) for side, value in sides)
    both = {"transBatchA": 1, "transBatchB": 1, "transB": 1, "alpha": found.scale}
    scores = editor.node(
        "FusedMatMul", [queries, keys], f"{name}_scores", before=before, attributes=both, domain=domain
    ).outputs[0]
    if found.mask is not None:
        mask = masks.get(found.mask) or _squeezed(editor, found.mask, before)
        masks[found.mask] = mask
        scores = editor.node("Add", [scores, mask], f"{name}_masked", before=before).outputs[0]
    shares = editor.node("Softmax", [scores], f"{name}_shares", before=before, attributes={"axis": -1}).outputs[0]
    mixed = editor.node(
        "FusedMatMul", [shares, values], f"{name}_mixed", before=before, attributes={"transBatchB": 1}, domain=domain
    ).outputs[0]
    moved = editor.node("Transpose", [mixed], f"{name}_moved", before=before, attributes={"perm": (1, 0, 2)})
    found.reshape.replace_input_with(0, moved.outputs[0])


def _without_batch(editor: Editor, value: ir.Value, name: str, before: ir.Node) -> ir.Value:
    """[tokens, heads, width] of [1, tokens, heads, width], straight from what was reshaped to that."""
    heads, width = (sizes_of(value) or ())[2:]
    node = value.producer()
    source = node.inputs[0] if node is not None and node.op_type == "Reshape" and node.domain == "" else value
    shape = editor.constant(f"{name}_shape", np.array([-1, heads, width], np.int64))
    return editor.node("Reshape", [source, shape], name, before=before).outputs[0]


def _squeezed(editor: Editor, mask: ir.Value, before: ir.Node) -> ir.Value:
    """The same mask without its axis of calls."""
    if len(sizes_of(mask) or ()) < 4:
        return mask
    first = editor.constant(f"{mask.name}_first", np.array([0], np.int64))
    return editor.node("Squeeze", [mask, first], f"{mask.name}_of_one", before=before).outputs[0]
