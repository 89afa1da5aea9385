"""Small ONNX models, written without the onnx package: what the probe runs on a robot.

Field numbers are those of ``onnx.proto`` (ONNX IR, https://github.com/onnx/onnx/blob/main/onnx/onnx.proto).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from edgeq.profiles.onnx.wire import float_field, int_field, message_field, packed_ints_field

__all__ = ["ONNX_TYPES", "Attribute", "OnnxNode", "ValueInfo", "encode_model"]

Attribute = int | float | str | Sequence[int]

# TensorProto.DataType
ONNX_TYPES: Mapping[str, int] = MappingProxyType(
    {"float32": 1, "uint8": 2, "int8": 3, "int32": 6, "int64": 7, "bool": 9, "float16": 10, "float64": 11}
)
_IR_VERSION = 8  # of ONNX 1.10 to 1.12: every ONNX Runtime since 1.10 reads it
_OPSET = 20
_FLOAT, _INT, _STRING, _INTS = 1, 2, 3, 7  # AttributeProto.AttributeType


@dataclasses.dataclass(frozen=True)
class OnnxNode:
    """One operator of the default domain, or of ``domain``.

    Attributes:
        op_type: such as ``"MatMul"``.
        inputs: names of its inputs.
        outputs: names of its outputs.
        attributes: by name; integers, floats, strings and lists of integers.
        domain: empty for the ONNX operators.
    """

    op_type: str
    inputs: Sequence[str]
    outputs: Sequence[str]
    attributes: Mapping[str, Attribute] = dataclasses.field(default_factory=dict)
    domain: str = ""


@dataclasses.dataclass(frozen=True)
class ValueInfo:
    """Name, element type and shape of an input or output.

    Attributes:
        name: of the value.
        dtype: a key of `ONNX_TYPES`.
        shape: sizes, or names of dynamic axes.
    """

    name: str
    dtype: str
    shape: Sequence[int | str]


def encode_model(
    nodes: Sequence[OnnxNode],
    inputs: Sequence[ValueInfo],
    outputs: Sequence[ValueInfo],
    initializers: Mapping[str, NDArray[np.generic]],
) -> bytes:
    """A serialized ``ModelProto``.

    Args:
        nodes: in topological order.
        inputs: of the graph.
        outputs: of the graph.
        initializers: weights by name, of a dtype of `ONNX_TYPES`.
    """
    graph = b"".join(
        (
            *(message_field(1, _node(node)) for node in nodes),
            message_field(2, "edgeq"),
            *(message_field(5, _tensor(name, array)) for name, array in initializers.items()),
            *(message_field(11, _value_info(value)) for value in inputs),
            *(message_field(12, _value_info(value)) for value in outputs),
        )
    )
    opset = message_field(1, "") + int_field(2, _OPSET)
    domains = {node.domain for node in nodes if node.domain}
    custom = b"".join(message_field(8, message_field(1, domain) + int_field(2, 1)) for domain in sorted(domains))
    return (
        int_field(1, _IR_VERSION)
        + message_field(2, "edgeq")
        + message_field(7, graph)
        + message_field(8, opset)
        + custom
    )


def _node(node: OnnxNode) -> bytes:
    return b"".join(
        (
            *(message_field(1, name) for name in node.inputs),
            *(message_field(2, name) for name in node.outputs),
            message_field(3, node.outputs[0]),
            message_field(4, node.op_type),
            *(message_field(5, _attribute(name, value)) for name, value in node.attributes.items()),
            message_field(7, node.domain) if node.domain else b"",
        )
    )


def _attribute(name: str, value: Attribute) -> bytes:
    head = message_field(1, name)
    if isinstance(value, int):
        return head + int_field(3, value) + int_field(20, _INT)
    if isinstance(value, float):
        return head + float_field(2, value) + int_field(20, _FLOAT)
    if isinstance(value, str):
        return head + message_field(4, value) + int_field(20, _STRING)
    return head + b"".join(int_field(8, item) for item in value) + int_field(20, _INTS)


def _tensor(name: str, array: NDArray[np.generic]) -> bytes:
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return b"".join(
        (
            packed_ints_field(1, array.shape),
            int_field(2, ONNX_TYPES[array.dtype.name]),
            message_field(8, name),
            message_field(9, little.tobytes()),
        )
    )


def _value_info(value: ValueInfo) -> bytes:
    dims = b"".join(
        message_field(1, int_field(1, size) if isinstance(size, int) else message_field(2, size))
        for size in value.shape
    )
    tensor = int_field(1, ONNX_TYPES[value.dtype]) + message_field(2, dims)
    return message_field(1, value.name) + message_field(2, message_field(1, tensor))
