"""Everything that does not depend on the inputs, computed once with ONNX Runtime instead of at every start.

torch folds small constants; position tables that were resized and masks that are the same in every call are larger.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

from edgeq.profiles.onnx.session import import_onnxruntime, start_session

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

__all__ = ["fold_constants"]

# Not constant although their inputs are, or meant to stay: what a quantizer wrote.
_KEPT = frozenset({"DequantizeLinear", "QuantizeLinear", "DynamicQuantizeLinear"})
_RANDOM = frozenset({"Bernoulli", "Dropout", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform"})
_RANDOM_LIKE = frozenset({"RandomUniformLike", "If", "Loop", "Scan"})
_FREE_BYTES = 1 << 20  # results up to here may be larger than all that they come from


def fold_constants(model: ir.Model) -> int:
    """Replace nodes of the main graph whose inputs are all known by their results, in place.

    Results that would make the file larger, such as an expanded mask, are left alone.

    Returns:
        How many nodes went.
    """
    import onnx_ir as ir

    graph = model.graph
    outputs = set(graph.outputs)
    folded = 0
    for node in tuple(graph):
        if not _foldable(node, graph) or any(value in outputs for value in node.outputs):
            continue
        most = max(_FREE_BYTES, sum(_n_bytes(value) for value in node.inputs))
        if sum(_declared_bytes(value) for value in node.outputs) > most:
            continue
        results = _run(model, node)
        if results is None or sum(array.nbytes for array in results) > most:
            continue
        for value, array in zip(tuple(node.outputs), results, strict=True):
            _replace(graph, value, ir.tensor(array, name=value.name))
        graph.remove(node, safe=True)
        folded += 1
    _drop_unused(graph)
    return folded


def _foldable(node: ir.Node, graph: ir.Graph) -> bool:
    if node.domain not in {"", "ai.onnx"} or node.op_type in _KEPT | _RANDOM | _RANDOM_LIKE:
        return False
    inputs = [value for value in node.inputs if value is not None]
    return bool(inputs) and all(
        value.const_value is not None and value.name in graph.initializers and not value.is_graph_input()
        for value in inputs
    )


def _n_bytes(value: ir.Value | None) -> int:
    tensor = None if value is None else value.const_value
    return 0 if tensor is None else tensor.nbytes


def _declared_bytes(value: ir.Value) -> int:
    """At least what a result will take, as far as its shape is known: what is too large is not even computed."""
    if value.shape is None:
        return 0
    sizes = [size for size in value.shape if isinstance(size, int)]
    return math.prod(sizes) if len(sizes) == len(value.shape) else 0


def _run(model: ir.Model, node: ir.Node) -> list[NDArray[Any]] | None:
    """Results of one node; None if ONNX Runtime has no kernel for it, and so keeps it."""
    import onnx_ir as ir

    ort = import_onnxruntime()
    inputs = {value.name: value for value in node.inputs if value is not None}
    tensors = {name: value.const_value for name, value in inputs.items() if value.const_value is not None}
    fed = {name: ir.Value(name=name, shape=_sizes(t), type=ir.TensorType(t.dtype)) for name, t in tensors.items()}
    copy = ir.Node(
        node.domain,
        node.op_type,
        [None if value is None else fed[value.name] for value in node.inputs],
        list(node.attributes.values()),
        outputs=[ir.Value(name=value.name) for value in node.outputs],
    )
    graph = ir.Graph(
        list(fed.values()), list(copy.outputs), nodes=[copy], opset_imports=dict(model.graph.opset_imports), name="node"
    )
    data = ir.serde.serialize_model(ir.Model(graph, ir_version=model.ir_version)).SerializeToString()
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    try:
        session = start_session(data, options)
        return cast("list[NDArray[Any]]", session.run(None, {name: t.numpy() for name, t in tensors.items()}))
    except Exception:  # noqa: BLE001 - no kernel, or a type that numpy has not: the node stays as it was
        return None


def _replace(graph: ir.Graph, value: ir.Value, tensor: ir.TensorProtocol) -> None:
    import onnx_ir as ir

    name = value.name
    value.name = f"{name}_folded_away"
    constant = ir.Value(name=name, const_value=tensor, shape=_sizes(tensor), type=ir.TensorType(tensor.dtype))
    graph.register_initializer(constant)
    ir.convenience.replace_all_uses_with(value, constant)


def _sizes(tensor: ir.TensorProtocol) -> ir.Shape:
    import onnx_ir as ir

    return ir.Shape([int(size) for size in tensor.numpy().shape])


def _drop_unused(graph: ir.Graph) -> None:
    outputs = set(graph.outputs)
    for name, value in tuple(graph.initializers.items()):
        if not value.uses() and value not in outputs and not value.is_graph_input():
            del graph.initializers[name]
