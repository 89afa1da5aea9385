"""One node of a file as the cost model sees it: multiply-adds, and buffers that its kernel takes beside its output."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from edgeq.converters.onnx.infer import Inferred
from edgeq.converters.onnx.scratch import GATES, early_scratch, integer, late_scratch
from edgeq.profiles.onnx.memory import GraphNode, ProductKernel

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
# Where the second factor stands among the inputs.
_FACTOR = {
    "Conv": 1,
    "ConvInteger": 1,
    "ConvTranspose": 1,
    "DeformConv": 1,
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
_MATMULS = _FACTOR.keys() - {"Conv", "ConvInteger", "ConvTranspose", "DeformConv", "Gemm", "QGemm", "QLinearConv"}


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
    return GraphNode(
        op_type=node.op_type,
        inputs=tuple(node.input),
        outputs=tuple(node.output),
        flops=product.flops if product else 0,
        kind="int8" if node.op_type in _INT8_PRODUCTS else "fp32",
        product=product.kernel if product else "matmul",
        rows=product.rows if product else 1,
        scratch=early_scratch(node, shapes, inferred),
        late_scratch=late_scratch(node, shapes, inferred),
    )


def _product(node: onnx.NodeProto, shapes: Mapping[str, Shape], constants: frozenset[str]) -> _Product | None:
    """Two for each multiply-add of matrix products and convolutions; additions of a bias are not counted."""
    op_type, inputs = node.op_type, node.input
    if op_type in _OWN:
        return _OWN[op_type](node, [shapes.get(name, ()) for name in inputs], shapes[node.output[0]])
    if op_type not in _FACTOR:
        return None
    made, first, second = shapes[node.output[0]], shapes[inputs[0]], shapes[inputs[_FACTOR[op_type]]]
    total = math.prod(made)
    if op_type in ("Gemm", "QGemm"):
        inner = first[0 if integer(node, "transA", 0) else 1]
        return _Product(2 * total * inner, max(made[0], 1), _kernel(inputs[_FACTOR[op_type]], constants))
    if op_type in _MATMULS:
        inner = first[-2 if integer(node, "transA", 0) and len(first) > 1 else -1] if first else 1
        columns = made[-1] if len(second) > 1 and made else 1
        constant = inputs[_FACTOR[op_type]] in constants and len(second) <= 2
        # A batch of products of activations has rows of its own in each; with weights, all rows are one product's.
        rows = total // max(columns, 1) if constant else math.prod(made[-2:-1])
        return _Product(2 * total * inner, max(rows, 1), "matmul" if constant else "activations")
    pixels = max(math.prod(made[2:]) * made[0], 1)
    if op_type == "ConvTranspose":
        return _Product(2 * math.prod(first) * math.prod(second[1:]), max(math.prod(first[2:]) * first[0], 1), "conv")
    return _Product(2 * total * math.prod(second[1:]), pixels, "conv")


def _kernel(factor: str, constants: frozenset[str]) -> ProductKernel:
    return "matmul" if factor in constants else "activations"


def _attention(node: onnx.NodeProto, shapes: Sequence[Shape], _: Shape) -> _Product:
    """Scores and mix (opset 23); queries, keys and values of [batch, heads, tokens, width] or [batch, tokens, all]."""
    query, key, value = shapes[:3]
    keys, tokens = key[-2], query[-2]
    if len(shapes) > 4 and shapes[4]:
        keys += shapes[4][-2]  # of earlier calls, always [batch, heads, tokens, width]
    heads, width, mixed = query[1], query[-1], value[-1]
    if len(query) == 3:
        heads = max(integer(node, "q_num_heads", 1), 1)
        width //= heads
        mixed //= max(integer(node, "kv_num_heads", heads), 1)
    return _Product(2 * query[0] * heads * tokens * keys * (width + mixed), max(tokens, 1), "activations")


def _recurrent(node: onnx.NodeProto, shapes: Sequence[Shape], _: Shape) -> _Product:
    """Every step multiplies its input and the last state by the weights of all gates, for each direction."""
    (steps, batch, width), (directions, *_rest), (*_more, hidden) = shapes[:3]
    flops = 2 * directions * steps * batch * GATES[node.op_type] * hidden * (width + hidden)
    return _Product(flops, max(batch, 1), "matmul")


def _einsum(node: onnx.NodeProto, shapes: Sequence[Shape], _: Shape) -> _Product | None:
    """A product of two tensors, over all their labels; of more, as many as if none were summed over before the last.

    An ellipsis stands for the axes that have no label of their own, aligned at their ends.
    """
    equation = next((attribute.s.decode() for attribute in node.attribute if attribute.name == "equation"), "")
    sizes: dict[str, int] = {}
    for term, shape in zip(equation.replace(" ", "").split("->")[0].split(","), shapes, strict=True):
        labels = list(term.replace("...", "."))
        if "." in labels:
            at, more = labels.index("."), len(shape) - len(labels) + 1
            labels[at : at + 1] = [str(more - i) for i in range(more)]
        for label, size in zip(labels, shape, strict=True):
            sizes[label] = max(sizes.get(label, 1), size)
    if len(shapes) < 2:
        return None
    total = math.prod(sizes.values())
    rows = max(math.prod(shapes[0][:-1]), 1)
    return _Product(2 * total * (len(shapes) - 1), rows, "activations")


def _few_bits(node: onnx.NodeProto, _: Sequence[Shape], made: Shape) -> _Product:
    """MatMulNBits of ONNX Runtime: its kernel reads the weights once for all rows, as others do."""
    return _Product(2 * math.prod(made) * integer(node, "K", 0), max(math.prod(made[:-1]), 1), "matmul")


_OWN: Mapping[str, Callable[[onnx.NodeProto, Sequence[Shape], Shape], _Product | None]] = {
    "Attention": _attention,
    "Einsum": _einsum,
    "MatMulNBits": _few_bits,
    **dict.fromkeys(GATES, _recurrent),
}
