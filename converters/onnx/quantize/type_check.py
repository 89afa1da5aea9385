"""Whether a graph holds together by ONNX's own rules: each operator's inputs of one type where it asks for one."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from edgeq.errors import ConversionError, require_package

if TYPE_CHECKING:
    import onnx

__all__ = ["require_types", "takes_halves"]

_TYPES_DIFFER = "[TypeInferenceError]"  # in onnx's messages; those of shapes say something else
_NO_TYPE = "expected to have type but instead is null"  # behind an operator without a rule, as GroupNormalization
_REMEDY = "Keep the model in float32, and report it with the model's architecture"


@functools.cache
def takes_halves(op_type: str, opset: int, kind: str = "float16") -> bool:
    """Whether an operator of the standard domain may read and make halves of a kind wherever it may float32.

    Outputs that may be left out do not count: LayerNormalization's own statistics are float32 whatever it reads.
    """
    from onnx.defs import OpSchema

    schema = _schema(op_type, "", opset)
    if schema is None:
        return False
    allowed = {rule.type_param_str: set(rule.allowed_type_strs) for rule in schema.type_constraints}
    made = [formal for formal in schema.outputs if formal.option != OpSchema.FormalParameterOption.Optional]
    kinds = [allowed.get(formal.type_str, {formal.type_str}) for formal in (*schema.inputs, *made)]
    return all(f"tensor({kind})" in types for types in kinds if "tensor(float)" in types)


def require_types(path: Path) -> None:
    """Check a written model: onnx's checker, what onnx infers, and the types that the inputs of each operator share.

    What onnx knows no types of, such as the outputs of others' operators, is passed over.

    Args:
        path: of the ``.onnx`` file; external data lies beside it.

    Raises:
        ConversionError: the first fault, with the node.
        MissingPackageError: onnx is not installed.
    """
    onnx = require_package("onnx", "onnx", "to check what was written")
    model = onnx.load(path, load_external_data=False)
    try:
        onnx.checker.check_model(str(path))
        onnx.shape_inference.infer_shapes(model, strict_mode=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        text = " ".join(str(error).split())
        unsound = _TYPES_DIFFER in text and _NO_TYPE not in text
        if unsound or isinstance(error, onnx.checker.ValidationError):
            raise ConversionError(f"{path.name} is no sound ONNX model: {text[:300]}", _REMEDY) from error
    fault = next(_faults(onnx.shape_inference.infer_shapes(model)), None)
    if fault is not None:
        raise ConversionError(f"{path.name} is no sound ONNX model: {fault}", _REMEDY)


def _faults(model: onnx.ModelProto) -> Iterator[str]:
    """Nodes whose inputs differ in type where the operator asks for one."""
    from onnx import TensorProto

    graph = model.graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input, *graph.output)}
    types |= {initializer.name: initializer.data_type for initializer in graph.initializer}
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    for node in graph.node:
        bound: dict[str, int] = {}
        for name, kind in zip(node.input, _parameters(node, opsets.get(node.domain, 1)), strict=False):
            found = types.get(name, TensorProto.UNDEFINED)
            if found == TensorProto.UNDEFINED or kind is None:
                continue
            if bound.setdefault(kind, found) != found:
                both = " and ".join(TensorProto.DataType.Name(one).lower() for one in (bound[kind], found))
                yield f"{node.op_type} {node.name!r} reads {both}"


def _parameters(node: onnx.NodeProto, opset: int) -> Iterator[str | None]:
    """The type parameter that each input binds; None where it binds none."""
    from onnx import defs

    schema = _schema(node.op_type, node.domain, opset)
    if schema is None:
        return
    free = {rule.type_param_str for rule in schema.type_constraints}
    for index in range(len(node.input)):
        formal = schema.inputs[min(index, len(schema.inputs) - 1)]
        mixed = formal.option == defs.OpSchema.FormalParameterOption.Variadic and not formal.is_homogeneous
        yield formal.type_str if formal.type_str in free and not mixed else None


@functools.cache
def _schema(op_type: str, domain: str, opset: int) -> onnx.defs.OpSchema | None:
    from onnx import defs

    return defs.get_schema(op_type, opset, domain) if defs.has(op_type, opset, domain) else None
