"""Operators of ONNX Runtime's own domain in files that its tools wrote: the few whose cost is known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from edgeq.errors import SourceError, UnsupportedModelError

if TYPE_CHECKING:
    import onnx

__all__ = ["runtime_types"]

_DOMAIN = "com.microsoft"
_FLOAT = 1
# The output has the shape and the type of the first input.
_LIKE_INPUT = frozenset(
    {"BiasGelu", "FastGelu", "Gelu", "QuickGelu", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization"}
)
_PRODUCTS = {"FusedMatMul": 1, "MatMulIntegerToFloat": 1, "DynamicQuantizeMatMul": 1}
# What is written down of their outputs is believed: they do no more than a few operations for each element.
_LIGHT = frozenset(
    {
        "DequantizeLinear",
        "QLinearAdd",
        "QLinearAveragePool",
        "QLinearConcat",
        "QLinearGlobalAveragePool",
        "QLinearLeakyRelu",
        "QLinearMul",
        "QLinearSigmoid",
        "QLinearSoftmax",
        "QuantizeLinear",
    }
)
# These do more, and are counted from the shapes that are written down.
_COUNTED = frozenset({"MatMulNBits", "QGemm"})


def runtime_types(
    node: onnx.NodeProto, types: Mapping[str, onnx.TypeProto], said: Mapping[str, onnx.TypeProto]
) -> dict[str, onnx.TypeProto]:
    """Types of the outputs of a node that is none of the standard.

    Args:
        node: of another domain.
        types: of all that came before it.
        said: what the file says of values.

    Raises:
        SourceError: an input that is not there, or shapes that do not fit.
        UnsupportedModelError: an operator whose cost or whose shapes are not known.
    """
    from onnx import helper

    shapes = []
    for name in node.input:
        if name and name not in types:
            raise SourceError(
                f"{node.op_type} {node.name!r} reads {name!r}, which no earlier node makes", "Export the model again"
            )
        proto = types[name].tensor_type if name else None
        shapes.append(
            [d.dim_value if d.HasField("dim_value") else d.dim_param for d in proto.shape.dim] if proto else []
        )
    if node.domain == _DOMAIN and node.input and node.output:
        first = types[node.input[0]]
        if node.op_type in _LIKE_INPUT:
            return {name: first for name in node.output if name}
        made = _product(node, shapes)
        if made is not None:
            element = first.tensor_type.elem_type if node.op_type in ("FusedMatMul", "MatMulNBits") else _FLOAT
            return {node.output[0]: helper.make_tensor_type_proto(element, made)}
        written = {name: said[name] for name in node.output if name in said}
        if node.op_type in _LIGHT | _COUNTED and len(written) == sum(1 for name in node.output if name):
            return written
    raise UnsupportedModelError(
        f"The operator {node.domain}.{node.op_type} (node {node.name!r}) is none of the ONNX standard, "
        "and what it costs is not known",
        "Export the model with standard operators; ONNX Runtime fuses them itself when it loads",
    )


def _product(node: onnx.NodeProto, shapes: list[list[int | str]]) -> list[int | str] | None:
    """The shape that a product of matrices makes; None for other operators."""
    integers = {attribute.name: attribute.i for attribute in node.attribute}
    if node.op_type == "MatMulNBits":
        return [*shapes[0][:-1], integers.get("N", 0)]
    if node.op_type not in _PRODUCTS:
        return None
    place = _PRODUCTS[node.op_type]
    if len(shapes) <= place or len(shapes[0]) < 1 or len(shapes[place]) < 1:
        raise SourceError(f"{node.op_type} {node.name!r} has not two factors", "Export the model again")
    first, second = list(shapes[0]), list(shapes[place])
    for factor, name in ((first, "transBatchA"), (second, "transBatchB")):
        if integers.get(name):  # the first axis goes behind those of the batch
            factor.insert(len(factor) - 2, factor.pop(0))
    if integers.get("transA") and len(first) > 1:
        first[-2:] = first[:-3:-1]
    if integers.get("transB") and len(second) > 1:
        second[-2:] = second[:-3:-1]
    if isinstance(first[-1], int) and isinstance(second[-2:][0], int) and first[-1] != second[-2:][0]:
        raise SourceError(
            f"The shapes at {node.op_type} {node.name!r} do not fit: {first[-1]} columns, {second[-2:][0]} rows",
            "Export the model again",
        )
    batch = first[:-2] if len(first) >= len(second) else second[:-2]
    return [*batch, *first[-2:-1], *(second[-1:] if len(second) > 1 else [])]
