"""Computing what follows from constants and from sizes that are known."""

from __future__ import annotations

import numpy as np

from edgeq.converters.onnx.export.fold import fold_constants as fold_known
from edgeq.converters.onnx.quantize.graph import Editor, sizes_of

__all__ = ["fold_constants"]


def fold_constants(editor: Editor) -> int:
    """Replace nodes that read constants alone, and shapes that are known, by what they compute.

    Returns:
        How many nodes were replaced.
    """
    count = 0
    for node in editor.nodes("Shape"):
        sizes = sizes_of(node.inputs[0])
        value = node.outputs[0]
        if sizes is None or value.is_graph_output():
            continue
        start = node.attributes["start"].as_int() if "start" in node.attributes else 0
        end = node.attributes["end"].as_int() if "end" in node.attributes else len(sizes)
        wanted = sizes[start:end]
        if None in wanted:
            continue
        editor.replace(value, editor.constant(f"{value.name}_known", np.array(wanted, np.int64)))
        editor.remove([node])
        count += 1
    return count + fold_known(editor.model)
