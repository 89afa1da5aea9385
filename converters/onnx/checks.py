"""What is refused of a file before anything is inferred from it, with a remedy of its own for each."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edgeq.converters.onnx.skeleton import Skeleton, element_bits, read_skeleton, walk_nodes
from edgeq.errors import SourceError, UnsupportedModelError

if TYPE_CHECKING:
    import onnx

__all__ = ["check_skeleton", "refuse_for_backend"]

_STANDARD = ("", "ai.onnx")
_STRING = 8  # TensorProto.DataType
_EXPORT_AGAIN = "Export the model again"
# Memory of an engine is taken before a call, so that no shape in it may follow from values.
_DATA_DEPENDENT = frozenset({"Compress", "NonMaxSuppression", "NonZero", "Unique"})
_SIZES_FROM_VALUES = {  # places of the inputs that decide about the shape of the output
    "ConstantOfShape": (0,),
    "Expand": (1,),
    "Pad": (1,),
    "Range": (0, 1, 2),
    "Reshape": (1,),
    "Resize": (2, 3),
    "Slice": (1, 2),
    "Tile": (1,),
    "TopK": (1,),
}
_TENSORRT = ("tensorrt", "tensorrt-rtx")
_RUNTIME = "com.microsoft"
_GRIDS = frozenset({"DequantizeLinear", "QuantizeLinear"})  # older quantizers wrote them in that domain


def check_skeleton(skeleton: Skeleton, name: str) -> None:
    """Refuse what is no sound model.

    Args:
        skeleton: of the file.
        name: of the file.

    Raises:
        SourceError: names that are no text or written twice, nodes that give nothing, no opset, negative sizes, element
            types that do not exist, or data that does not fill its tensor.
        UnsupportedModelError: an opset that the installed onnx does not know, or sparse weights.
    """
    _check_names(skeleton.model, name)
    _check_opsets(skeleton.model, name)
    _check_inputs(skeleton.model)
    _check_outputs_of_nodes(skeleton.model.graph)
    graph = skeleton.model.graph
    if graph.sparse_initializer:
        raise UnsupportedModelError(
            f"{name} holds sparse weights ({graph.sparse_initializer[0].values.name!r})",
            "Export the model with dense weights",
        )
    for weight, tensor in zip(skeleton.weights, graph.initializer, strict=True):
        if any(size < 0 for size in weight.dims):
            raise SourceError(f"The weight {weight.name!r} has a negative size: {list(weight.dims)}", _EXPORT_AGAIN)
        # A stored number takes a bit at least, even where its data was skipped.
        wrong = weight.location is None and weight.n_bytes > 64 * skeleton.file_bytes
        if wrong or (tensor.raw_data and len(tensor.raw_data) != weight.n_bytes):
            raise SourceError(
                f"The weight {weight.name!r} of shape {list(weight.dims)} takes {weight.n_bytes} bytes, "
                "which is not what the file holds",
                _EXPORT_AGAIN,
            )


def _check_names(model: onnx.ModelProto, file: str) -> None:
    graph = model.graph
    names = [value.name for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer)]
    names += [entry.domain for entry in model.opset_import]
    for node in graph.node:
        names += (node.op_type, node.domain, node.name, *node.input, *node.output)
    # protobuf hands out bytes for strings that are not UTF-8.
    if any(not isinstance(name, str) for name in names):
        raise SourceError(f"{file} holds a name that is not UTF-8", "Export or download the model again")


def _check_outputs_of_nodes(graph: onnx.GraphProto) -> None:
    """Every node gives something, and no two give it the same name; a body may use names of another body again."""
    for node in walk_nodes(graph.node):
        if not any(node.output):
            operator = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
            raise SourceError(f"The node {node.name!r} of the operator {operator} has no outputs", _EXPORT_AGAIN)
    made = {value.name for value in (*graph.input, *graph.initializer)}
    for node in graph.node:
        for name in node.output:
            if name and name in made:
                raise SourceError(
                    f"The name {name!r} is written twice, the second time by {node.name or node.op_type!r}",
                    _EXPORT_AGAIN,
                )
            made.add(name)


def _check_opsets(model: onnx.ModelProto, file: str) -> None:
    import onnx

    versions = [entry.version for entry in model.opset_import if entry.domain in _STANDARD]
    if not versions:
        raise SourceError(f"{file} does not say which version of ONNX's operators it uses", _EXPORT_AGAIN)
    newest = onnx.defs.onnx_opset_version()
    if max(versions) > newest:
        raise UnsupportedModelError(
            f"{file} uses opset {max(versions)}; onnx {onnx.__version__} knows those up to {newest}",
            "Install a newer onnx, or export the model with an older opset",
        )
    if min(versions) < 1:
        raise SourceError(f"{file} uses opset {min(versions)}, which does not exist", _EXPORT_AGAIN)


def _check_inputs(model: onnx.ModelProto) -> None:
    for value in model.graph.input:
        if not value.type.HasField("tensor_type"):
            continue  # another message has more to say
        if value.type.tensor_type.elem_type != _STRING:
            element_bits(value.type.tensor_type.elem_type, value.name)
        sizes = [dim.dim_value for dim in value.type.tensor_type.shape.dim if dim.HasField("dim_value")]
        if any(size < 0 for size in sizes):
            raise SourceError(
                f"The input {value.name!r} has an axis of size {min(sizes)}",
                "Export it with a size, or with a name if it is dynamic",
            )


def refuse_for_backend(model: Path, backend: str) -> None:
    """Refuse what a backend cannot compute at all: for TensorRT, shapes that depend on the data, and others' operators.

    Args:
        model: cleaned, so that what follows from constants and from shapes alone is no longer computed in it.
        backend: that it is made for. ONNX Runtime computes such graphs, and takes them all.

    Raises:
        UnsupportedModelError: with the operator and the node.
        SourceError: no sound ONNX file.
    """
    if backend not in _TENSORRT:
        return
    graph = read_skeleton(model).model.graph
    of_values = {value.name for value in graph.input} - {weight.name for weight in graph.initializer}
    for node in graph.node:
        if node.domain == _RUNTIME and node.op_type not in _GRIDS:
            raise UnsupportedModelError(
                f"The node {node.name or node.output[0]!r} is of ONNX Runtime's own operator {node.op_type}, which "
                f"{backend} does not know",
                "Give the model that this file was made from, or export it with standard operators",
            )
        sizes = [node.input[i] for i in _SIZES_FROM_VALUES.get(node.op_type, ()) if i < len(node.input)]
        if node.op_type in _DATA_DEPENDENT or not of_values.isdisjoint(sizes):
            raise UnsupportedModelError(
                f"The node {node.name or node.output[0]!r} ({node.op_type}) gives a shape that depends on the data, "
                f"and an engine's memory is taken beforehand ({backend})",
                "Export the model without it, such as boxes before their selection, and let the program do that; or "
                "convert with --backend onnxruntime-cuda",
            )
        if node.op_type not in ("Shape", "Size") and any(name in of_values for name in node.input):
            of_values.update(node.output)
