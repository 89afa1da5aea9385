"""Half precision on a CPU: nearly all kernels of ONNX Runtime compute in FP32, behind casts that it inserts itself.

Its rules (insert_cast_transformer.cc, checked against the graphs that 1.31 writes): a node whose kernel does not take
halves reads and writes floats; a cast is made wherever a half meets it, and weights are kept as floats. A node that
could take halves computes in floats too if all its neighbours do. Processors with half-precision kernels take less.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence, Set

from edgeq.errors import UnsupportedModelError
from edgeq.profiles.onnx.memory import GraphNode

__all__ = ["BFLOAT16", "FLOAT", "HALF", "HALF_KERNELS", "widen"]

FLOAT, HALF, BFLOAT16 = 1, 10, 16  # TensorProto.DataType

# CPU kernels that take FLOAT16, of ONNX Runtime 1.31 on x86.
_TAKE_HALVES = """
    Attention Cast Clip Compress Concat Constant ConstantOfShape DequantizeLinear Dropout Expand Flatten
    Gather GatherElements GatherND Identity IsInf IsNaN LayerNormalization MatMulNBits Max Min Mod QuantizeLinear
    RMSNormalization Reshape ReverseSequence RotaryEmbedding Round ScatterElements ScatterND Shape Shrink Sign
    SimplifiedLayerNormalization Size SkipLayerNormalization SkipSimplifiedLayerNormalization Slice Split Squeeze
    TensorScatter Transpose Unsqueeze
"""
HALF_KERNELS = frozenset(_TAKE_HALVES.split())
# Kernels that only move elements, or change their type: the only ones that take BFLOAT16.
_MOVE = """
    Cast Concat Constant ConstantOfShape Expand Flatten Gather GatherElements GatherND Identity Reshape Shape Size
    Slice Split Squeeze Transpose Unsqueeze
"""
_MOVES = frozenset(_MOVE.split())


def widen(
    ops: Sequence[GraphNode], types: Mapping[str, int], constants: Set[str], outputs: Sequence[str]
) -> tuple[list[GraphNode], dict[str, str]]:
    """The nodes with the casts that ONNX Runtime inserts.

    Args:
        ops: in topological order.
        types: element type of every value and weight.
        constants: names of weights, and of values that follow from weights alone: they are cast when it loads.
        outputs: of the graph.

    Returns:
        The nodes, and for each value that is FP32 now its new name and the name of the half that it stands for.

    Raises:
        UnsupportedModelError: arithmetic in BFLOAT16, for which a CPU has no kernels.
    """
    halves = {name for name, element_type in types.items() if element_type == HALF}
    _refuse_bfloat16(ops, types)
    if not halves:
        return list(ops), {}
    wide = _wide_nodes(ops, halves, outputs)
    made_wide = {name for i in wide for name in ops[i].outputs if name in halves}
    names: dict[str, str] = {}
    new: list[GraphNode] = []
    cast: set[str] = set()

    def as_float(name: str) -> str:
        if name not in halves:
            return name
        names[f"{name} as FP32"] = name
        return f"{name} as FP32"

    for index, given in enumerate(ops):
        op = given
        for name in op.inputs:
            meets = name in halves and name not in constants and (name in made_wide) != (index in wide)
            if meets and name not in cast:
                cast.add(name)
                ends = (as_float(name), name) if name in made_wide else (name, as_float(name))
                new.append(GraphNode("Cast", ends[:1], ends[1:]))
        if index in wide:
            inputs, made = (tuple(as_float(name) for name in part) for part in (op.inputs, op.outputs))
            op = dataclasses.replace(
                op, inputs=inputs, outputs=made, scratch=_doubled(op.scratch), late_scratch=_doubled(op.late_scratch)
            )
        new.append(op)
    new += [GraphNode("Cast", (as_float(name),), (name,)) for name in outputs if name in made_wide - cast]
    return new, names


def _doubled(sizes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(2 * size for size in sizes)


def _wide_nodes(ops: Sequence[GraphNode], halves: Set[str], outputs: Sequence[str]) -> set[int]:
    """Nodes that compute in floats for want of a kernel, and those between them that stand alone."""
    wide = {
        index
        for index, op in enumerate(ops)
        if op.op_type not in HALF_KERNELS and any(name in halves for name in (*op.inputs, *op.outputs))
    }
    maker = {name: index for index, op in enumerate(ops) for name in op.outputs if name}
    readers: dict[str, list[int]] = {}
    for index, op in enumerate(ops):
        for name in op.inputs:
            readers.setdefault(name, []).append(index)
    alone = set()
    for index, op in enumerate(ops):
        read = [name for name in op.inputs if name in halves]
        made = [name for name in op.outputs if name in halves]
        if index in wide or not read or not made or any(name in outputs for name in made):
            continue
        before = all(maker.get(name) in wide for name in read)
        if before and all(reader in wide for name in made for reader in readers.get(name, ())):
            alone.add(index)
    return wide | alone


def _refuse_bfloat16(ops: Sequence[GraphNode], types: Mapping[str, int]) -> None:
    for op in ops:
        if op.op_type not in _MOVES and any(types.get(name) == BFLOAT16 for name in (*op.inputs, *op.outputs)):
            raise UnsupportedModelError(
                f"{op.op_type} ({op.outputs[0]!r}) computes in BFLOAT16, for which ONNX Runtime has no kernel on a CPU",
                "Export the model in FP32 or FP16",
            )
