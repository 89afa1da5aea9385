"""Shapes of every value of a graph at given input shapes, node by node with onnx's own inference.

onnx infers one node from the types and the small constants that go into it. What exporters compute about shapes
(``Shape``, ``Range``, ``Slice`` …) is evaluated on the way, so that no axis stays open.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.onnx.contrib import runtime_types
from edgeq.errors import SourceError, UnsupportedModelError, UsageError, require_package
from edgeq.registry import nearest

if TYPE_CHECKING:
    import onnx

__all__ = ["Axis", "Inferred", "Tensor", "bind_inputs", "folded_by", "infer_graph", "input_axes"]

Axis = int | str | None

_MOST_ELEMENTS = 1 << 17  # of a constant that is evaluated
# Operators that exporters compute shapes and masks with. Others are never evaluated, only inferred.
_EVALUATED = frozenset(
    [
        "Abs",
        "Add",
        "And",
        "Cast",
        "CastLike",
        "Ceil",
        "Concat",
        "Constant",
        "ConstantOfShape",
        "CumSum",
        "Div",
        "Equal",
        "Expand",
        "Flatten",
        "Floor",
        "Gather",
        "GatherND",
        "Greater",
        "GreaterOrEqual",
        "Identity",
        "Less",
        "LessOrEqual",
        "Max",
        "Min",
        "Mod",
        "Mul",
        "Neg",
        "Not",
        "Or",
        "Pow",
        "Range",
        "ReduceMax",
        "ReduceMin",
        "ReduceProd",
        "ReduceSum",
        "Reshape",
        "Size",
        "Slice",
        "Split",
        "Sqrt",
        "Squeeze",
        "Sub",
        "Tile",
        "Transpose",
        "Trilu",
        "Unsqueeze",
        "Where",
    ]
)
_STANDARD = ("", "ai.onnx")  # names of the domain of ONNX's own operators
# Heavy, and of a cost that no kernel of the probe resembles.
_UNCOUNTED = frozenset({"CausalConvWithState", "DFT", "Det", "LinearAttention", "STFT"})
# Nodes that are run at every call although all that they read is constant.
_NOT_FOLDED = frozenset({"DequantizeLinear", "RandomNormal", "RandomUniform"})
# onnx infers no shape: it knows them by their functions alone.
_SAME_SHAPE = frozenset({"GroupNormalization"})
_LARGEST_AXIS = 2**40


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Element type and shape; an axis is a size, a name, or None for unknown."""

    element_type: int
    shape: tuple[Axis, ...] | None


@dataclasses.dataclass(frozen=True)
class Inferred:
    """What is known of a graph.

    Attributes:
        tensors: every value and initializer.
        constants: small values that were evaluated: they do not depend on what is fed in, at these shapes.
        opset: of ONNX's own operators.
    """

    tensors: Mapping[str, Tensor]
    constants: Mapping[str, NDArray[np.generic]]
    opset: int


def input_axes(model: onnx.ModelProto) -> dict[str, tuple[Axis, ...]]:
    """Shapes of the inputs that a caller feeds, with the names of dynamic axes."""
    weights = {tensor.name for tensor in model.graph.initializer}
    axes: dict[str, tuple[Axis, ...]] = {}
    for value in model.graph.input:
        if value.name in weights:
            continue
        if not value.type.HasField("tensor_type") or not value.type.tensor_type.HasField("shape"):
            raise UnsupportedModelError(
                f"The input {value.name!r} is no tensor with a known number of axes", "Export it as a tensor"
            )
        axes[value.name] = _axes(value.type) or ()
    return axes


def _axes(proto: onnx.TypeProto) -> tuple[Axis, ...] | None:
    if not proto.tensor_type.HasField("shape"):
        return None
    return tuple(
        dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None for dim in proto.tensor_type.shape.dim
    )


def bind_inputs(model: onnx.ModelProto, dims: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Shapes of the inputs with every named axis replaced by its size.

    Args:
        model: the graph.
        dims: axis name to size. An axis without a name is bound as ``"input:0"``, by its input and position.

    Raises:
        UsageError: an axis that is not bound, not there, or below 1.
    """
    axes = input_axes(model)
    named = {name: tuple(a if a is not None else f"{name}:{i}" for i, a in enumerate(s)) for name, s in axes.items()}
    known = dict.fromkeys(a for shape in named.values() for a in shape if isinstance(a, str))
    for name, size in dims.items():
        if name not in known:
            close = nearest(name, list(known)) or list(known)
            choice = f"Bind {', '.join(close)}" if close else "This model's shapes are fixed: bind no axis"
            raise UsageError(f"The model has no dynamic axis {name!r}", choice)
        if not isinstance(size, int) or not 1 <= size <= _LARGEST_AXIS:
            raise UsageError(
                f"The axis {name} cannot have the size {size!r}", "Give a whole size of 1 or more, below 2**40"
            )
    missing = [name for name in known if name not in dims]
    if missing:
        raise UsageError(
            f"The size of the dynamic axis {missing[0]!r} is not given",
            f"Give a size for {', '.join(missing)}",
        )
    return {n: tuple(dims[a] if isinstance(a, str) else a for a in shape) for n, shape in named.items()}


def infer_graph(model: onnx.ModelProto, inputs: Mapping[str, tuple[Axis, ...]], *, complete: bool) -> Inferred:
    """Infer every value.

    Args:
        model: with local functions already inlined; large initializers may lack their data.
        inputs: shapes of what is fed in.
        complete: True to insist on sizes for all axes; False to keep names, and what the file itself says of values.

    Raises:
        UnsupportedModelError: control flow, an operator that onnx does not know, or a shape that depends on the data.
        SourceError: the graph contradicts itself.
    """
    require_package("onnx", "onnx", "to infer shapes")
    return _Walk(model, complete).run(inputs)


def folded_by(model: onnx.ModelProto, constants: Iterable[str]) -> frozenset[str]:
    """Values that a session computes once when it is loaded, and the initializers that they come from.

    Args:
        model: the graph.
        constants: values that are known beside the initializers, because all sizes are.
    """
    folded = {tensor.name for tensor in model.graph.initializer} | set(constants)
    for node in model.graph.node:
        read = node.input[:1] if node.op_type == "CastLike" else node.input
        if node.op_type not in _NOT_FOLDED and all(name in folded for name in read if name):
            folded.update(name for name in node.output if name)
    return frozenset(folded)


class _Walk:
    """One pass over the nodes in their order."""

    def __init__(self, model: onnx.ModelProto, complete: bool) -> None:
        self.model = model
        self.complete = complete
        self.opsets = {entry.domain: entry.version for entry in model.opset_import}
        self.opset = self.opsets.get("", self.opsets.get("ai.onnx", 1))
        self.types: dict[str, onnx.TypeProto] = {}
        self.constants: dict[str, NDArray[np.generic]] = {}
        self.said = {value.name: value.type for value in model.graph.value_info}

    def run(self, inputs: Mapping[str, tuple[Axis, ...]]) -> Inferred:
        from onnx import helper, numpy_helper

        for value in self.model.graph.input:
            if value.name in inputs:
                element = value.type.tensor_type.elem_type
                self.types[value.name] = helper.make_tensor_type_proto(element, inputs[value.name])
        for tensor in self.model.graph.initializer:
            self.types[tensor.name] = helper.make_tensor_type_proto(tensor.data_type, list(tensor.dims))
            if not tensor.data_location and _has_data(tensor):
                self.constants[tensor.name] = numpy_helper.to_array(tensor)
        for node in self.model.graph.node:
            self._node(node)
        tensors = {n: Tensor(t.tensor_type.elem_type, _axes(t)) for n, t in self.types.items()}
        return Inferred(tensors, self.constants, self.opset)

    def _node(self, node: onnx.NodeProto) -> None:
        if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
            raise UnsupportedModelError(
                f"The graph has control flow ({node.op_type} {node.name!r}), whose cost depends on the data",
                "Export the model without If, Loop and Scan",
            )
        self.types |= self._infer(node)
        if self.complete:
            self._check(node)
        fed = [name for name in node.input if name]
        self._evaluate(node, fed)

    def _infer(self, node: onnx.NodeProto) -> dict[str, onnx.TypeProto]:
        import onnx
        from onnx import defs, numpy_helper, shape_inference

        if node.op_type in _UNCOUNTED:
            raise UnsupportedModelError(
                f"What the operator {node.op_type} (node {node.name!r}) costs is not known",
                "Compute it outside the model",
            )
        if node.op_type in _SAME_SHAPE and node.input and node.input[0] in self.types and node.output:
            return {node.output[0]: self.types[node.input[0]]}
        if node.domain not in _STANDARD:
            return runtime_types(node, self.types, self.said)
        try:
            schema = defs.get_schema(node.op_type, self.opset)
            types = {name: self.types[name] for name in node.input if name}
            data = {
                name: numpy_helper.from_array(self.constants[name], name)
                for name in node.input
                if name in self.constants
            }
            inferred = shape_inference.infer_node_outputs(
                schema, node, types, data, opset_imports=list(self.model.opset_import), ir_version=self.model.ir_version
            )
        except defs.SchemaError as error:
            raise UnsupportedModelError(
                f"onnx {onnx.__version__} does not know the operator {node.op_type}", "Install a newer onnx"
            ) from error
        except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError) as error:
            raise SourceError(
                f"The shapes at {node.op_type} {node.name!r} do not fit: {_last_line(error)}",
                "Choose other sizes for the dynamic axes, or export the model again",
            ) from error
        except KeyError as error:
            raise SourceError(
                f"{node.op_type} {node.name!r} reads {error.args[0]!r}, which no earlier node makes",
                "Export the model again",
            ) from error
        return self._with_said(dict(inferred))

    def _with_said(self, inferred: dict[str, onnx.TypeProto]) -> dict[str, onnx.TypeProto]:
        """In the pass with names, axes that inference leaves open are what the file says of them."""
        from onnx import helper

        if self.complete:
            return inferred
        for name, proto in inferred.items():
            shape, said = _axes(proto), _axes(self.said[name]) if name in self.said else None
            if said is not None and shape is not None and len(said) != len(shape):
                raise SourceError(
                    f"The file says that {name!r} has {len(said)} axes, but it has {len(shape)}",
                    "Export the model again",
                )
            if said is not None and (shape is None or None in shape):
                merged = said if shape is None else [s if a is None else a for a, s in zip(shape, said, strict=True)]
                inferred[name] = helper.make_tensor_type_proto(proto.tensor_type.elem_type, merged)
        return inferred

    def _check(self, node: onnx.NodeProto) -> None:
        for name in node.output:
            if not name:
                continue
            if name not in self.types or _sizes(_axes(self.types[name])) is None:
                raise UnsupportedModelError(
                    f"The shape of {name!r} (from {node.op_type}) does not follow from the inputs' shapes",
                    "Export the model with fewer data-dependent operators",
                )

    def _evaluate(self, node: onnx.NodeProto, fed: Sequence[str]) -> None:
        """Compute a small constant, so that shapes that depend on it can be inferred."""
        if node.op_type == "Shape":
            source = _sizes(_axes(self.types[fed[0]]))
            if source is not None:
                ends = {attribute.name: attribute.i for attribute in node.attribute}
                sizes = source[ends.get("start", 0) : ends.get("end", len(source))]
                self.constants[node.output[0]] = np.array(sizes, np.int64)
            return
        if node.op_type not in _EVALUATED or node.domain not in _STANDARD:
            return
        if all(name in self.constants for name in fed):
            shapes = [_sizes(_axes(self.types[name])) if name in self.types else None for name in node.output if name]
            if all(shape is not None and math.prod(shape) <= _MOST_ELEMENTS for shape in shapes):
                self._compute(node, fed)

    def _compute(self, node: onnx.NodeProto, fed: Sequence[str]) -> None:
        from onnx.reference import ReferenceEvaluator

        try:
            evaluator = ReferenceEvaluator(node, opsets=self.opsets)
            results = evaluator.run(None, {name: self.constants[name] for name in fed})
        except (ArithmeticError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            raise SourceError(
                f"The constant at {node.op_type} {node.name!r} cannot be computed: {_last_line(error)}",
                "Choose other sizes for the dynamic axes, or export the model again",
            ) from error
        names = [name for name in node.output if name]
        self.constants.update(zip(names, (np.asarray(result) for result in results), strict=False))


def _sizes(axes: Sequence[Axis] | None) -> tuple[int, ...] | None:
    """The sizes of a shape, None if one of them is open."""
    if axes is None:
        return None
    sizes = tuple(axis for axis in axes if isinstance(axis, int))
    return sizes if len(sizes) == len(axes) else None


def _has_data(tensor: onnx.TensorProto) -> bool:
    return bool(
        tensor.raw_data
        or tensor.float_data
        or tensor.int32_data
        or tensor.int64_data
        or tensor.double_data
        or tensor.uint64_data
        or 0 in tensor.dims
    )


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
