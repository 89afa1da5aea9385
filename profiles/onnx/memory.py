"""What ONNX Runtime's arena holds at most during one call, by playing its allocations through.

With the options of `edgeq.profiles.onnx.session` a session allocates every output when its node runs, frees it after
its last use, and the arena grows by exactly what does not fit into a free chunk. All of that follows from the graph, so
it is played through instead of estimated. The rules are ONNX Runtime's: order of execution (graph.cc,
``ReverseDFSFrom`` with ``NodeCompare``), aliases and in-place kernels (the ``Alias`` and ``MayInplace`` of each CPU
kernel, tried one by one on 1.31) and the best-fit arena with coalescing (bfc_arena.cc). Buffers that kernels take
beside their outputs are known for `PROVEN_OPS`; what other operators take is modelled, not exact.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

__all__ = [
    "ALIASES",
    "PROVEN_OPS",
    "GraphNode",
    "GraphValue",
    "Kind",
    "ProductKernel",
    "execution_order",
    "live_peak_bytes",
    "played_arena_bytes",
]

Kind = Literal["fp32", "int8"]
ProductKernel = Literal["matmul", "activations", "conv"]

# Kernels whose output is their first input's memory, whatever its shape.
ALIASES = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"})
# Kernels that overwrite their first input if nobody else needs it and the shapes are known to be the same.
_IN_PLACE = frozenset(
    {
        "Clip",
        "Elu",
        "HardSigmoid",
        "LeakyRelu",
        "LogSoftmax",
        "Relu",
        "Selu",
        "Sigmoid",
        "Softmax",
        "Softplus",
        "Softsign",
        "Tanh",
        "ThresholdedRelu",
    }
)
# Operators, fusions included, whose buffers were found to be these exactly: each was run by itself or in a block of a
# transformer on 1.31 (one thread, AVX-512) and the arena's log compared.
_PROVEN = """
    Abs Add And ArgMax AveragePool BatchNormalization BiasGelu Cast Ceil Celu Clip Concat Conv ConvTranspose Cos
    CumSum DepthToSpace DequantizeLinear Div Dropout DynamicQuantizeLinear DynamicQuantizeMatMul Elu Equal Erf
    Exp Expand Flatten Floor FusedMatMul Gather GatherElements GatherND Gelu Gemm GlobalAveragePool
    GlobalMaxPool Greater GreaterOrEqual HardSigmoid Hardmax Identity InstanceNormalization IsNaN
    LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax LpNormalization MatMul MatMulInteger
    MatMulIntegerToFloat MatMulNBits Max MaxPool Min Mod Mul Neg Not Or PRelu Pad Pow QGemm QLinearMatMul
    QuantizeLinear QuickGelu RMSNormalization Range Reciprocal ReduceL2 ReduceLogSumExp ReduceMax ReduceMean
    ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu ReorderInput ReorderOutput Reshape Round ScatterElements
    ScatterND Selu Shape Shrink Sigmoid Sign Sin SkipLayerNormalization Slice Softmax Softplus Softsign
    SpaceToDepth Split Sqrt Squeeze Sub Sum Tanh ThresholdedRelu Tile TopK Transpose Trilu Unsqueeze Where Xor
"""
PROVEN_OPS = frozenset(_PROVEN.split())
_CALLS = 4  # after two the arena of all models that were tried had its final size
_CHUNK_BYTES = 256  # the arena rounds up to it
_MAX_DEAD_BYTES = 128 << 20  # the arena splits a chunk when that much or more would be wasted


@dataclasses.dataclass(frozen=True)
class GraphValue:
    """A tensor between two nodes.

    Attributes:
        n_bytes: at the shapes that were bound.
        item_bytes: of one element.
        shape: as ONNX Runtime knows it before it sees an input: a size, the name of an axis, or None for neither.
            None for the whole if not even the rank is known.
    """

    n_bytes: int
    item_bytes: int
    shape: tuple[int | str | None, ...] | None


@dataclasses.dataclass(frozen=True)
class GraphNode:
    """One kernel that is run.

    Attributes:
        op_type: ONNX operator, or one that ONNX Runtime makes by fusion.
        inputs: names of values and parameters; empty names for those left out.
        outputs: names of values.
        flops: two for a multiply-add; 0 for all but matrix products and convolutions.
        kind: the arithmetic of the products: ``"fp32"`` or ``"int8"``; halves are computed as floats.
        product: ``"matmul"`` with constant weights, ``"activations"``, or ``"conv"``; of no meaning without flops.
        rows: of the product's first factor; ``flops / (2 * rows)`` elements make the second one.
        scratch: bytes of each buffer that the kernel takes from the arena while it runs, before its outputs.
        late_scratch: likewise, after its outputs.
    """

    op_type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    flops: int = 0
    kind: Kind = "fp32"
    product: ProductKernel = "matmul"
    rows: int = 1
    scratch: tuple[int, ...] = ()
    late_scratch: tuple[int, ...] = ()


def execution_order(nodes: Sequence[GraphNode], outputs: Sequence[str]) -> tuple[GraphNode, ...]:
    """The order in which ONNX Runtime runs the nodes.

    It walks back from nodes that nobody reads, and of several inputs first along the node that is last in the file.
    Nodes that lead to no output are dropped, as ONNX Runtime drops them.
    """
    maker = {name: index for index, node in enumerate(nodes) for name in node.outputs if name}
    before = [sorted({maker[name] for name in node.inputs if name in maker}) for node in nodes]
    wanted = {maker[name] for name in outputs if name in maker}
    read = {source for sources in before for source in sources}
    # The last of the stack comes first: ends of the graph before outputs that others read.
    stack = [(index, False) for index in (*sorted(wanted & read), *sorted(wanted - read))]
    entered: set[int] = set()
    order: list[GraphNode] = []
    while stack:
        index, inputs_are_done = stack.pop()
        if inputs_are_done:
            order.append(nodes[index])
        elif index not in entered:
            entered.add(index)
            stack.append((index, True))
            stack.extend((source, False) for source in before[index] if source not in entered)
    return tuple(order)


@dataclasses.dataclass(frozen=True)
class _Step:
    """What one node takes and what is free after it, in buffers; a buffer has the name of the value that took it."""

    takes: tuple[tuple[str, int], ...]
    scratch: tuple[int, ...]
    late_scratch: tuple[int, ...]
    frees: tuple[str, ...]


def _steps(nodes: Sequence[GraphNode], values: Mapping[str, GraphValue], outputs: Sequence[str]) -> Iterator[_Step]:
    """Takings and releases, node by node; outputs of the graph are never freed."""
    uses = Counter(name for node in nodes for name in node.inputs if name in values)
    uses.update(outputs)
    buffer: dict[str, str] = {}
    users: dict[str, int] = {}
    for node in nodes:
        takes = []
        for position, name in enumerate(node.outputs):
            if not name:
                continue
            shared = _shared_input(node, position, values, buffer, users)
            if shared is None:
                buffer[name] = name
                users[name] = 0
                takes.append((name, values[name].n_bytes))
            else:
                buffer[name] = buffer[shared]
            users[buffer[name]] += uses[name]
        unread = [buffer[name] for name in node.outputs if name and not uses[name]]
        for name in node.inputs:
            if name in buffer:
                users[buffer[name]] -= 1
                unread.append(buffer[name])
        frees = tuple(owner for owner in dict.fromkeys(unread) if users[owner] == 0)
        yield _Step(tuple(takes), node.scratch, node.late_scratch, frees)


def _shared_input(
    node: GraphNode,
    position: int,
    values: Mapping[str, GraphValue],
    buffer: Mapping[str, str],
    users: Mapping[str, int],
) -> str | None:
    """The input whose memory an output takes over; None if it needs its own, as copies of graph inputs do."""
    # A convolution with a fourth input adds it to its output, in its place.
    place = 3 if node.op_type == "Conv" and len(node.inputs) > 3 else 0
    if position or len(node.inputs) <= place or node.inputs[place] not in buffer:
        return None
    source = node.inputs[place]
    if node.op_type in ALIASES:
        return source
    if (
        (node.op_type in _IN_PLACE or place)
        and users[buffer[source]] == 1
        and _same_size(values[source], values[node.outputs[0]])
    ):
        return source
    return None


def _same_size(one: GraphValue, other: GraphValue) -> bool:
    """Whether ONNX Runtime can know before it runs that two values take the same bytes."""
    known = one.shape is not None and one.shape == other.shape and None not in one.shape
    return known and one.item_bytes == other.item_bytes


def live_peak_bytes(nodes: Sequence[GraphNode], values: Mapping[str, GraphValue], outputs: Sequence[str]) -> int:
    """The most bytes that are in use at once: the bound that no allocator can go below.

    Args:
        nodes: in the order of execution.
        values: every value that a node makes.
        outputs: of the graph; they stay to the end.
    """
    live: dict[str, int] = {}
    peak = 0
    for step in _steps(nodes, values, outputs):
        live.update(step.takes)
        peak = max(peak, sum(live.values()) + sum(step.scratch) + sum(step.late_scratch))
        for name in step.frees:
            del live[name]
    return peak


def played_arena_bytes(nodes: Sequence[GraphNode], values: Mapping[str, GraphValue], outputs: Sequence[str]) -> int:
    """Bytes of the arena when calls have made it as large as it gets for inputs of these shapes.

    The arrays that a call returns are the arena's own memory. A program holds them until the next call has returned,
    as ``result = session.run(...)`` in a loop does, so that they lie in its way.

    Arguments as for `live_peak_bytes`.
    """
    arena = _Arena()
    steps = tuple(_steps(nodes, values, outputs))
    returned: list[int] = []
    for _ in range(_CALLS):
        held: dict[str, int] = {}
        for step in steps:
            scratch = [arena.take(size) for size in step.scratch if size]
            held |= {name: arena.take(size) for name, size in step.takes if size}
            scratch += [arena.take(size) for size in step.late_scratch if size]
            for at in scratch:
                arena.free(at)
            for name in step.frees:
                if name in held:
                    arena.free(held.pop(name))
        for at in returned:
            arena.free(at)
        returned = list(held.values())
    return arena.total_bytes


class _Arena:
    """Free chunks by size and address; each extension is a region of its own that never merges with another."""

    def __init__(self) -> None:
        self.total_bytes = 0
        self._end = 0
        self._size: dict[int, int] = {}
        self._free: set[int] = set()

    def take(self, n_bytes: int) -> int:
        """The address of a chunk: the smallest free one that is large enough, split if most of it is not needed."""
        size = -(-n_bytes // _CHUNK_BYTES) * _CHUNK_BYTES
        found, at = min(((self._size[at], at) for at in self._free if self._size[at] >= size), default=(0, 0))
        if not found:
            # Regions lie apart, so that the end of one is never the beginning of another.
            at, self._end = self._end, self._end + size + _CHUNK_BYTES
            self.total_bytes += size
            self._size[at] = size
            return at
        self._free.remove(at)
        if found >= 2 * size or found - size >= _MAX_DEAD_BYTES:
            self._size[at] = size
            self._size[at + size] = found - size
            self._free.add(at + size)
        return at

    def free(self, at: int) -> None:
        """Give a chunk back and merge it with free neighbours."""
        self._free.add(at)
        after = at + self._size[at]
        if after in self._free:
            self._join(at, after)
        before = next((one for one in self._free if one + self._size[one] == at), None)
        if before is not None:
            self._join(before, at)

    def _join(self, at: int, after: int) -> None:
        self._size[at] += self._size.pop(after)
        self._free.remove(after)
