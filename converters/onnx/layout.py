"""Convolutions and pooling in blocks of channels: what ONNX Runtime reorders, and the buffers that it takes for it.

Its rules (nchwc_transformer.cc, checked against the arena's log of 1.31): a convolution of images with constant
weights reads and writes tensors whose channels are padded to whole blocks; kernels between two of them stay in that
layout; all others get the plain one back. Blocks are 16 channels with AVX-512 and 8 with AVX, where no more is taken.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

from edgeq.converters.onnx.fusion_graph import Facts
from edgeq.profiles.onnx.memory import GraphNode

__all__ = ["Blocked", "block_channels"]

_BLOCK = 16
_POOLS = frozenset({"AveragePool", "GlobalAveragePool", "GlobalMaxPool", "MaxPool"})
_ACTIVATIONS = frozenset({"HardSigmoid", "LeakyRelu", "QuickGelu", "Relu", "Sigmoid", "Tanh"})
_BINARY = frozenset({"Add", "Mul", "Sum"})
_SEGMENT_BYTES = 64 << 10  # of the matrix that a convolution in the plain layout unfolds at a time


@dataclasses.dataclass(frozen=True)
class Blocked:
    """A value with its channels padded to whole blocks.

    Attributes:
        source: the value in the plain layout.
        shape: with the padded channels.
    """

    source: str
    shape: tuple[int, ...]


def block_channels(
    ops: Sequence[GraphNode], facts: Facts, floats: frozenset[str]
) -> tuple[list[GraphNode], dict[str, Blocked]]:
    """The nodes with reorderings, and the values in the blocked layout by their names.

    Args:
        ops: after all fusions, in topological order.
        facts: of all values that they read and make.
        floats: names of values and weights in FP32.
    """
    walk = _Layout(ops, facts, floats)
    for op in ops:
        walk.visit(op)
    return walk.finish(), walk.values


class _Layout:
    def __init__(self, ops: Sequence[GraphNode], facts: Facts, floats: frozenset[str]) -> None:
        self.facts = facts
        self.floats = floats
        self.reads = Counter(name for op in ops for name in op.inputs)
        self.reads.update(facts.outputs)
        self.values: dict[str, Blocked] = {}
        self.made: dict[str, str] = {}  # plain name to blocked name, of what blocked kernels make
        self.reordered: dict[str, str] = {}  # likewise, of what had to be reordered for them
        self.plain: list[GraphNode] = []
        self.blocked: dict[str, GraphNode] = {}  # by the blocked output, in order
        self.wanted: dict[str, None] = {}  # made in blocks, and read in the plain layout

    def visit(self, op: GraphNode) -> None:
        if self._convolution(op) or self._pool(op) or self._elementwise(op) or self._binary(op) or self._concat(op):
            return
        self.wanted.update(dict.fromkeys(name for name in op.inputs if name in self.made))
        if op.op_type == "Conv":
            op = dataclasses.replace(op, scratch=(_SEGMENT_BYTES,))
        self.plain.append(op)

    def finish(self) -> list[GraphNode]:
        """New nodes come after those of the file, and what leads back to the plain layout last, as in ONNX Runtime."""
        self.wanted.update(dict.fromkeys(name for name in self.made if name in self.facts.outputs))
        back = [GraphNode("ReorderOutput", (self.made[name],), (name,)) for name in self.wanted]
        return [*self.plain, *self.blocked.values(), *back]

    def _shape(self, name: str) -> tuple[int, ...]:
        return self.facts.shapes.get(name, ())

    def _is_image(self, op: GraphNode) -> bool:
        return len(self._shape(op.inputs[0])) == 4 and {op.inputs[0], op.outputs[0]} <= self.floats

    def _add(self, op: GraphNode, inputs: Sequence[str]) -> bool:
        """Put a kernel on blocked values; its output is blocked as well."""
        name = f"{op.outputs[0]} in blocks"
        self._declare(name, op.outputs[0])
        self.made[op.outputs[0]] = name
        self.blocked[name] = dataclasses.replace(op, inputs=tuple(inputs), outputs=(name,))
        return True

    def _declare(self, name: str, source: str) -> None:
        batch, channels, *pixels = self._shape(source)
        self.values[name] = Blocked(source, (batch, -(-channels // _BLOCK) * _BLOCK, *pixels))

    def _in_blocks(self, name: str) -> str:
        if name in self.made:
            return self.made[name]
        if name not in self.reordered:
            new = self.reordered[name] = f"{name} in blocks"
            self._declare(new, name)
            self.blocked[new] = GraphNode("ReorderInput", (name,), (new,))
        return self.reordered[name]

    def _convolution(self, op: GraphNode) -> bool:
        if op.op_type != "Conv" or not self._is_image(op) or op.inputs[1] not in self.facts.constants:
            return False
        made, per_group = self._shape(op.inputs[1])[:2]
        channels = self._shape(op.inputs[0])[1]
        groups = channels // max(per_group, 1)
        if groups > 1 and not (per_group == 1 and made == groups) and (per_group % _BLOCK or made // groups % _BLOCK):
            return False
        direct = groups == 1 and channels < _BLOCK
        source = op.inputs[0] if direct else self._in_blocks(op.inputs[0])
        if direct and op.inputs[0] in self.made:
            self.wanted[op.inputs[0]] = None
        return self._add(op, (source, *op.inputs[1:]))

    def _pool(self, op: GraphNode) -> bool:
        if op.op_type not in _POOLS or len(op.outputs) > 1 or not self._is_image(op):
            return False
        if self._shape(op.inputs[0])[1] % _BLOCK:
            return False
        return self._add(op, (self._in_blocks(op.inputs[0]),))

    def _elementwise(self, op: GraphNode) -> bool:
        if op.op_type not in _ACTIVATIONS or op.inputs[0] not in self.made:
            return False
        return self._add(op, (self.made[op.inputs[0]], *op.inputs[1:]))

    def _binary(self, op: GraphNode) -> bool:
        """Of blocked values of one shape; a sum that only ends a convolution is done by it, in the other's memory."""
        if op.op_type not in _BINARY or not all(name in self.made for name in op.inputs):
            return False
        known = {self.facts.known.get(name) for name in op.inputs}
        if len({self._shape(name) for name in op.inputs}) != 1 or len(known) != 1 or None in known:
            return False
        names = [self.made[name] for name in op.inputs]
        if op.op_type != "Mul" and len(names) == 2:
            for name, other in (names, names[::-1]):
                maker = self.blocked[name]
                alone = self.reads[self.values[name].source] == 1
                if maker.op_type == "Conv" and len(maker.inputs) < 4 and alone and name != other:
                    del self.blocked[name], self.values[name]
                    inputs = (*maker.inputs, *[""] * (3 - len(maker.inputs)), other)
                    return self._add(dataclasses.replace(maker, outputs=op.outputs), inputs)
        return self._add(op, names)

    def _concat(self, op: GraphNode) -> bool:
        if op.op_type != "Concat" or not all(name in self.made for name in op.inputs):
            return False
        channels = [self._shape(name)[1] for name in op.inputs]
        if any(count % _BLOCK for count in channels) or self._shape(op.outputs[0])[1] != sum(channels):
            return False
        return self._add(op, [self.made[name] for name in op.inputs])
