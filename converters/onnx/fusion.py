"""The fusions that ONNX Runtime makes on a CPU and that change what a call costs or holds.

Known patterns of its optimizer at the level ALL (checked against the graphs that 1.31 writes): a graph is rewritten
until none is left. A fusion that is not known here only makes a prediction a little too high.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set

from edgeq.profiles.onnx.memory import GraphNode

__all__ = ["Facts", "Made", "fuse"]

_PRODUCTS = frozenset({"MatMul", "FusedMatMul"})
_INTEGER_PRODUCTS = frozenset({"MatMulIntegerToFloat", "DynamicQuantizeMatMul"})
# Kernels of convolutions and Gemm apply these themselves.
_ACTIVATIONS = frozenset({"Clip", "HardSigmoid", "LeakyRelu", "Relu", "Sigmoid", "Tanh"})
# TensorProto.DataType, and bits of the weights that MatMulNBits takes.
_UINT8, _INT8 = 2, 3
_BYTES = (_UINT8, _INT8)
_BITS = {_UINT8: 8, _INT8: 8, 21: 4, 22: 4, 25: 2, 26: 2}
_UNSIGNED = (_UINT8, 21, 25)
_PLAIN_BLOCK, _SMALLEST_BLOCK = 32, 16


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


class _Graph:
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


_Rule = Callable[[_Graph, int, GraphNode], bool]


def fuse(ops: Sequence[GraphNode], facts: Facts) -> tuple[tuple[GraphNode, ...], dict[str, Made]]:
    """The operators that ONNX Runtime runs instead of these.

    Args:
        ops: in topological order.
        facts: see `Facts`.

    Returns:
        The operators in topological order, and weights that they read and the file does not hold.
    """
    graph = _Graph(ops, facts)
    for rules in _STAGES:
        changed = True
        while changed:
            changed = False
            for index in sorted(graph.ops):
                op = graph.ops.get(index)
                changed |= op is not None and any(rule(graph, index, op) for rule in rules)
    return tuple(graph.ops[index] for index in sorted(graph.ops)), graph.made


def _other(op: GraphNode, name: str) -> str:
    """The other one of two inputs."""
    return op.inputs[1] if op.inputs[0] == name else op.inputs[0]


def _merged(first: GraphNode, last: GraphNode, op_type: str, inputs: Sequence[str]) -> GraphNode:
    return dataclasses.replace(first, op_type=op_type, inputs=tuple(inputs), outputs=last.outputs[:1])


def _integer_product(graph: _Graph, index: int, op: GraphNode) -> bool:
    """MatMulInteger, Cast, and Mul by the product of the scales: one kernel that writes floats."""
    if op.op_type != "MatMulInteger":
        return False
    cast = graph.next_of(op, "Cast")
    scaled = graph.next_of(cast[1], "Mul") if cast else None
    if cast is None or scaled is None:
        return False
    scale = _other(scaled[1], cast[1].outputs[0])
    product = graph.made_by(scale, "Mul")
    if product is None:
        return False
    (a, b, *points), (a_scale, b_scale) = op.inputs, product[1].inputs
    inputs = _quantized_inputs((a, a_scale, *points[:1]), (b, b_scale, *points[1:]))
    graph.replace([index, cast[0], scaled[0], product[0]], _merged(op, scaled[1], "MatMulIntegerToFloat", inputs))
    return True


def _quantized_inputs(left: Sequence[str], right: Sequence[str]) -> tuple[str, ...]:
    """Of a product of integers: each factor with its scale and its zero point, which may be left out."""
    return (*left, *[""] * (3 - len(left)), *right, *[""] * (3 - len(right)))


def _quantized_product(graph: _Graph, index: int, op: GraphNode) -> bool:
    """A product of two dequantized factors: computed with integers, and left as integers if they are wanted."""
    if op.op_type not in _PRODUCTS and op.op_type not in ("Gemm", "Conv"):
        return False
    left = _maker(graph, op.inputs[0], "DequantizeLinear")
    right = _maker(graph, op.inputs[1], "DequantizeLinear")
    if left is None or right is None:
        return False
    if any(graph.facts.types.get(factor[1].inputs[0], _INT8) not in _BYTES for factor in (left, right)):
        return False
    quantize = graph.next_of(op, "QuantizeLinear")
    if quantize is None and op.op_type == "Conv":
        return False
    gone = [index]
    for name, found in ((op.inputs[0], left), (op.inputs[1], right)):
        if graph.readers[name] == 1:
            gone.append(found[0])
    inputs = [*_quantized_inputs(left[1].inputs, right[1].inputs)]
    last = op
    if quantize is not None:
        gone.append(quantize[0])
        inputs += [*quantize[1].inputs[1:], *[""] * (3 - len(quantize[1].inputs))]
        last = quantize[1]
    name = {"Conv": "QLinearConv", "Gemm": "QGemm"}.get(
        op.op_type, "QLinearMatMul" if quantize else "MatMulIntegerToFloat"
    )
    fused = dataclasses.replace(_merged(op, last, name, inputs), kind="int8")
    if name == "QLinearConv":
        x, w, y = (graph.facts.shapes[n] for n in (left[1].inputs[0], right[1].inputs[0], last.outputs[0]))
        # Images with their channels last, and a pointer to each pixel under each place of the window.
        pointers = 8 * math.prod(w[2:]) * math.prod(y[2:])
        fused = dataclasses.replace(fused, late_scratch=(math.prod(x), math.prod(y), pointers))
    graph.replace(sorted(gone), fused)
    return True


def _weight_only_product(graph: _Graph, index: int, op: GraphNode) -> bool:
    """A product with a weight of few bits, dequantized by itself: MatMulNBits, which reads a copy in its own order."""
    if op.op_type != "MatMul":
        return False
    found = _maker(graph, op.inputs[1], "DequantizeLinear")
    if found is None:
        return False
    weight, scale, *points = found[1].inputs
    bits = _BITS.get(graph.facts.types.get(weight, 0))
    if bits is None or not graph.facts.is_matrix(weight) or scale not in graph.facts.constants:
        return False
    rows, columns = graph.facts.shapes[weight]
    block = _block_rows((rows, columns), graph.facts.shapes[scale])
    if not block:
        return False
    blocks = -(-rows // block)
    names = [f"{weight} in blocks", f"{scale} in blocks"]
    graph.made[names[0]] = Made(_UINT8, (columns, blocks, block * bits // 8))
    graph.made[names[1]] = Made(graph.facts.types[scale], (columns * blocks,))
    if points or graph.facts.types[weight] in _UNSIGNED:
        names.append(f"{weight} zero points in blocks")
        graph.made[names[2]] = Made(_UINT8, (columns * -(-blocks * bits // 8),))
    gone = [found[0], index] if graph.readers[op.inputs[1]] == 1 else [index]
    made = _merged(op, op, "MatMulNBits", (op.inputs[0], *names))
    made = dataclasses.replace(made, product="matmul", rows=max(math.prod(graph.facts.shapes[op.outputs[0]][:-1]), 1))
    graph.replace(gone, made)
    return True


def _block_rows(weight: tuple[int, int], scale: tuple[int, ...]) -> int:
    """Rows that share a scale; 0 if ONNX Runtime does not fuse them. It splits larger blocks into 32 rows."""
    rows, columns = weight
    if math.prod(scale) == 1 or scale == (columns,):
        return _PLAIN_BLOCK
    if len(scale) != 2 or scale[1] != columns or not scale[0] or rows % scale[0]:
        return 0
    block = rows // scale[0]
    return block if block >= _SMALLEST_BLOCK and block & (block - 1) == 0 else 0


def _maker(graph: _Graph, name: str, op_type: str) -> tuple[int, GraphNode] | None:
    """As `_Graph.made_by`, but several nodes may read the value: ONNX Runtime duplicates a dequantization."""
    index = graph.maker.get(name)
    return (index, graph.ops[index]) if index in graph.ops and graph.ops[index].op_type == op_type else None


def _product_bias(graph: _Graph, index: int, op: GraphNode) -> bool:
    """A bias that the kernel adds: always for integers, for floats when the product can be one of matrices (Gemm)."""
    plain = op.op_type == "MatMul" and graph.facts.is_matrix(op.inputs[1]) and graph.facts.can_flatten(op.inputs[0])
    if not plain and op.op_type not in _INTEGER_PRODUCTS:
        return False
    add = graph.next_of(op, "Add")
    if add is None or not graph.facts.is_bias(_other(add[1], op.outputs[0])):
        return False
    inputs = (*op.inputs, _other(add[1], op.outputs[0]))
    graph.replace([index, add[0]], _merged(op, add[1], "Gemm" if plain else op.op_type, inputs))
    return True


def _dynamic_product(graph: _Graph, index: int, op: GraphNode) -> bool:
    """A quantization that one product needs alone: done inside the kernel, in a buffer of its own."""
    if op.op_type != "MatMulIntegerToFloat":
        return False
    maker = graph.maker.get(op.inputs[0])
    if maker is None or maker not in graph.ops or graph.ops[maker].op_type != "DynamicQuantizeLinear":
        return False
    quantize = graph.ops[maker]
    if any(graph.readers[name] != 1 for name in quantize.outputs):
        return False
    weight = op.inputs[3]
    rest = (weight, *(name for name in op.inputs[1:] if name not in (*quantize.outputs, weight)))
    elements = math.prod(graph.facts.shapes[quantize.inputs[0]])
    fused = _merged(op, op, "DynamicQuantizeMatMul", (quantize.inputs[0], *rest))
    graph.replace([maker, index], dataclasses.replace(fused, scratch=(elements,)))
    return True


def _scaled_product(graph: _Graph, index: int, op: GraphNode) -> bool:
    """Multiplications by a number before or after a product of floats."""
    if op.op_type not in _PRODUCTS:
        return False
    for name in op.inputs[:2]:
        scale = graph.made_by(name, "Mul", "Div")
        if scale is None or len(scale[1].inputs) != 2:
            continue
        a, b = scale[1].inputs
        number = b if graph.facts.is_scalar(b) else a if scale[1].op_type == "Mul" else ""
        if number and graph.facts.is_scalar(number):
            source = _other(scale[1], number)
            inputs = tuple(source if i == name else i for i in op.inputs)
            graph.replace([scale[0], index], _merged(op, op, "FusedMatMul", inputs))
            return True
    after = graph.next_of(op, "Mul", "Div")
    if after is None:
        return False
    number = _other(after[1], op.outputs[0])
    if not graph.facts.is_scalar(number) or (after[1].op_type == "Div" and after[1].inputs[1] != number):
        return False
    graph.replace([index, after[0]], _merged(op, after[1], "FusedMatMul", op.inputs))
    return True


def _erf_gelu(graph: _Graph, index: int, op: GraphNode) -> bool:
    """GELU as exporters before opset 20 wrote it: x / sqrt(2), Erf, + 1, * x, * 0.5 (or x * 0.5 first)."""
    if op.op_type != "Erf":
        return False
    inner = graph.made_by(op.inputs[0], "Div", "Mul")
    plus = graph.next_of(op, "Add")
    times = graph.next_of(plus[1], "Mul") if plus else None
    if inner is None or plus is None or times is None:
        return False
    source = inner[1].inputs[0]
    other = _other(times[1], plus[1].outputs[0])
    gone, last = [inner[0], index, plus[0], times[0]], times[1]
    if other == source:
        half = graph.next_of(times[1], "Mul")
        if half is None or not graph.facts.is_scalar(_other(half[1], times[1].outputs[0])):
            return False
        gone.append(half[0])
        last = half[1]
    else:
        half = graph.made_by(other, "Mul")
        if half is None or source not in half[1].inputs:
            return False
        gone.append(half[0])
    graph.replace(gone, _merged(op, last, "Gelu", (source,)))
    return True


def _quick_gelu(graph: _Graph, index: int, op: GraphNode) -> bool:
    """SiLU: x * sigmoid(x)."""
    times = graph.next_of(op, "Mul") if op.op_type == "Sigmoid" else None
    if times is None or _other(times[1], op.outputs[0]) != op.inputs[0]:
        return False
    graph.replace([index, times[0]], _merged(op, times[1], "QuickGelu", op.inputs))
    return True


def _bias_gelu(graph: _Graph, index: int, op: GraphNode) -> bool:
    if op.op_type != "Gelu":
        return False
    add = graph.made_by(op.inputs[0], "Add")
    if add is None or not any(graph.facts.is_bias(name) for name in add[1].inputs):
        return False
    elements = math.prod(graph.facts.shapes[op.outputs[0]])
    fused = _merged(op, op, "BiasGelu", add[1].inputs)
    graph.replace([add[0], index], dataclasses.replace(fused, scratch=(4 * elements,)))
    return True


def _skip_norm(graph: _Graph, index: int, op: GraphNode) -> bool:
    """A residual that only a LayerNormalization reads, with the bias before it."""
    if op.op_type != "LayerNormalization":
        return False
    add = graph.made_by(op.inputs[0], "Add")
    if add is None:
        return False
    if not graph.facts.same_known_shape(*add[1].inputs):
        return False
    inputs, gone = list(add[1].inputs), [add[0], index]
    for position, name in enumerate(inputs):
        bias = graph.made_by(name, "Add")
        if bias is not None and (found := [n for n in bias[1].inputs if graph.facts.is_bias(n)]):
            inputs[position] = _other(bias[1], found[0])
            inputs.append(found[0])
            gone.append(bias[0])
            break
    graph.replace(gone, _merged(op, op, "SkipLayerNormalization", (*inputs[:2], *op.inputs[1:], *inputs[2:])))
    return True


def _after_convolution(graph: _Graph, index: int, op: GraphNode) -> bool:
    """Normalization that folds into the weights, and activations that the kernel applies."""
    if op.op_type not in ("Conv", "Gemm"):
        return False
    kinds = ("BatchNormalization",) if op.op_type == "Conv" else ()
    after = graph.next_of(op, *kinds, *_ACTIVATIONS)
    if after is None:
        return False
    graph.replace([index, after[0]], _merged(op, after[1], op.op_type, op.inputs))
    return True


# Later stages see what earlier ones made: a bias goes to an integer product before a norm can take it.
_STAGES: tuple[tuple[_Rule, ...], ...] = (
    (_integer_product, _quantized_product, _weight_only_product, _erf_gelu, _quick_gelu),
    (_product_bias, _scaled_product, _after_convolution),
    (_dynamic_product, _bias_gelu, _skip_norm),
)
