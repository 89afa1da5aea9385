"""Fusions around integers: products and other kernels between QuantizeLinear and DequantizeLinear.

ONNX Runtime computes them on the bytes themselves, without the floats between (checked against the graphs that 1.31
writes). Convolutions of bytes, and what stands between them, have their channels last.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from edgeq.converters.onnx.fusion_graph import FusionGraph, Made, merged, other_input
from edgeq.profiles.onnx.memory import GraphNode

__all__ = [
    "dynamic_product",
    "integer_product",
    "moved_bytes",
    "quantized_kernel",
    "quantized_product",
    "reordered_inputs",
    "weight_only_product",
]

_PRODUCTS = frozenset({"MatMul", "FusedMatMul"})
# TensorProto.DataType, and bits of the weights that MatMulNBits takes.
_UINT8, _INT8, _FP8 = 2, 3, 17
_BYTES = (_UINT8, _INT8, _FP8)
_BITS = {_UINT8: 8, _INT8: 8, 21: 4, 22: 4, 25: 2, 26: 2}
_UNSIGNED = (_UINT8, 21, 25)
_PLAIN_BLOCK, _SMALLEST_BLOCK = 32, 16
# Kernels of bytes that read and write grids of their own, by what stands between Q and DQ in the file.
_ON_BYTES = {
    "Add": "QLinearAdd",
    "AveragePool": "QLinearAveragePool",
    "Concat": "QLinearConcat",
    "GlobalAveragePool": "QLinearGlobalAveragePool",
    "LeakyRelu": "QLinearLeakyRelu",
    "Mul": "QLinearMul",
    "Sigmoid": "QLinearSigmoid",
    "Softmax": "QLinearSoftmax",
    "Where": "QLinearWhere",
}
# Kernels that move bytes as they are.
_MOVES = frozenset(
    {"Expand", "Flatten", "Gather", "MaxPool", "Pad", "Reshape", "Resize", "Slice", "Squeeze", "Transpose", "Unsqueeze"}
)


def integer_product(graph: FusionGraph, index: int, op: GraphNode) -> bool:
    """MatMulInteger, Cast, and Mul by the product of the scales: one kernel that writes floats."""
    if op.op_type != "MatMulInteger":
        return False
    cast = graph.next_of(op, "Cast")
    scaled = graph.next_of(cast[1], "Mul") if cast else None
    if cast is None or scaled is None:
        return False
    scale = other_input(scaled[1], cast[1].outputs[0])
    product = graph.made_by(scale, "Mul")
    if product is None:
        return False
    (a, b, *points), (a_scale, b_scale) = op.inputs, product[1].inputs
    inputs = _quantized_inputs((a, a_scale, *points[:1]), (b, b_scale, *points[1:]))
    graph.replace([index, cast[0], scaled[0], product[0]], merged(op, scaled[1], "MatMulIntegerToFloat", inputs))
    return True


def _quantized_inputs(left: Sequence[str], right: Sequence[str]) -> tuple[str, ...]:
    """Of a product of integers: each factor with its scale and its zero point, which may be left out."""
    return (*left, *[""] * (3 - len(left)), *right, *[""] * (3 - len(right)))


def quantized_product(graph: FusionGraph, index: int, op: GraphNode) -> bool:
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
    fused = dataclasses.replace(merged(op, last, name, inputs), kind="int8")
    if name == "QLinearConv":
        x, w, y = (graph.facts.shapes[n] for n in (left[1].inputs[0], right[1].inputs[0], last.outputs[0]))
        fused = dataclasses.replace(fused, late_scratch=_window_pointers(x, w, y))
    graph.replace(sorted(gone), fused)
    return True


def _window_pointers(x: tuple[int, ...], w: tuple[int, ...], y: tuple[int, ...]) -> tuple[int, ...]:
    """Of a convolution with its channels last: one to each pixel under each place of the window, if it has a window."""
    return () if math.prod(w[2:]) == 1 and x[2:] == y[2:] else (8 * math.prod(w[2:]) * math.prod(y[2:]),)


def reordered_inputs(graph: FusionGraph, index: int, op: GraphNode) -> bool:
    """A product of integers that the file itself has: its inputs in the order that fused ones have here."""
    if op.op_type != "MatMulIntegerToFloat" or op.inputs[1] not in graph.facts.constants:
        return False
    if graph.facts.types.get(op.inputs[1]) not in _BYTES or len(graph.facts.shapes.get(op.inputs[1], ())) < 2:
        return False
    a, b, a_scale, b_scale, *rest = (*op.inputs, "", "", "")
    a_point, b_point, bias = rest[:3]
    inputs = (a, a_scale, a_point, b, b_scale, b_point, *([bias] if bias else []))
    graph.replace([index], dataclasses.replace(op, inputs=inputs))
    return True


def quantized_kernel(graph: FusionGraph, index: int, op: GraphNode) -> bool:
    """Another kernel between dequantized inputs and a quantization: computed from bytes to bytes."""
    if op.op_type not in _ON_BYTES or len(op.outputs) != 1:
        return False
    data = op.inputs[1:] if op.op_type == "Where" else op.inputs
    return _on_bytes(graph, index, op, data, _ON_BYTES[op.op_type])


def moved_bytes(graph: FusionGraph, index: int, op: GraphNode) -> bool:
    """A kernel that computes nothing, between one grid and the same: it moves the bytes."""
    if op.op_type not in _MOVES or len(op.outputs) != 1:
        return False
    return _on_bytes(graph, index, op, op.inputs[:1], op.op_type)


def _on_bytes(graph: FusionGraph, index: int, op: GraphNode, data: Sequence[str], name: str) -> bool:
    sources = {value: _maker(graph, value, "DequantizeLinear") for value in data}
    quantize = graph.next_of(op, "QuantizeLinear")
    if quantize is None or any(
        found is None or graph.facts.types.get(found[1].inputs[0]) not in _BYTES for found in sources.values()
    ):
        return False
    found = {value: maker for value, maker in sources.items() if maker is not None}
    inputs = tuple(found[value][1].inputs[0] if value in found else value for value in op.inputs)
    gone = [index, quantize[0], *(maker[0] for value, maker in found.items() if graph.readers[value] == 1)]
    graph.replace(sorted(gone), dataclasses.replace(merged(op, quantize[1], name, inputs), late_scratch=()))
    return True


def weight_only_product(graph: FusionGraph, index: int, op: GraphNode) -> bool:
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
    made = merged(op, op, "MatMulNBits", (op.inputs[0], *names))
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


def _maker(graph: FusionGraph, name: str, op_type: str) -> tuple[int, GraphNode] | None:
    """As `FusionGraph.made_by`, but several nodes may read the value: ONNX Runtime duplicates a dequantization."""
    index = graph.maker.get(name)
    return (index, graph.ops[index]) if index in graph.ops and graph.ops[index].op_type == op_type else None


def dynamic_product(graph: FusionGraph, index: int, op: GraphNode) -> bool:
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
    fused = merged(op, op, "DynamicQuantizeMatMul", (quantize.inputs[0], *rest))
    graph.replace([maker, index], dataclasses.replace(fused, scratch=(elements,)))
    return True
