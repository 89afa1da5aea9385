"""Scales of grids that float16 does not hold: below 6e-8 they vanish, below 6e-5 they lose digits; 65,504 is the end.

Channels of a weight that training has let die have such scales beside ordinary ones: they are put on grids that float16
holds, in steps that are as fine as float16 itself is there. Where a whole tensor is that small or large, its grid, and
what computes on its integers, stay float32; the products themselves are of 8 bits all the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.onnx.quantize.graph import Editor, array_of, attribute_int

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["GRIDS", "fine_grids", "refit_channels", "refitted", "with_their_grids"]

GRIDS = frozenset({"DequantizeLinear", "QuantizeLinear"})
_LEAST_NORMAL, _LEAST, _LARGEST = 2.0**-14, 2.0**-24, 65504.0  # of float16
# From here on rounding changes a scale by less than a 512th, half of what INT8 rounds its largest numbers by.
_ROUNDS_WELL = 2.0**-16


def refit_channels(editor: Editor) -> None:
    """Give the small channels of weights scales that float16 holds."""
    for node in editor.nodes("DequantizeLinear"):
        integers, scales = array_of(node.inputs[0]), array_of(node.inputs[1])
        if integers is None or scales is None or not _has_small_channels(node, integers, scales):
            continue
        weight, steps = refitted(integers, scales, attribute_int(node, "axis", 1))
        node.replace_input_with(0, editor.constant(f"{node.name}_refitted", weight))
        node.replace_input_with(1, editor.constant(f"{node.name}_steps", steps))


def _has_small_channels(node: ir.Node, integers: NDArray[Any], scales: NDArray[Any]) -> bool:
    zero = array_of(node.inputs[2]) if len(node.inputs) > 2 else None
    plain = integers.dtype == np.int8 and scales.dtype == np.float32 and (zero is None or not zero.any())
    small = (scales > 0) & (scales < _ROUNDS_WELL)
    return bool(plain and scales.ndim == 1 and small.any() and not _is_beyond(scales))


def refitted(
    integers: NDArray[np.int8], scales: NDArray[np.float32], axis: int
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """The same weights in steps that float16 holds exactly where they were too small for it.

    Args:
        integers: with zero point 0.
        scales: float32 of (channels,).
        axis: of the channels.

    Returns:
        Integers and scales of the same shapes. Steps are never finer than before, and at most 2^-24 coarser.
    """
    steps = np.ceil(scales.astype(np.float64) / _LEAST) * _LEAST
    new = np.where((scales > 0) & (scales < _ROUNDS_WELL), steps, scales.astype(np.float64))
    shape = [1] * integers.ndim
    shape[axis] = -1
    # A scale of 0 makes zeros of its channel before and after.
    ratios = np.divide(scales, new, out=np.ones_like(new), where=new != 0)
    return np.rint(integers * ratios.reshape(shape)).astype(np.int8), new.astype(np.float32)


def fine_grids(editor: Editor) -> frozenset[ir.Node]:
    """Grids whose scales float16 does not hold, and what goes with them."""
    return with_their_grids(node for node in editor.nodes(*GRIDS) if _is_fine(node))


def with_their_grids(nodes: Iterable[ir.Node]) -> frozenset[ir.Node]:
    """Nodes, all grids that they read, and whatever else computes on the integers of those.

    Runtimes put a grid and its product together only where nothing lies between them, not even a cast: all of them
    must have one type.
    """
    found = set(nodes)
    todo = list(found)
    while todo:
        node = todo.pop()
        beside = [value.producer() for value in node.inputs if value is not None]
        near = {other for other in beside if other is not None and other.op_type in GRIDS}
        if node.op_type in GRIDS:
            near |= {reader for value in node.outputs for reader in value.consumers()}
        todo += near - found
        found |= near
    return frozenset(found)


def _is_fine(node: ir.Node) -> bool:
    scales = array_of(node.inputs[1])
    return scales is not None and scales.dtype == np.float32 and _is_beyond(scales)


def _is_beyond(scales: NDArray[Any]) -> bool:
    """Whether some scale is too large, or all are too small; zeros do not count."""
    largest = float(np.abs(scales).max(initial=0.0))
    return largest > _LARGEST or 0 < largest < _LEAST_NORMAL
