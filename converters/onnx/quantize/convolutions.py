"""Folding into convolutions what stands before and behind them: paddings, normalizations, factors and summands."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.onnx.quantize.graph import (
    Editor,
    array_of,
    attribute_float,
    attribute_ints,
    is_constant,
    sole_reader,
)
from edgeq.converters.onnx.quantize.sites import product_of

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["fold_affine", "fold_pads"]


def fold_affine(editor: Editor) -> int:
    """Fold BatchNormalization, and Mul and Add by a constant of each channel, into the convolution before it.

    Returns:
        How many nodes were folded.
    """
    count = 0
    for node in editor.nodes("Conv"):
        while node.graph is editor.graph and (replaced := _fold_next(editor, node)) is not None:
            node = replaced  # noqa: PLW2901 - a convolution takes several, one after another
            count += 1
    return count


def _fold_next(editor: Editor, node: ir.Node) -> ir.Node | None:
    product = product_of(node)
    after = sole_reader(node.outputs[0])
    if product is None or after is None or after.domain != "" or after.graph is not editor.graph:
        return None
    weight = array_of(product.weight)
    if weight is None:
        return None
    affine = _affine_of(after, node.outputs[0], weight.ndim, weight.shape[0])
    if affine is None:
        return None
    factor, summand = affine
    bias = array_of(product.bias)
    bias = np.zeros(weight.shape[0], np.float64) if bias is None else bias.astype(np.float64)
    scaled = weight.astype(np.float64) * factor.reshape(-1, *[1] * (weight.ndim - 1))
    name = node.name or "conv"
    inputs = [
        product.activation,
        editor.constant(f"{product.weight.name}_folded", scaled.astype(np.float32)),
        editor.constant(f"{name}_bias_folded", (bias * factor + summand).astype(np.float32)),
    ]
    import onnx_ir as ir

    made = ir.node("Conv", inputs, dict(node.attributes), name=editor.unique(name))
    made.outputs[0].name = editor.unique(f"{name}_folded_out")
    made.outputs[0].type, made.outputs[0].shape = after.outputs[0].type, after.outputs[0].shape
    editor.graph.insert_before(node, made)
    editor.replace(after.outputs[0], made.outputs[0])
    editor.remove([node, after])
    made.name = name
    return made


def _affine_of(
    node: ir.Node, value: ir.Value, rank: int, channels: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """A node as a factor and a summand of each channel, shape [channels]; None if it is more than that."""
    if node.op_type == "BatchNormalization":
        arrays = [array_of(given) for given in node.inputs[1:5]]
        trains = any(out.uses() for out in node.outputs[1:])
        if trains or any(array is None for array in arrays):
            return None
        scale, shift, mean, variance = (np.asarray(array, np.float64) for array in arrays)
        factor = scale / np.sqrt(variance + attribute_float(node, "epsilon", 1e-5))
        return factor, shift - mean * factor
    if node.op_type not in ("Mul", "Add") or len(node.inputs) != 2:
        return None
    other = node.inputs[1] if node.inputs[0] is value else node.inputs[0]
    vector = _per_channel(other, rank, channels)
    if vector is None:
        return None
    return (vector, np.zeros(channels)) if node.op_type == "Mul" else (np.ones(channels), vector)


def _per_channel(value: ir.Value | None, rank: int, channels: int) -> NDArray[np.float64] | None:
    """A constant that is the same over all but the channel's axis, as one number for each channel."""
    array: NDArray[Any] | None = array_of(value)
    if array is None or array.ndim > rank:
        return None
    shape = (1,) * (rank - array.ndim) + array.shape
    if array.size == 1:
        return np.full(channels, float(array.reshape(-1)[0]))
    if shape[1] != channels or array.size != channels:
        return None
    return array.reshape(-1).astype(np.float64)


def fold_pads(editor: Editor) -> int:
    """Let a convolution pad with zeros itself.

    Returns:
        How many paddings were folded.
    """
    import onnx_ir as ir

    count = 0
    for node in editor.nodes("Conv"):
        pad = None if node.inputs[0] is None else node.inputs[0].producer()
        if pad is None or pad.op_type != "Pad" or pad.domain != "" or not _same_pads(node):
            continue
        sizes = _zero_pads(pad)
        spatial = len(sizes) // 2 - 2
        if not sizes or spatial < 1 or min(sizes) < 0 or any(sizes[i] for i in (0, 1, spatial + 2, spatial + 3)):
            continue
        own = attribute_ints(node, "pads") or (0,) * (2 * spatial)
        more = (*sizes[2 : spatial + 2], *sizes[spatial + 4 :])
        node.attributes["pads"] = ir.AttrInt64s("pads", [a + b for a, b in zip(own, more, strict=True)])
        node.replace_input_with(0, pad.inputs[0])
        if not pad.outputs[0].uses() and not pad.outputs[0].is_graph_output():
            editor.remove([pad])
        count += 1
    return count


def _same_pads(node: ir.Node) -> bool:
    """Whether a convolution says its paddings in numbers."""
    auto = node.attributes.get("auto_pad")
    return auto is None or auto.as_string() in ("NOTSET", "VALID")


def _zero_pads(node: ir.Node) -> tuple[int, ...]:
    """Numbers of zeros before and behind each axis; empty if it pads with something else, or by computed numbers."""
    mode = node.attributes.get("mode")
    if mode is not None and mode.as_string() != "constant":
        return ()
    if len(node.inputs) < 2 or (len(node.inputs) > 3 and node.inputs[3] is not None):
        return ()
    value = node.inputs[2] if len(node.inputs) > 2 else None
    if value is not None and (not is_constant(value) or np.any(array_of(value))):
        return ()
    sizes = array_of(node.inputs[1])
    return () if sizes is None else tuple(int(size) for size in sizes)
