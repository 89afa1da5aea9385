"""From an ONNX file and the sizes of its axes to what the cost model needs: bytes, operations, order and lifetimes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgeq.converters.onnx.fusion import Facts, fuse
from edgeq.converters.onnx.infer import Inferred, bind_inputs, folded_by, infer_graph, input_axes
from edgeq.converters.onnx.ops import make_node
from edgeq.converters.onnx.skeleton import Skeleton, element_bits, read_skeleton
from edgeq.errors import require_package
from edgeq.profiles.onnx.cost import Form, OnnxShape, Parameter
from edgeq.profiles.onnx.memory import GraphNode, GraphValue, execution_order

if TYPE_CHECKING:
    import onnx

__all__ = ["dynamic_axes", "read_onnx"]

# Kernels that keep their constant second factor in a packed form of their own (MLAS), by its place among the inputs.
_PACKING = {
    "MatMul": 1,
    "FusedMatMul": 1,
    "Gemm": 1,
    "MatMulInteger": 1,
    "MatMulIntegerToFloat": 1,
    "DynamicQuantizeMatMul": 1,
    "QLinearMatMul": 3,
    "QGemm": 3,
    "QLinearConv": 3,
}


def dynamic_axes(path: Path) -> dict[str, tuple[int | str | None, ...]]:
    """Shapes of a model's inputs; names stand for the axes that `read_onnx` must be given sizes for.

    Raises:
        MissingPackageError: the package onnx is not installed.
        SourceError: see `read_onnx`.
    """
    return input_axes(read_skeleton(path).model)


def read_onnx(path: Path, dims: Mapping[str, int], *, fixed: bool = False) -> OnnxShape:
    """What a model holds and what one call computes. Weights are never read.

    Args:
        path: the ``.onnx`` file; external data lies beside it.
        dims: size of every dynamic axis, such as ``{"batch": 1, "sequence": 128}``.
        fixed: whether the session is told the sizes when it is made, so that it knows all shapes beforehand.

    Raises:
        MissingPackageError: the package onnx is not installed.
        SourceError: no ONNX file, cut off, external data that is missing, or a shape that cannot be inferred.
        UnsupportedModelError: control flow, or operators that are not of the standard.
        UsageError: an axis that has no size, or one that the model does not have.
    """
    require_package("onnx", "onnx", "to read ONNX models")
    skeleton = read_skeleton(path)
    model = _inlined(skeleton.model)
    bound = bind_inputs(model, dims)
    sizes = infer_graph(model, bound, complete=True)
    fixed = fixed or not dims
    named = sizes if fixed else infer_graph(model, input_axes(model), complete=False)
    outputs = tuple(value.name for value in model.graph.output)
    # A session that knows all sizes computes at once whatever follows from them.
    folded = folded_by(model, sizes.constants if fixed else ())
    ops = [make_node(node, sizes, folded) for node in model.graph.node if not _is_gone(node, folded, outputs)]
    shapes = {name: tuple(a for a in t.shape or () if isinstance(a, int)) for name, t in sizes.tensors.items()}
    known = {name: tensor.shape for name, tensor in named.tensors.items()}
    nodes = fuse(ops, Facts(shapes, known, folded, frozenset(outputs)))
    order = execution_order(nodes, outputs)
    return OnnxShape(
        file_bytes=skeleton.file_bytes,
        parameters=_parameters(skeleton, order, sizes, folded),
        values={name: _value(name, sizes, named) for node in order for name in node.outputs if name},
        nodes=order,
        outputs=outputs,
        output_bytes=sum(_bytes(name, sizes) for name in outputs),
        entries=len(model.graph.node) + len(model.graph.initializer),
    )


def _inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    if not model.functions:
        return model
    from onnx import inliner

    return inliner.inline_local_functions(model)


def _is_gone(node: onnx.NodeProto, folded: frozenset[str], outputs: Sequence[str]) -> bool:
    """Whether a node is computed once when the model is loaded."""
    return all(name in folded for name in node.output if name) and not any(n in outputs for n in node.output)


def _bytes(name: str, inferred: Inferred) -> int:
    tensor = inferred.tensors[name]
    elements = 1
    for axis in tensor.shape or ():
        elements *= axis if isinstance(axis, int) else 1
    return -(-elements * element_bits(tensor.element_type, name) // 8)


def _value(name: str, sizes: Inferred, named: Inferred) -> GraphValue:
    known = named.tensors.get(name)
    return GraphValue(
        n_bytes=_bytes(name, sizes),
        item_bytes=element_bits(sizes.tensors[name].element_type, name) // 8,
        shape=None if known is None else known.shape,
    )


def _parameters(
    skeleton: Skeleton, nodes: Sequence[GraphNode], sizes: Inferred, folded: frozenset[str]
) -> tuple[Parameter, ...]:
    """Initializers of the file, and what a session computes from them when it is loaded."""
    forms: dict[str, Form] = {}
    read: set[str] = set()
    for node in nodes:
        read.update(node.inputs)
        place = _PACKING.get(node.op_type)
        if place is not None and len(node.inputs) > place:
            forms[node.inputs[place]] = "packed"
        elif node.op_type == "Conv":
            forms[node.inputs[1]] = "reordered"
    own = {weight.name for weight in skeleton.weights}
    written = {name for node in skeleton.model.graph.node if node.op_type == "Constant" for name in node.output}
    parameters = [
        Parameter(
            name=weight.name,
            dtype=_type_name(weight.element_type),
            n_bytes=weight.n_bytes,
            external=weight.location is not None,
            form=forms.get(weight.name, "plain"),
            kept=weight.name in read,
        )
        for weight in skeleton.weights
    ]
    parameters += [
        Parameter(
            name=name,
            dtype=_type_name(sizes.tensors[name].element_type),
            n_bytes=_bytes(name, sizes),
            external=False,
            form=forms.get(name, "plain"),
            kept=True,
            in_file=name in written,
        )
        for name in sorted(read & folded - own)
        if name in sizes.tensors
    ]
    return tuple(parameters)


def _type_name(element_type: int) -> str:
    from onnx import TensorProto

    name: str = TensorProto.DataType.Name(element_type)
    return name.lower()
