"""What FP16 cannot hold. ONNX Runtime's CPU kernels compute halves in floats: no comparison shows an overflow.

A value beyond 65,504 is infinite on a GPU, and what follows from it is lost.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.onnx.quantize.graph import infer_shapes, is_constant, open_editor
from edgeq.converters.onnx.stages import StagedModel
from edgeq.planner.tensors.timing import Call

__all__ = ["nodes_that_touch", "too_large_for_half"]

_LARGEST_HALF = 65504.0
_MARGIN = 2.0  # inputs that were not seen may go further than those that were
_MASK = (
    -1e30
)  # what masks add to scores; as halves they may be cut or infinite, Softmax makes zeros of them all the same
_GRIDS = frozenset({"DequantizeLinear", "QuantizeLinear"})


def too_large_for_half(model: Path, calls: Sequence[Call], *, threads: int) -> dict[str, float]:
    """Values that come within a factor of two of FP16's largest number, with the largest absolute value of each.

    Args:
        model: in floats.
        calls: inputs.
        threads: of a call.

    Raises:
        ConversionError: the model cannot be run on these inputs.
        SessionError: ONNX Runtime cannot load it.
    """
    import onnx_ir as ir

    editor = open_editor(model)
    infer_shapes(editor)
    values = [value for node in editor.graph for value in node.outputs if not is_constant(value)]
    names = [value.name for value in values if value.name and value.dtype == ir.DataType.FLOAT]
    found: dict[str, float] = {}
    with StagedModel(model, names, threads=threads) as staged:
        for call in calls:
            for name, value in staged.run(dict(call)):
                found[name] = max(found.get(name, 0.0), _largest(value))
    return {name: largest for name, largest in found.items() if largest * _MARGIN > _LARGEST_HALF}


def _largest(value: NDArray[np.generic]) -> float:
    """The largest absolute value, masks left out."""
    floats = np.asarray(value, np.float32)
    high, low = float(floats.max(initial=0.0)), float(floats.min(initial=0.0))
    if low <= _MASK:
        low = float(floats.min(initial=0.0, where=floats > _MASK))
    return max(high, -low)


def nodes_that_touch(model: Path, values: Set[str]) -> frozenset[str]:
    """Names of nodes that make or read such values, in floats or on a grid.

    Args:
        model: the float model that the values were seen in, or a QDQ graph made of it.
        values: names of them.
    """
    large, found = set(values), set()
    for node in open_editor(model).graph:
        read = {value.name for value in node.inputs if value is not None}
        made = {value.name for value in node.outputs}
        if node.op_type in _GRIDS and read & large:
            large.update(name for name in made if name)
        if node.name and large & (read | made):
            found.add(node.name)
    return frozenset(found)
