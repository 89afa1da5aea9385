"""From an ONNX file and the sizes of its axes to what the cost model needs: bytes, operations, order and lifetimes."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgeq.converters.onnx.checks import check_skeleton
from edgeq.converters.onnx.functions import expanded, half_functions, inlined
from edgeq.converters.onnx.fusion import fuse
from edgeq.converters.onnx.fusion_graph import Facts
from edgeq.converters.onnx.infer import Inferred, Tensor, bind_inputs, folded_by, infer_graph, input_axes
from edgeq.converters.onnx.layout import Blocked, block_channels
from edgeq.converters.onnx.ops import make_node
from edgeq.converters.onnx.precision import FLOAT, widen
from edgeq.converters.onnx.skeleton import Skeleton, element_bits, read_skeleton
from edgeq.errors import EdgeqError, SourceError, require_package
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
    "MatMulIntegerToFloat": 3,
    "MatMulNBits": 1,
    "ConvTranspose": 1,
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
    require_package("onnx", "onnx", "to read ONNX models")
    with _one_line(path):
        skeleton = read_skeleton(path)
        check_skeleton(skeleton, path.name)
        return input_axes(skeleton.model)


def read_onnx(
    path: Path,
    dims: Mapping[str, int],
    *,
    fixed: bool = False,
    disabled_optimizers: Collection[str] = (),
    on_gpu: bool = False,
) -> OnnxShape:
    """What a model holds and what one call computes. Weights are never read.

    Args:
        path: the ``.onnx`` file; external data lies beside it.
        dims: size of every dynamic axis, such as ``{"batch": 1, "sequence": 128}``.
        fixed: whether the session is told the sizes when it is made, so that it knows all shapes beforehand.
        disabled_optimizers: of ONNX Runtime, as the session will have them.
        on_gpu: halves stay halves, and weights and images as they are.

    Raises:
        MissingPackageError: the package onnx is not installed.
        SourceError: no ONNX file, cut off, one that contradicts itself, external data that is missing, or a shape that
            cannot be inferred.
        UnsupportedModelError: control flow, arithmetic in BFLOAT16, sparse weights, an opset that onnx does not know,
            or operators whose cost is not known.
        UsageError: an axis that has no size, or one that the model does not have.
    """
    require_package("onnx", "onnx", "to read ONNX models")
    with _one_line(path):
        skeleton = read_skeleton(path)
        check_skeleton(skeleton, path.name)
        model = expanded(inlined(skeleton.model, path.name))
        return _shape(skeleton, model, dims, _Session(fixed or not dims, frozenset(disabled_optimizers), on_gpu))


@dataclasses.dataclass(frozen=True)
class _Session:
    """What runs the graph; see `read_onnx`."""

    fixed: bool
    disabled: frozenset[str]
    on_gpu: bool


@contextlib.contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """Of files that contradict themselves in ways that no check foresees, say so in one line."""
    try:
        yield
    except EdgeqError:
        raise
    except Exception as error:  # onnx and protobuf raise many kinds, of no common base
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[-1] if lines else type(error).__name__
        raise SourceError(
            f"{path.name} is no sound ONNX model ({type(error).__name__}: {reason[:200]})", "Export the model again"
        ) from error


def _shape(skeleton: Skeleton, model: onnx.ModelProto, dims: Mapping[str, int], session: _Session) -> OnnxShape:
    bound = bind_inputs(model, dims)
    if session.on_gpu:
        sizes = infer_graph(model, bound, complete=True)
    else:
        model, sizes = _inferred(model, bound)
    named = sizes if session.fixed else infer_graph(model, input_axes(model), complete=False)
    outputs = tuple(value.name for value in model.graph.output)
    _check_outputs(outputs, sizes)
    # A session that knows all sizes computes at once whatever follows from them.
    folded = folded_by(model, sizes.constants if session.fixed else ())
    ops = [make_node(node, sizes, folded) for node in model.graph.node if not _is_gone(node, folded, outputs)]

    wide: dict[str, str] = {}
    if not session.on_gpu:
        types = {name: tensor.element_type for name, tensor in sizes.tensors.items()}
        ops, wide = widen(ops, types, folded, outputs)
    sizes, named = (_with_floats(inferred, wide) for inferred in (sizes, named))
    folded |= {name for name, half in wide.items() if half in folded}

    facts = _facts(sizes, named, folded, outputs)
    fused, made = fuse(ops, facts, disabled=session.disabled)
    more = {name: Tensor(weight.element_type, weight.dims) for name, weight in made.items()}
    sizes = dataclasses.replace(sizes, tensors={**sizes.tensors, **more})
    folded |= made.keys()

    laid_out: Sequence[GraphNode] = fused
    if not session.on_gpu:
        floats = frozenset(name for name, tensor in sizes.tensors.items() if tensor.element_type == FLOAT)
        laid_out, blocked = block_channels(fused, facts, floats)
        sizes, named = _with_blocks(sizes, blocked), _with_blocks(named, blocked)
    order = execution_order(laid_out, outputs)
    return OnnxShape(
        file_bytes=skeleton.file_bytes,
        parameters=_parameters(skeleton, order, sizes, folded),
        values={name: _value(name, sizes, named) for node in order for name in node.outputs if name},
        nodes=order,
        input_bytes=sum(_bytes(name, sizes) for name in bound),
        outputs=outputs,
        output_bytes=sum(_bytes(name, sizes) for name in outputs),
        entries=len(model.graph.node) + len(model.graph.initializer),
    )


def _inferred(model: onnx.ModelProto, bound: Mapping[str, tuple[int, ...]]) -> tuple[onnx.ModelProto, Inferred]:
    """The model with all sizes; what ONNX Runtime has no kernel for in half precision is expanded."""
    sizes = infer_graph(model, bound, complete=True)
    functions = half_functions(model, sizes)
    if not functions:
        return model, sizes
    model = expanded(model, functions)
    return model, infer_graph(model, bound, complete=True)


def _check_outputs(outputs: Sequence[str], sizes: Inferred) -> None:
    for name in outputs:
        if name not in sizes.tensors:
            raise SourceError(f"The output {name!r} is made by no node of the graph", "Export the model again")


def _facts(sizes: Inferred, named: Inferred, folded: frozenset[str], outputs: Sequence[str]) -> Facts:
    return Facts(
        shapes={name: tuple(a for a in t.shape or () if isinstance(a, int)) for name, t in sizes.tensors.items()},
        known={name: tensor.shape for name, tensor in named.tensors.items()},
        constants=folded,
        outputs=frozenset(outputs),
        types={name: tensor.element_type for name, tensor in sizes.tensors.items()},
    )


def _with_floats(inferred: Inferred, wide: Mapping[str, str]) -> Inferred:
    """With the FP32 copies of halves."""
    more = {n: Tensor(FLOAT, inferred.tensors[half].shape) for n, half in wide.items() if half in inferred.tensors}
    return dataclasses.replace(inferred, tensors={**inferred.tensors, **more})


def _with_blocks(inferred: Inferred, blocked: Mapping[str, Blocked]) -> Inferred:
    """With the values in blocks of channels; only the number of channels differs from the plain ones."""
    more = {}
    for name, value in blocked.items():
        shape = inferred.tensors[value.source].shape if value.source in inferred.tensors else None
        if shape is not None:
            shape = (shape[0], value.shape[1], *shape[2:])
        more[name] = Tensor(FLOAT, shape)
    return dataclasses.replace(inferred, tensors={**inferred.tensors, **more})


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
        elif node.op_type == "Conv" and node.inputs[1] in folded:
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
