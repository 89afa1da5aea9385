"""What is computed from positions and counts alone, up to where BF16 would spoil it.

Whole numbers are exact in BF16 up to 256. An angle of position 500 is off by one or more, and its sine says nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeq.converters.onnx.quantize.graph import Editor, is_constant

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["precise_nodes"]

# They need every digit of what they read.
_PRECISE = frozenset({"Ceil", "Cos", "Floor", "Mod", "Round", "Sin", "Tan"})
_COUNTS = frozenset({"CumSum", "Range"})
_ON_THE_WAY_NAMES = """
    Abs Add Cast Clip Concat Div Einsum Exp Expand Flatten Gather Gemm Identity Log MatMul Max Min Mul Neg Pow
    Reciprocal Reshape Slice Split Sqrt Squeeze Sub Tile Transpose Unsqueeze Where
"""
_ON_THE_WAY = frozenset(_ON_THE_WAY_NAMES.split())


def precise_nodes(editor: Editor) -> frozenset[ir.Node]:
    """Nodes that must keep FP32's digits: those that need them, and what makes their inputs of whole numbers.

    Products are among them where positions are multiplied with frequencies.
    """
    counts = _of_counts(editor)
    found = set(editor.nodes(*_PRECISE))
    waiting = list(found)
    while waiting:
        for value in waiting.pop().inputs:
            maker = None if value is None else value.producer()
            if maker is not None and maker in counts and maker not in found:
                found.add(maker)
                waiting.append(maker)
    return frozenset(found)


def _of_counts(editor: Editor) -> set[ir.Node]:
    """Nodes that make floats of whole numbers, of counts, and of constants, and of nothing else."""
    import onnx_ir as ir

    found: set[ir.Node] = set()
    for node in editor.nodes():
        given = [value for value in node.inputs if value is not None and not is_constant(value)]
        floats = [value for value in given if value.dtype in (None, ir.DataType.FLOAT)]
        starts = node.op_type in _COUNTS or (node.op_type == "Cast" and not floats)
        follows = node.op_type in _ON_THE_WAY and floats and all(value.producer() in found for value in floats)
        if starts or follows:
            found.add(node)
    return found
