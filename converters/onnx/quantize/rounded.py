"""A model in BF16 as a CPU can compute it: in FP32, with every value rounded where the model has it in BF16.

ONNX Runtime's CPU kernels do not take BF16. Products of BF16 numbers accumulate in FP32 on a GPU too, so that the copy
differs from the model by the order of sums, and by roundings that a GPU leaves out where it fuses nodes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeq.converters.onnx.quantize.graph import Editor, infer_shapes, is_constant, open_editor, save_model
from edgeq.converters.onnx.quantize.half_kinds import BFLOAT16

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["write_rounded"]

# They only move or choose elements, which are rounded already.
_MOVES_NAMES = """
    Abs Concat DepthToSpace Expand Flatten Gather GatherElements GatherND Identity Max MaxPool Min Neg Pad Relu Reshape
    ScatterElements ScatterND Slice SpaceToDepth Split Squeeze Tile Transpose Trilu Unsqueeze Where
"""
_MOVES = frozenset(_MOVES_NAMES.split())


def write_rounded(model: Path, out: Path) -> None:
    """Write the copy of a model.

    Args:
        model: with values in BF16, of `edgeq.converters.onnx.quantize.half.to_half`; inputs and outputs in others.
        out: is written; weights beside it if they are large.

    Raises:
        SourceError: no sound ONNX file.
    """
    editor = open_editor(model)
    infer_shapes(editor)
    for value in tuple(editor.graph.initializers.values()):
        if value.dtype == BFLOAT16.dtype and is_constant(value):
            _to_floats(value)
    for node in tuple(editor.graph):
        rounds = node.op_type not in _MOVES or node.domain != ""
        for value in node.outputs:
            if value.dtype == BFLOAT16.dtype:
                _round(editor, node, value, rounds=rounds)
    save_model(editor, out)


def _to_floats(value: ir.Value) -> None:
    """A weight in FP32, which holds every number of BF16."""
    import onnx_ir as ir

    if value.const_value is not None:
        array = value.const_value.numpy().astype(np.float32)
        value.const_value = ir.Tensor(array, name=value.name)
        value.dtype = ir.DataType.FLOAT


def _round(editor: Editor, node: ir.Node, value: ir.Value, *, rounds: bool) -> None:
    """Let readers take a value rounded to BF16, of the name that it had; a cast to BF16 rounds by itself."""
    import onnx_ir as ir

    half, full, name = BFLOAT16.dtype, ir.DataType.FLOAT, value.name or ""
    if not rounds:
        value.dtype = full
        return
    casts = node.op_type == "Cast" and node.domain == ""
    users = tuple(value.uses())
    following = next((user for user in editor.graph if user in {use.node for use in users}), None)
    source = value
    if not casts:
        value.dtype = full
        source = _cast(editor, value, half, f"{name}_half", following)
    back = _cast(editor, source, full, f"{name}_rounded", following)
    for user, index in users:
        user.replace_input_with(index, back)
    value.name = editor.unique(f"{name}_exact")
    back.name = name


def _cast(editor: Editor, value: ir.Value, dtype: ir.DataType, name: str, before: ir.Node | None) -> ir.Value:
    import onnx_ir as ir

    made = editor.node("Cast", [value], name, before=before, attributes={"to": dtype.value}).outputs[0]
    made.type, made.shape = ir.TensorType(dtype), value.shape
    return made
