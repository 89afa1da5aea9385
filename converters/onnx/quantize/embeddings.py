"""Tables that are looked up (word embeddings) as integers: a quarter of their bytes, with a scale for each row."""

from __future__ import annotations

from collections.abc import Set
from typing import TYPE_CHECKING

import numpy as np

from edgeq.converters.onnx.quantize.affine import quantize_weight
from edgeq.converters.onnx.quantize.graph import Editor, array_of, attribute_int, is_constant, sizes_of

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["quantize_embeddings"]

# A smaller table costs more in three nodes than it gives back.
_LEAST_ELEMENTS = 1 << 20


def quantize_embeddings(editor: Editor, keep_float: Set[str] = frozenset(), *, least: int = _LEAST_ELEMENTS) -> int:
    """Let every Gather of rows from a large table of floats take integers, and scale what it gave.

    Args:
        editor: of the model.
        keep_float: names of nodes that stay floats.
        least: elements of a table that is worth it.

    Returns:
        How many lookups were changed. Tables that other nodes read too stay as they are.
    """
    import onnx_ir as ir

    made: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
    count = 0
    for node in editor.nodes("Gather"):
        table = node.inputs[0]
        if table is None or node.name in keep_float or not _is_table(table, least):
            continue
        if table not in made:
            array = array_of(table)
            if array is None:
                continue
            rows, scales = quantize_weight(array, 0)
            made[table] = (
                editor.constant(f"{table.name}_quantized", rows),
                editor.constant(f"{table.name}_scale", scales.reshape(-1, 1)),
            )
        rows_value, scales_value = made[table]
        name, indices = node.name or "gather", node.inputs[1]
        rows_node = editor.node("Gather", [rows_value, indices], f"{name}_rows", before=node)
        scale = editor.node("Gather", [scales_value, indices], f"{name}_scale", before=node)
        floats = editor.node(
            "Cast", rows_node.outputs, f"{name}_cast", before=node, attributes={"to": ir.DataType.FLOAT.value}
        )
        last = editor.node(
            "Mul", [floats.outputs[0], scale.outputs[0]], f"{name}_scaled", before=node, like=node.outputs[0]
        )
        editor.replace(node.outputs[0], last.outputs[0])
        editor.remove([node])
        count += 1
    return count


def _is_table(value: ir.Value, least: int) -> bool:
    import onnx_ir as ir

    shape = sizes_of(value)
    if not is_constant(value) or value.dtype != ir.DataType.FLOAT or shape is None or len(shape) != 2:
        return False
    if np.prod([size or 0 for size in shape]) < least or value.is_graph_output():
        return False
    return all(
        use.node.op_type == "Gather" and use.idx == 0 and attribute_int(use.node, "axis", 0) == 0
        for use in value.uses()
    )
