"""Graphs to disk, read back and checked before anybody relies on them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from edgeq.converters.onnx.checks import check_skeleton
from edgeq.converters.onnx.infer import input_axes
from edgeq.converters.onnx.skeleton import read_skeleton
from edgeq.errors import ConversionError, OutputExistsError, UnsupportedModelError
from edgeq.staging import disk_full_is_one_line
from edgeq.tensor_types import TensorSpec

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

__all__ = ["EXTERNAL_BYTES", "data_file", "describe_graph", "fresh_output", "shape_notes", "write_graph"]

EXTERNAL_BYTES = 64 << 20  # weights beyond go to a file of their own, which a session maps instead of copying it
_DATA_DEPENDENT = frozenset({"Compress", "NonMaxSuppression", "NonZero", "Unique"})
_ALIGNMENT = 1 << 16  # of large weights there: of pages, on all systems


def data_file(out: Path) -> Path:
    """Where the weights of a large model lie: ``model.onnx.data`` beside ``model.onnx``."""
    return out.with_name(f"{out.name}.data")


@contextlib.contextmanager
def fresh_output(out: Path) -> Iterator[None]:
    """A model that does not exist yet, and that is removed again if the block fails.

    Raises:
        OutputExistsError: there is something already.
        ConversionError: its folder is not there, or cannot be written.
    """
    for file in (out, data_file(out)):
        if file.exists() or file.is_symlink():
            raise OutputExistsError(f"{file} exists already", "Choose another output, or remove it yourself")
    if not out.parent.is_dir():
        raise ConversionError(f"{out.parent} is no folder", "Make it first")
    try:
        with disk_full_is_one_line(out.parent):
            yield
    except BaseException:
        for file in (out, data_file(out)):
            file.unlink(missing_ok=True)
        raise


def write_graph(model: ir.Model, out: Path) -> None:
    """Write a graph, its weights beside it if they are large, and check what was written.

    Raises:
        ConversionError: onnx's checker refuses it.
        OSError: the disk refuses it.
    """
    import onnx
    import onnx_ir as ir

    n_bytes = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    data = data_file(out)
    data.unlink(missing_ok=True)
    if n_bytes > EXTERNAL_BYTES:
        ir.save(model, out, external_data=data.name, size_threshold_bytes=1024, alignment=_ALIGNMENT)
    else:
        ir.save(ir.external_data.load_to_model(model), out)
    try:
        onnx.checker.check_model(str(out))
    except onnx.checker.ValidationError as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise ConversionError(
            f"The exported graph is not valid ONNX: {reason}", "Export it yourself and give the ONNX file"
        ) from error
    check_skeleton(read_skeleton(out), out.name)


def describe_graph(path: Path) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...], int]:
    """Inputs, outputs and opset of an ONNX file.

    Raises:
        SourceError: it cannot be read.
        UnsupportedModelError: inputs or outputs that are no tensors of numbers with a known number of axes.
    """
    skeleton = read_skeleton(path)
    check_skeleton(skeleton, path.name)
    graph = skeleton.model.graph
    input_axes(skeleton.model)
    weights = {tensor.name for tensor in graph.initializer}
    inputs = tuple(_spec(value) for value in graph.input if value.name not in weights)
    opset = max(entry.version for entry in skeleton.model.opset_import if entry.domain in {"", "ai.onnx"})
    return inputs, tuple(_spec(value) for value in graph.output), opset


def shape_notes(path: Path) -> tuple[str, ...]:
    """A note if shapes inside the graph depend on the values of its inputs, which some engines refuse."""
    for node in read_skeleton(path).model.graph.node:
        if node.op_type in _DATA_DEPENDENT:
            where = f"{node.op_type} at {node.name or node.output[0]!r}"
            return (f"Shapes inside the model depend on the data ({where}): what a call takes cannot be foretold",)
    return ()


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    from onnx import TensorProto, helper

    kind = value.type.tensor_type
    if not value.type.HasField("tensor_type") or not kind.HasField("shape"):
        raise UnsupportedModelError(
            f"{value.name!r} is no tensor with a known number of axes", "Export the model with tensors alone"
        )
    if kind.elem_type in {TensorProto.STRING, TensorProto.UNDEFINED}:
        raise UnsupportedModelError(f"{value.name!r} holds text, not numbers", "Compute it outside the model")
    shape = tuple(
        dim.dim_value if dim.HasField("dim_value") else dim.dim_param or f"{value.name}_axis_{index}"
        for index, dim in enumerate(kind.shape.dim)
    )
    return TensorSpec(name=value.name, dtype=helper.tensor_dtype_to_np_dtype(kind.elem_type).name, shape=shape)
