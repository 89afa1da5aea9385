"""A graph while nodes are fused: who makes and who reads each value, and what fusion must know of values."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence, Set

from edgeq.profiles.onnx.memory import GraphNode

__all__ = ["Facts", "FusionGraph", "Made", "merged", "other_input"]


@dataclasses.dataclass(frozen=True)
class Facts:
    """What fusion must know of values.

    Attributes:
        shapes: of every value and weight, all sizes known.
        known: shapes as the session knows them beforehand; names and None stand for axes of any size.
        constants: names of weights, and of values that follow from weights alone.
        outputs: of the graph; a value that leaves the graph cannot be fused away.
        types: element types, ``TensorProto.DataType``.
    """

    shapes: Mapping[str, tuple[int, ...]]
    known: Mapping[str, tuple[int | str | None, ...] | None]
    constants: Set[str]
    outputs: frozenset[str]
    types: Mapping[str, int]

    def is_scalar(self, name: str) -> bool:
        """Whether a name is one constant number."""
        return name in self.constants and all(size == 1 for size in self.shapes.get(name, (2,)))

    def is_matrix(self, name: str) -> bool:
        """Whether a name is a constant of two axes."""
        return name in self.constants and len(self.shapes.get(name, ())) == 2

    def can_flatten(self, name: str) -> bool:
        """Whether a value is a matrix, or one of sizes that are known beforehand, which is then reshaped to it."""
        known = self.known.get(name)
        return known is not None and (len(known) == 2 or all(isinstance(axis, int) for axis in known))

    def same_known_shape(self, one: str, other: str) -> bool:
        """Whether two values are known beforehand to have the same shape of three axes."""
        known = self.known.get(one)
        return known is not None and known == self.known.get(other) and len(known) == 3 and None not in known

    def is_bias(self, name: str) -> bool:
        """Whether a name is a constant vector."""
        return name in self.constants and len(self.shapes.get(name, ())) == 1


@dataclasses.dataclass(frozen=True)
class Made:
    """A weight that a fusion writes while the model is loaded: its element type and shape."""

    element_type: int
    dims: tuple[int, ...]


class FusionGraph:
    """The nodes as they are now, with who makes and who reads each value."""

    def __init__(self, ops: Sequence[GraphNode], facts: Facts) -> None:
        self.ops: dict[int, GraphNode] = dict(enumerate(ops))
        self.facts = facts
        self.made: dict[str, Made] = {}
        self.maker = {name: index for index, op in self.ops.items() for name in op.outputs if name}
        self.readers = Counter(name for op in ops for name in op.inputs)
        self.readers.update(facts.outputs)
        self.reader = {name: index for index, op in self.ops.items() for name in op.inputs}

    def made_by(self, name: str, *op_types: str) -> tuple[int, GraphNode] | None:
        """The maker of a value that only one node reads, if it is of one of the types."""
        index = self.maker.get(name)
        if index is None or self.readers[name] != 1 or self.ops[index].op_type not in op_types:
            return None
        return index, self.ops[index]

    def next_of(self, op: GraphNode, *op_types: str) -> tuple[int, GraphNode] | None:
        """The only reader of an only output, if it is of one of the types."""
        name = op.outputs[0]
        if self.readers[name] != 1 or name in self.facts.outputs or name not in self.reader:
            return None
        index = self.reader[name]
        return (index, self.ops[index]) if self.ops[index].op_type in op_types else None

    def replace(self, gone: Sequence[int], new: GraphNode) -> None:
        """Put one node in the place of several, where the last of them stood."""
        for index in gone:
            for name in self.ops[index].inputs:
                self.readers[name] -= 1
            del self.ops[index]
        place = max(gone)
        self.ops[place] = new
        for name in new.inputs:
            self.readers[name] += 1
            self.reader[name] = place
        for name in new.outputs:
            self.maker[name] = place


def other_input(op: GraphNode, name: str) -> str:
    """The other one of two inputs."""
    return op.inputs[1] if op.inputs[0] == name else op.inputs[0]


def merged(first: GraphNode, last: GraphNode, op_type: str, inputs: Sequence[str]) -> GraphNode:
    """One node that does the work of the first and makes the output of the last."""
    return dataclasses.replace(first, op_type=op_type, inputs=tuple(inputs), outputs=last.outputs[:1])
