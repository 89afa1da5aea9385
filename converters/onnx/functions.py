"""Functions in place of their calls: those that a file defines, and operators that ONNX Runtime has no kernel for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgeq.converters.onnx.infer import Inferred
from edgeq.converters.onnx.precision import HALF, HALF_KERNELS
from edgeq.errors import SourceError, UnsupportedModelError

if TYPE_CHECKING:
    import onnx

__all__ = ["expanded", "half_functions", "inlined"]

_STANDARD = ("", "ai.onnx")
_MOST_NODES = 20_000  # that local functions may become; a large transformer has a tenth
_EXPORT_AGAIN = "Export the model again"
# Operators without a kernel on a CPU, which ONNX Runtime 1.31 runs as the nodes that ONNX defines them by.
_NO_KERNEL = frozenset({"HardSwish", "MeanVarianceNormalization", "Mish", "Swish"})


def expanded(model: onnx.ModelProto, op_types: frozenset[str] = _NO_KERNEL) -> onnx.ModelProto:
    """The model with nodes of the standard in place of operators that have no kernel."""
    present = {node.op_type for node in model.graph.node if node.domain in _STANDARD} & op_types
    if not present:
        return model
    from onnx import defs, inliner

    model = _copy(model)
    opset = next(entry.version for entry in model.opset_import if entry.domain in _STANDARD)
    for node in model.graph.node:
        if node.op_type in present and node.domain in _STANDARD:
            # The inliner leaves a hole where an attribute is not written down.
            own = {attribute.name for attribute in node.attribute}
            schema = defs.get_schema(node.op_type, opset)
            defaults = (a.default_value for a in schema.attributes.values() if a.name not in own)
            node.attribute.extend(value for value in defaults if value.name)
    return inliner.inline_selected_functions(model, [("", name) for name in sorted(present)], False, True)


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = type(model)()
    copy.CopyFrom(model)
    return copy


def half_functions(model: onnx.ModelProto, inferred: Inferred) -> frozenset[str]:
    """Operators that ONNX Runtime expands because they compute in half precision."""
    from onnx import defs

    found = set()
    for node in model.graph.node:
        names = [name for name in (*node.input, *node.output) if name in inferred.tensors]
        half = any(inferred.tensors[name].element_type == HALF for name in names)
        if half and node.domain in _STANDARD and node.op_type not in HALF_KERNELS:
            schema = defs.get_schema(node.op_type, inferred.opset)
            # The stubs of onnx leave these two out.
            if any(getattr(schema, name) for name in ("has_function", "has_context_dependent_function")):
                found.add(node.op_type)
    return frozenset(found)


def inlined(model: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """The model without local functions.

    Raises:
        SourceError: functions that call themselves, or that become too many nodes.
        UnsupportedModelError: functions in another opset than the model's.
    """
    if not model.functions:
        return model
    from onnx import inliner

    opsets = {entry.version for entry in model.opset_import if entry.domain in _STANDARD}
    for function in model.functions:
        others = {entry.version for entry in function.opset_import if entry.domain in _STANDARD} - opsets
        if others:
            raise UnsupportedModelError(
                f"The function {function.name!r} uses opset {min(others)}, the model {name} opset {min(opsets)}",
                "Export the model with one opset",
            )
    count = _count_nodes(model, name)
    if count > _MOST_NODES:
        raise SourceError(
            f"The functions of {name} become {count} nodes, more than {_MOST_NODES}", "Export the model without them"
        )
    return inliner.inline_local_functions(model)


def _count_nodes(model: onnx.ModelProto, file: str) -> int:
    """Nodes once all functions are in place, without putting them there."""
    bodies = {(f.domain, f.name): f.node for f in model.functions}
    counts: dict[tuple[str, str], int] = {}
    open_calls: list[tuple[str, str]] = []

    def of(nodes: Sequence[onnx.NodeProto]) -> int:
        return sum(called((node.domain, node.op_type)) for node in nodes)

    def called(key: tuple[str, str]) -> int:
        if key not in bodies:
            return 1
        if key in open_calls:
            raise SourceError(f"The function {key[1]!r} of {file} calls itself", _EXPORT_AGAIN)
        if key not in counts:
            open_calls.append(key)
            counts[key] = of(bodies[key])
            open_calls.pop()
        return counts[key]

    return of(model.graph.node)
