"""Buffers that kernels of ONNX Runtime take from the arena while they run, beside their outputs.

Found by running one operator at a time on 1.31 and reading the arena's log. For operators that are not among
`edgeq.profiles.onnx.memory.PROVEN_OPS` the sizes here are at least what was seen, not exactly it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from edgeq.converters.onnx.infer import Inferred
from edgeq.converters.onnx.skeleton import element_bits

if TYPE_CHECKING:
    import onnx

__all__ = ["GATES", "early_scratch", "integer", "late_scratch"]

Shape = tuple[int, ...]

# Matrices of a recurrent cell.
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def integer(node: onnx.NodeProto, name: str, default: int) -> int:
    """An attribute that is a number."""
    return next((attribute.i for attribute in node.attribute if attribute.name == name), default)


def early_scratch(node: onnx.NodeProto, shapes: Mapping[str, Shape], inferred: Inferred) -> tuple[int, ...]:
    """Buffers that are taken before the outputs: Where picks from either side into one of its own, then merges them."""
    if node.op_type != "Where":
        return ()
    condition, *sides = (shapes[name] for name in node.input)
    item = _item_bytes(node.output[0], inferred)
    return tuple(item * math.prod(np.broadcast_shapes(condition, side)) for side in sides)


def late_scratch(node: onnx.NodeProto, shapes: Mapping[str, Shape], inferred: Inferred) -> tuple[int, ...]:
    """Buffers that are taken after the outputs.

    Args:
        node: of the file.
        shapes: of all its inputs and outputs.
        inferred: with their element types.
    """
    rule = _RULES.get(node.op_type)
    if rule is None or not node.output[0]:
        return ()
    given = [shapes.get(name, ()) for name in node.input]
    made = max((shapes.get(name, ()) for name in node.output), key=math.prod)
    return rule(_Call(node, given, made, _item_bytes(node.output[0], inferred), inferred.opset))


@dataclasses.dataclass(frozen=True)
class _Call:
    """A node with the shapes of its inputs and of its largest output, and the bytes of an element."""

    node: onnx.NodeProto
    given: list[Shape]
    made: Shape
    item: int
    opset: int

    @property
    def n_bytes(self) -> int:
        return self.item * math.prod(self.made)


def _item_bytes(name: str, inferred: Inferred) -> int:
    return element_bits(inferred.tensors[name].element_type, name) // 8


def _softmax(call: _Call) -> tuple[int, ...]:
    """Since opset 13 an axis that is not the last is moved there and back; before, all axes from it on were one."""
    across = integer(call.node, "axis", -1) % max(len(call.made), 1) != len(call.made) - 1
    return (call.n_bytes, call.n_bytes) if across and call.opset >= 13 else ()


def _normalization(call: _Call) -> tuple[int, ...]:
    """It runs as an InstanceNormalization of another shape, then a scale and a bias."""
    return (call.n_bytes, call.n_bytes)


def _transposed(call: _Call) -> tuple[int, ...]:
    """The columns of one image."""
    return (call.item * math.prod(call.given[1][1:]) * math.prod(call.given[0][2:]),)


def _einsum(call: _Call) -> tuple[int, ...]:
    """At most each input and the product with its axes in another order."""
    return (*(call.item * math.prod(shape) for shape in call.given), call.n_bytes, call.n_bytes)


def _integer_convolution(call: _Call) -> tuple[int, ...]:
    """Images with their channels last, and a pointer to each pixel under each place of the window."""
    pointers = 8 * math.prod(call.given[3][2:]) * math.prod(call.made[2:])
    return (call.item * math.prod(call.given[0]), call.n_bytes, pointers)


def _deformed(call: _Call) -> tuple[int, ...]:
    """Columns of one image, and where each of their points lies between four pixels."""
    points = math.prod(call.given[1][2:]) * math.prod(call.made[2:])
    return (call.item * call.given[0][1] * points, 32 * points * integer(call.node, "offset_group", 1))


def _local_response(call: _Call) -> tuple[int, ...]:
    """The divisors, and the squares of one image with some more channels."""
    channels = call.made[1] + integer(call.node, "size", 1)
    return (call.n_bytes, call.item * channels * math.prod(call.made[2:]))


def _resize(call: _Call) -> tuple[int, ...]:
    """Antialiasing resizes one axis after the other."""
    if not integer(call.node, "antialias", 0):
        return ()
    return (call.item * math.prod(max(a, b) for a, b in zip(call.given[0][1:], call.made[1:], strict=True)),)


def _recurrent(call: _Call) -> tuple[int, ...]:
    """Gates of all steps, for each direction; two directions also reverse what goes in and comes out."""
    (steps, batch, width), (directions, *_), (*_, hidden) = call.given[:3]
    rows, small = call.item * steps * batch, call.item * batch * hidden
    gates = rows * hidden * GATES[call.node.op_type]
    if directions == 1:
        return (*[small] * 8, gates)
    return (*[small] * 16, rows * width, rows * hidden, rows * hidden, gates, gates)


def _attention(call: _Call) -> tuple[int, ...]:
    """Scores, and a mask if one has to be made; keys and values with the past, where nobody else wants them."""
    (query, key, value), past = call.given[:3], call.given[4:6]
    heads = query[1] if len(query) == 4 else integer(call.node, "q_num_heads", 1)
    tokens, keys = query[-2], key[-2]
    joined: tuple[int, ...] = ()
    if len(past) == 2 and past[0]:
        keys += past[0][-2]
        if sum(1 for name in call.node.output[1:3] if name) < 2:
            joined = tuple(
                call.item * (math.prod(new) + math.prod(old)) for new, old in zip((key, value), past, strict=True)
            )
    mask: tuple[int, ...] = ()
    if integer(call.node, "is_causal", 0):
        given = math.prod(call.given[3]) if len(call.given) > 3 else 0
        mask = (call.item * max(tokens * keys, given),)
    return (*joined, call.item * query[0] * heads * tokens * keys, *mask)


_RULES: Mapping[str, Callable[[_Call], tuple[int, ...]]] = {
    "Attention": _attention,
    "ConvTranspose": _transposed,
    "DeformConv": _deformed,
    "Einsum": _einsum,
    "GroupNormalization": _normalization,
    "LRN": _local_response,
    "LogSoftmax": _softmax,
    "QLinearConv": _integer_convolution,
    "Resize": _resize,
    "Softmax": _softmax,
    **dict.fromkeys(GATES, _recurrent),
}
