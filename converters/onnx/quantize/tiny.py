"""Numbers that float16 does not hold because they are too small, such as the 1e-12 that keeps a norm from being 0.

Rounded to 0 they no longer keep a quotient from being infinite or no number at all. Then it is not enough that the node
with the constant stays float32: its output is as small, and so is what is looked at, rooted or reshaped of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgeq.converters.onnx.quantize.graph import Editor, array_of
from edgeq.converters.onnx.quantize.half_scales import GRIDS, with_their_grids

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["tiny_numbers"]

_LEAST_NORMAL = 2.0**-14  # of float16
_PRODUCTS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
# Give on what they read, or its inverse, which is as far from float16.
_PASS_ON = frozenset(
    {"Abs", "Clip", "Expand", "Flatten", "Identity", "Max", "Min", "Neg", "Pow", "Reciprocal", "Reshape", "Slice"}
    | {"Sqrt", "Squeeze", "Tile", "Transpose", "Unsqueeze", "Where"}
)


def tiny_numbers(editor: Editor) -> dict[ir.Node, float]:
    """Nodes that must stay float32 for numbers below 2^-14, where those of float16 lose digits until they vanish.

    A constant counts if all its numbers are that small but zeros, a divisor also if one is; biases of products, which
    are added to larger numbers, do not.

    Returns:
        Node to the number.
    """
    found: dict[ir.Node, float] = {}
    for node in editor.nodes():
        number = _tiny_of(node)
        if number is not None:
            beside = with_their_grids([node]) if node.op_type in _PRODUCTS else (node,)
            found.update(dict.fromkeys(beside, number))
    todo = [node for node in found if node.op_type not in _PRODUCTS]
    while todo:
        node = todo.pop()
        readers = [reader for value in node.outputs for reader in value.consumers() if reader not in found]
        for reader in readers:
            if reader.domain == "" and reader.op_type not in _PRODUCTS | GRIDS:
                found[reader] = found[node]
                todo += [reader] if reader.op_type in _PASS_ON else []
    return found


def _tiny_of(node: ir.Node) -> float | None:
    if node.op_type in GRIDS:
        return None
    for index, value in enumerate(node.inputs):
        array = None if value is None else array_of(value)
        if array is None or array.dtype != np.float32 or (node.op_type in _PRODUCTS and index > 1):
            continue
        sizes = np.abs(array[array != 0])
        limit = sizes.min(initial=np.inf) if (node.op_type, index) == ("Div", 1) else sizes.max(initial=0.0)
        if 0 < limit < _LEAST_NORMAL:
            return float(sizes.min())
    return None
