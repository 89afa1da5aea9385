"""One node of a file as the cost model sees it: multiply-adds, and buffers that its kernel takes beside its output."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from edgeq.converters.onnx.infer import Inferred
from edgeq.converters.onnx.skeleton import element_bits
from edgeq.profiles.onnx.memory import GraphNode, Kind, ProductKernel

if TYPE_CHECKING:
    import onnx

__all__ = ["make_node"]

Shape = tuple[int, ...]

_INT8_PRODUCTS = frozenset(
    {
        "ConvInteger",
        "DynamicQuantizeMatMul",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "QGemm",
        "QLinearConv",
        "QLinearMatMul",
    }
)
_HALF_TYPES = (10, 16)  # FLOAT16, BFLOAT16
# Where the second factor stands among the inputs.
_FACTOR = {
    "Conv": 1,
    "ConvInteger": 1,
    "ConvTranspose": 1,
    "DynamicQuantizeMatMul": 1,
    "FusedMatMul": 1,
    "Gemm": 1,
    "MatMul": 1,
    "MatMulInteger": 1,
    "MatMulIntegerToFloat": 1,
    "QGemm": 3,
    "QLinearConv": 3,
    "QLinearMatMul": 3,
}
_MATMULS = _FACTOR.keys() - {"Conv", "ConvInteger", "ConvTranspose", "Gemm", "QGemm", "QLinearConv"}


@dataclasses.dataclass(frozen=True)
class _Product:
    """A matrix product or convolution: its operations, and the rows of the first factor."""

    flops: int
    rows: int
    kernel: ProductKernel


def make_node(node: onnx.NodeProto, inferred: Inferred, constants: frozenset[str]) -> GraphNode:
    """A node with its count.

    Args:
        node: of the file.
        inferred: with sizes for all axes.
        constants: names of weights, and of values that follow from them alone.
    """
    shapes = {
        name: tuple(axis for axis in inferred.tensors[name].shape or () if isinstance(axis, int))
        for name in (*node.input, *node.output)
        if name in inferred.tensors
    }
    product = _product(node, shapes, constants)
    kind: Kind = "fp32"
    if node.op_type in _INT8_PRODUCTS:
        kind = "int8"
    elif node.output[0] in inferred.tensors and inferred.tensors[node.output[0]].element_type in _HALF_TYPES:
        kind = "fp16"
    return GraphNode(
        op_type=node.op_type,
        inputs=tuple(node.input),
        outputs=tuple(node.output),
        flops=product.flops if product else 0,
        kind=kind,
        product=product.kernel if product else "matmul",
        rows=product.rows if product else 1,
        scratch=_scratch(node, shapes, inferred),
    )


def _scratch(node: onnx.NodeProto, shapes: Mapping[str, Shape], inferred: Inferred) -> tuple[int, ...]:
    """Buffers of a kernel: Where picks from either side into one of its own before it merges them."""
    if node.op_type != "Where":
        return ()
    condition, *sides = (shapes[name] for name in node.input)
    item = element_bits(inferred.tensors[node.output[0]].element_type, node.output[0]) // 8
    return tuple(item * math.prod(np.broadcast_shapes(condition, side)) for side in sides)


def _integer(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == name), default)


def _product(node: onnx.NodeProto, shapes: Mapping[str, Shape], constants: frozenset[str]) -> _Product | None:
    """Two for each multiply-add of matrix products and convolutions; additions of a bias are not counted."""
    op_type, inputs = node.op_type, node.input
    if op_type == "Attention":
        return _attention([shapes[name] for name in inputs[:3]], _integer(node, "q_num_heads", 1))
    if op_type not in _FACTOR:
        return None
    made, first, second = shapes[node.output[0]], shapes[inputs[0]], shapes[inputs[_FACTOR[op_type]]]
    total = math.prod(made)
    if op_type in ("Gemm", "QGemm"):
        inner = first[0 if _integer(node, "transA", 0) else 1]
        return _Product(2 * total * inner, made[0], _kernel(inputs[_FACTOR[op_type]], constants))
    if op_type in _MATMULS:
        inner = first[-2 if _integer(node, "transA", 0) and len(first) > 1 else -1] if first else 1
        columns = made[-1] if len(second) > 1 and made else 1
        constant = inputs[_FACTOR[op_type]] in constants and len(second) <= 2
        # A batch of products of activations has rows of its own in each; with weights, all rows are one product's.
        rows = total // columns if constant else math.prod(made[-2:-1])
        return _Product(2 * total * inner, max(rows, 1), "matmul" if constant else "activations")
    pixels = math.prod(made[2:]) * made[0]
    if op_type == "ConvTranspose":
        return _Product(2 * math.prod(first) * math.prod(second[1:]), math.prod(first[2:]) * first[0], "conv")
    return _Product(2 * total * math.prod(second[1:]), pixels, "conv")


def _kernel(factor: str, constants: frozenset[str]) -> ProductKernel:
    return "matmul" if factor in constants else "activations"


def _attention(shapes: Sequence[Shape], heads: int) -> _Product:
    """Scores and mix (opset 23); queries, keys and values of [batch, heads, tokens, width] or [batch, tokens, all]."""
    query, key, value = shapes
    keys, tokens = key[-2], query[-2]
    if len(query) == 3:
        query, value = (query[0], heads, tokens, query[2] // heads), (*value[:1], heads, keys, value[2] // heads)
    scores = math.prod(query) * keys
    mix = math.prod(query[:-1]) * keys * value[-1]
    return _Product(2 * (scores + mix), tokens, "activations")
