"""From an ONNX graph to the memory and the time of a session on a CPU.

File and weights are exact, and so is the arena's size for the operators of `edgeq.profiles.onnx.memory.PROVEN_OPS`;
what ONNX Runtime itself and its bookkeeping take is measured by the probe or a constant here. Times are those of single
kernels that the probe ran, summed over the graph. Nothing here reads a file or loads a library.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import msgspec

from edgeq.profiles.onnx.memory import (
    PROVEN_OPS,
    GraphNode,
    GraphValue,
    Kind,
    ProductKernel,
    live_peak_bytes,
    played_arena_bytes,
)
from edgeq.record import Count, Record, Threads

__all__ = [
    "Form",
    "KernelTime",
    "OnnxFigures",
    "OnnxMemory",
    "OnnxPrediction",
    "OnnxShape",
    "Parameter",
    "ProductTime",
    "interpolate",
    "predict_node_us",
    "predict_onnx",
    "predict_onnx_memory",
    "predict_onnx_ms",
]

# Kernels, hash maps, names and shapes that a session keeps for each node and initializer of the file; measured over
# all-MiniLM-L6-v2 as FP32 (330 nodes) and INT8 (420 nodes).
_BOOKKEEPING_BYTES = 6_000
# The arena keeps a handle of 8 bytes for each 256 bytes of a region (bfc_arena.h, AllocationRegion).
_ARENA_BYTES_PER_HANDLE_BYTE = 32
# By so much the baseline of one and the same process differs between runs: how many pages of a library the system maps
# around one that is read depends on what it has cached.
_SLACK_BYTES = 2 << 20

# In a graph a kernel finds less of its input in the caches than in the probe's chains: the mean over 15 shapes of
# all-MiniLM-L6-v2 in FP32 and INT8, by the processor time of one thread.
_COLDER_CACHES = 1.05
# Blocks below it are not given back to the system when they are freed; `edgeq.profiles.onnx.session` sets it.
_MAPPED_BYTES = 128 << 10

Form = Literal["plain", "packed", "reordered"]
_Positive = Annotated[float, msgspec.Meta(gt=0, lt=1e18)]
_NotNegative = Annotated[float, msgspec.Meta(ge=0, lt=1e18)]
_Size = Annotated[int, msgspec.Meta(ge=1, le=2**48)]


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One tensor of weights.

    Attributes:
        name: in the graph.
        dtype: ONNX's name of the element type, in lower case: ``"float"``, ``"int8"``.
        n_bytes: of its data.
        external: whether it lies in a file of its own, which a session maps instead of copying.
        form: ``"packed"`` if a matrix product keeps it in a form of its own instead, ``"reordered"`` if a convolution
            does, ``"plain"`` if it is used as it is.
        kept: whether a node reads it when the model runs.
        in_file: False for what a session computes when it loads the model.
    """

    name: str
    dtype: str
    n_bytes: int
    external: bool = False
    form: Form = "plain"
    kept: bool = True
    in_file: bool = True


@dataclasses.dataclass(frozen=True)
class OnnxShape:
    """What the cost model must know of an ONNX model at given sizes of its axes.

    Attributes:
        file_bytes: of the model with its external data.
        parameters: all initializers.
        values: every tensor that a node makes.
        nodes: after ONNX Runtime's fusions, in the order of execution.
        input_bytes: of what a call is fed; the caller's arrays.
        outputs: names of what a call returns.
        output_bytes: of all outputs.
        entries: nodes and initializers of the file before any fusion.
    """

    file_bytes: int
    parameters: tuple[Parameter, ...]
    values: Mapping[str, GraphValue]
    nodes: tuple[GraphNode, ...]
    input_bytes: int
    outputs: tuple[str, ...]
    output_bytes: int
    entries: int

    @property
    def parameter_bytes(self) -> int:
        """Weights in the file."""
        return sum(p.n_bytes for p in self.parameters if p.in_file)

    @property
    def flops(self) -> int:
        """Of all matrix products and convolutions of one call, two for a multiply-add."""
        return sum(node.flops for node in self.nodes)

    @property
    def live_peak_bytes(self) -> int:
        """The most bytes of activations in use at once; no allocator can need less."""
        return live_peak_bytes(self.nodes, self.values, self.outputs)


class ProductTime(Record, frozen=True, kw_only=True):
    """What a matrix product costs.

    Attributes:
        kernel: ``"matmul"`` with constant weights, ``"activations"`` for a batch of products of two activations,
            ``"conv"`` for a convolution.
        kind: ``"fp32"`` or ``"int8"``.
        rows: of the first factor, or pixels that a convolution makes.
        ns_per_weight: time over the elements of the second factor (of all of a batch).
    """

    kernel: ProductKernel
    kind: Kind
    rows: _Size
    ns_per_weight: _Positive


class KernelTime(Record, frozen=True, kw_only=True):
    """What any other kernel costs.

    Attributes:
        op_type: ONNX operator, or one of ONNX Runtime's fusions.
        elements: of the largest of its inputs and outputs.
        ns_per_element: time over these.
    """

    op_type: str
    elements: _Size
    ns_per_element: _NotNegative


class OnnxFigures(Record, frozen=True, kw_only=True):
    """ONNX Runtime on one machine with one number of threads.

    Attributes:
        onnxruntime: its version.
        threads: of one call.
        loaded_bytes: peak of a process that has loaded a tiny model: interpreter, numpy, libraries.
        runtime_bytes: peak of the same process once it has served.
        call_overhead_us: of a call of a model that has next to nothing to do.
        node_overhead_us: of a node that has next to nothing to do.
        fp32_flops_per_s: of products with weights of perception transformers, at 256 rows.
        int8_ops_per_s: likewise, of 8-bit integers.
        products: times of products.
        kernels: times of other kernels; one that is not there costs what ``"Add"`` does.
    """

    onnxruntime: str
    threads: Threads
    loaded_bytes: Count
    runtime_bytes: Count
    call_overhead_us: _NotNegative
    node_overhead_us: _Positive
    fp32_flops_per_s: _Positive
    int8_ops_per_s: _Positive
    products: tuple[ProductTime, ...]
    kernels: tuple[KernelTime, ...]

    def __post_init__(self) -> None:
        """Refuse figures from which nothing can be predicted."""
        if not any(p.kernel == "matmul" and p.kind == "fp32" for p in self.products):
            raise ValueError("products holds no matmul of kind fp32")
        if not any(k.op_type == "Add" for k in self.kernels):
            raise ValueError("kernels holds no Add")


class OnnxPrediction(Record, frozen=True, kw_only=True):
    """What a session takes. Bytes of file and weights are exact, the rest is modelled.

    Attributes:
        file_bytes: of the model with its external data.
        weights_bytes: weights in memory while the session serves; mapped ones count once they have been read.
        activation_bytes: of the arena; exact if `inexact_ops` is empty.
        inexact_ops: operators of the model that may take other buffers from the arena than was modelled, sorted.
        input_bytes: of the arrays that one call is fed.
        bookkeeping_bytes: of nodes, names and the arena's chunks.
        runtime_bytes: of the process with a tiny model.
        load_peak_bytes: of the process while the model is loaded.
        serve_peak_bytes: of the process while it serves.
        peak_memory_bytes: the larger of the two.
        latency_ms: of one call.
    """

    file_bytes: Count
    weights_bytes: Count
    activation_bytes: Count
    inexact_ops: tuple[str, ...]
    input_bytes: Count
    bookkeeping_bytes: Count
    runtime_bytes: Count
    load_peak_bytes: Count
    serve_peak_bytes: Count
    peak_memory_bytes: Count
    latency_ms: float


@dataclasses.dataclass(frozen=True)
class OnnxMemory:
    """What a process takes that serves a model on a CPU; the attributes are those of `OnnxPrediction`."""

    weights_bytes: int
    activation_bytes: int
    bookkeeping_bytes: int
    load_peak_bytes: int
    serve_peak_bytes: int


def predict_onnx_memory(shape: OnnxShape, *, loaded_bytes: int, runtime_bytes: int) -> OnnxMemory:
    """Memory of a session with the options of `edgeq.profiles.onnx.session`.

    Args:
        shape: the model at the largest sizes that it will be called with.
        loaded_bytes: of a process that has loaded a tiny model.
        runtime_bytes: of the same once it has served.
    """
    arena = played_arena_bytes(shape.nodes, shape.values, shape.outputs)
    kept = sum(p.n_bytes for p in shape.parameters if p.kept)
    bookkeeping = _BOOKKEEPING_BYTES * shape.entries
    handles = arena // _ARENA_BYTES_PER_HANDLE_BYTE
    return OnnxMemory(
        weights_bytes=kept,
        activation_bytes=arena,
        bookkeeping_bytes=bookkeeping + _SLACK_BYTES + handles,
        # Kernels and their plan, about half of the bookkeeping, come after the weights.
        load_peak_bytes=loaded_bytes + bookkeeping // 2 + _SLACK_BYTES + _loading_bytes(shape),
        serve_peak_bytes=runtime_bytes + kept + bookkeeping + _SLACK_BYTES + handles + arena + shape.input_bytes,
    )


def predict_onnx(shape: OnnxShape, figures: OnnxFigures) -> OnnxPrediction:
    """Memory and time of a session with the options of `edgeq.profiles.onnx.session`.

    Args:
        shape: the model at the largest sizes that it will be called with.
        figures: of the machine, from the probe.
    """
    memory = predict_onnx_memory(shape, loaded_bytes=figures.loaded_bytes, runtime_bytes=figures.runtime_bytes)
    return OnnxPrediction(
        file_bytes=shape.file_bytes,
        weights_bytes=memory.weights_bytes,
        activation_bytes=memory.activation_bytes,
        inexact_ops=tuple(sorted({node.op_type for node in shape.nodes} - PROVEN_OPS)),
        input_bytes=shape.input_bytes,
        bookkeeping_bytes=memory.bookkeeping_bytes,
        runtime_bytes=figures.runtime_bytes,
        load_peak_bytes=memory.load_peak_bytes,
        serve_peak_bytes=memory.serve_peak_bytes,
        peak_memory_bytes=max(memory.load_peak_bytes, memory.serve_peak_bytes),
        latency_ms=predict_onnx_ms(shape, figures),
    )


def _loading_bytes(shape: OnnxShape) -> int:
    """Weights while a model is loaded.

    ONNX Runtime copies what the file itself holds, tensor by tensor. A weight is let go once it is packed, but not
    before all convolutions have theirs reordered, of which three copies exist at a time. What is mapped takes memory
    only as packed or reordered.
    """
    inline = sum(p.n_bytes for p in shape.parameters if p.in_file and not p.external)
    reordered = [p.n_bytes for p in shape.parameters if p.form == "reordered"]
    made = sum(p.n_bytes for p in shape.parameters if p.form == "packed" and p.external)
    made += sum(p.n_bytes for p in shape.parameters if not p.in_file)
    made += sum(n if n >= _MAPPED_BYTES else 2 * n for n in reordered)
    others = (p.n_bytes for p in shape.parameters if not p.external or p.form == "packed")
    return inline + made + max(max(others, default=0), 3 * max(reordered, default=0))


def predict_onnx_ms(shape: OnnxShape, figures: OnnxFigures) -> float:
    """Milliseconds of one call: its kernels one after the other."""
    return (figures.call_overhead_us + math.fsum(predict_node_us(shape, figures))) / 1e3


def predict_node_us(shape: OnnxShape, figures: OnnxFigures) -> tuple[float, ...]:
    """Microseconds of each of a model's kernels, in their order."""
    elements = {name: value.n_bytes / max(value.item_bytes, 1) for name, value in shape.values.items()}
    table = _Table(figures)
    return tuple(_COLDER_CACHES * table.node_ns(node, elements) / 1e3 for node in shape.nodes)


class _Table:
    """Times of kernels by interpolation between what was measured."""

    def __init__(self, figures: OnnxFigures) -> None:
        self.overhead_ns = 1e3 * figures.node_overhead_us
        self.products: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for product in figures.products:
            key = (product.kernel, product.kind)
            self.products.setdefault(key, []).append((product.rows, product.ns_per_weight))
        self.kernels: dict[str, list[tuple[float, float]]] = {}
        for kernel in figures.kernels:
            time_ns = kernel.elements * kernel.ns_per_element
            self.kernels.setdefault(kernel.op_type, []).append((kernel.elements, time_ns))
        for points in (*self.products.values(), *self.kernels.values()):
            points.sort()

    def node_ns(self, node: GraphNode, elements: Mapping[str, float]) -> float:
        """One kernel, its overhead included."""
        if node.flops:
            return self.overhead_ns + self._product_ns(node, elements)
        if node.op_type in _FREE:
            return self.overhead_ns
        work = max((elements[name] for name in (*node.inputs, *node.outputs) if name in elements), default=0.0)
        if node.op_type == "Gather":
            work = max((elements[name] for name in node.outputs if name in elements), default=0.0)
        return self.overhead_ns + self._kernel_ns(node.op_type, work)

    def _product_ns(self, node: GraphNode, elements: Mapping[str, float]) -> float:
        kind = "int8" if node.kind == "int8" else "fp32"
        kernel = node.product
        points = self.products.get((kernel, kind))
        scale = 1.0
        if points is None:
            # What was not measured runs like a product with weights; convolutions of integers gain what those gain.
            points = self.products.get((kernel, "fp32")) or self.products["matmul", "fp32"]
            if kind == "int8" and ("matmul", "int8") in self.products:
                int8, fp32 = self.products["matmul", "int8"], self.products["matmul", "fp32"]
                scale = interpolate(int8, node.rows) / interpolate(fp32, node.rows)
        ns = scale * node.flops / (2 * node.rows) * interpolate(points, node.rows)
        if node.op_type == "DynamicQuantizeMatMul":
            ns += self._kernel_ns("DynamicQuantizeLinear", float(sum(node.scratch)))
        return ns

    def _kernel_ns(self, op_type: str, work: float) -> float:
        points = self.kernels.get(_LIKE.get(op_type, op_type)) or self.kernels["Add"]
        return interpolate(points, work)


# Nodes that only give a tensor another shape.
_FREE = frozenset({"Flatten", "Identity", "Reshape", "Shape", "Squeeze", "Unsqueeze"})
# Kernels that do the work of one that is measured.
_LIKE = {
    "Exp": "Gelu",
    "Erf": "Gelu",
    "FastGelu": "Gelu",
    "LogSoftmax": "Softmax",
    "Mish": "Gelu",
    "QuickGelu": "Gelu",
    "Sigmoid": "Gelu",
    "Tanh": "Gelu",
    "QuantizeLinear": "DynamicQuantizeLinear",
}


def interpolate(points: Sequence[tuple[float, float]], x: float) -> float:
    """Between points along straight lines; above the last in proportion, below the first as much as there."""
    if x <= points[0][0]:
        return points[0][1]
    if x >= points[-1][0]:
        return points[-1][1] * x / points[-1][0]
    after = bisect.bisect_left(points, (x, 0.0))
    (x0, y0), (x1, y1) = points[after - 1], points[after]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
