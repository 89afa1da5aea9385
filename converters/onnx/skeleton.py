"""An ONNX file without its weights: large tensors are skipped over in the mapped file, never read.

What is left is a few hundred kilobytes for any model, and all that shape inference needs.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgeq.errors import SourceError, require_package
from edgeq.profiles.onnx.wire import WireError, message_field, read_fields

if TYPE_CHECKING:
    import onnx

__all__ = ["Skeleton", "Weight", "element_bits", "read_skeleton", "walk_nodes"]

_LONGEST_NUMBER = 20  # digits of an offset or a length
_SMALL_BYTES = 4096  # tensors up to here stay: shapes, axes, scalars
_GRAPH, _INITIALIZER = 7, 5  # ModelProto.graph, GraphProto.initializer
_DIMS, _TYPE, _NAME, _RAW = 1, 2, 8, 9  # TensorProto
_DATA_FIELDS = frozenset({4, 5, 6, 7, _RAW, 10, 11})  # the typed arrays, and raw_data
_EXTERNAL, _LOCATION, _IS_EXTERNAL = 13, 14, 1

# Bits of one element by TensorProto.DataType; strings (8) have none and are refused.
_BITS = {
    **dict.fromkeys((2, 3, 9, 17, 18, 19, 20, 24), 8),
    **dict.fromkeys((4, 5, 10, 16), 16),
    **dict.fromkeys((1, 6, 12), 32),
    **dict.fromkeys((7, 11, 13, 14), 64),
    15: 128,
    **dict.fromkeys((21, 22, 23), 4),
    **dict.fromkeys((25, 26), 2),
}


@dataclasses.dataclass(frozen=True)
class Weight:
    """One initializer.

    Attributes:
        name: in the graph.
        element_type: a ``TensorProto.DataType``.
        dims: its shape.
        location: the file that holds it, relative to the model; None for the model itself.
    """

    name: str
    element_type: int
    dims: tuple[int, ...]
    location: str | None

    @property
    def n_bytes(self) -> int:
        """Packed size of the data."""
        return -(-math.prod(self.dims) * element_bits(self.element_type, self.name) // 8)


@dataclasses.dataclass(frozen=True)
class Skeleton:
    """A model whose large tensors have no data.

    Attributes:
        model: the ``ModelProto``.
        weights: every initializer of the main graph, in the order of the file.
        file_bytes: of the model and of the files that it refers to.
    """

    model: onnx.ModelProto
    weights: Sequence[Weight]
    file_bytes: int


def element_bits(element_type: int, name: str) -> int:
    """Bits of an element of a ``TensorProto.DataType``.

    Raises:
        SourceError: strings, or a type that is not known.
    """
    if element_type not in _BITS:
        raise SourceError(
            f"{name!r} has the ONNX element type {element_type}, which has no fixed size",
            "Export the model with numbers for all tensors",
        )
    return _BITS[element_type]


def read_skeleton(path: Path) -> Skeleton:
    """Read an ONNX file but for the data of its large tensors.

    Args:
        path: the ``.onnx`` file; external data lies beside it.

    Raises:
        MissingPackageError: the package onnx is not installed.
        SourceError: no such file, no ONNX, cut off, or external data that is missing, too short or elsewhere.
    """
    onnx = require_package("onnx", "onnx", "to read ONNX models")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            if size == 0:
                raise SourceError(f"{path.name} is empty", "Export the model again")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as data:
                model = onnx.ModelProto.FromString(_without_weights(data))
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}", "Check the path") from error
    except (WireError, _decode_error()) as error:
        raise SourceError(
            f"{path.name} is no ONNX file, or was cut off ({error})", "Export or download the model again"
        ) from error
    if not model.ir_version or not model.graph.node:
        raise SourceError(f"{path.name} holds no ONNX graph", "Give a model in the ONNX format")
    external = _external_bytes(path, [tensor for tensor in _tensors(model) if tensor.data_location])
    weights = [
        Weight(t.name, t.data_type, tuple(t.dims), _place(t).get("location", "") if t.data_location else None)
        for t in model.graph.initializer
    ]
    return Skeleton(model, weights, size + external)


def walk_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Nodes and those in their bodies, however deep."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in _bodies(attribute):
                yield from walk_nodes(graph.node)


def _bodies(attribute: onnx.AttributeProto) -> Iterator[onnx.GraphProto]:
    if attribute.HasField("g"):
        yield attribute.g
    yield from attribute.graphs


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor of a file, wherever it stands."""
    graphs = [model.graph]
    for training in model.training_info:
        graphs += (training.initialization, training.algorithm)
    for graph in graphs:
        yield from _tensors_of_graph(graph)
    for function in model.functions:
        yield from _tensors_of_attributes(function.attribute_proto)
        yield from _tensors_of_nodes(function.node)


def _tensors_of_graph(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    yield from _parts(graph.sparse_initializer)
    yield from _tensors_of_nodes(graph.node)


def _tensors_of_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        yield from _tensors_of_attributes(node.attribute)


def _tensors_of_attributes(attributes: Iterable[onnx.AttributeProto]) -> Iterator[onnx.TensorProto]:
    for attribute in attributes:
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors
        if attribute.HasField("sparse_tensor"):
            yield from _parts([attribute.sparse_tensor])
        yield from _parts(attribute.sparse_tensors)
        for graph in _bodies(attribute):
            yield from _tensors_of_graph(graph)


def _parts(sparse: Iterable[onnx.SparseTensorProto]) -> Iterator[onnx.TensorProto]:
    for tensor in sparse:
        yield from (tensor.values, tensor.indices)


def _place(tensor: onnx.TensorProto) -> dict[str, str]:
    """Where its data is: ``location``, ``offset`` and ``length``, as they are written."""
    # protobuf hands out bytes for strings that are not UTF-8: they name no place.
    return {entry.key: entry.value if isinstance(entry.value, str) else "" for entry in tensor.external_data}


def _decode_error() -> type[Exception]:
    """What the protobuf library raises for bytes that are no message; it comes with onnx."""
    error: type[Exception] = require_package("google.protobuf.message", "onnx", "to read ONNX models").DecodeError
    return error


def _external_bytes(path: Path, tensors: Sequence[onnx.TensorProto]) -> int:
    """Size of all files that hold external data; every tensor is checked to lie inside its file."""
    sizes: dict[str, int] = {}
    for tensor in tensors:
        place = _place(tensor)
        location = place.get("location", "")
        weight = Weight(tensor.name, tensor.data_type, tuple(tensor.dims), location)
        file = path.parent / location
        if not location or not _lies_inside(file, path.parent):
            raise SourceError(
                f"{path.name} refers to data at {location!r}, outside its own folder",
                "Put the data file beside the model and export it again",
            )
        if location not in sizes:
            if not _is_file(file):
                raise SourceError(
                    f"The weights of {path.name} are in {location}, which is not there, or is no file",
                    f"Put {location} beside {path.name}",
                )
            sizes[location] = file.stat().st_size
        offset, length = place.get("offset", "0"), place.get("length", str(weight.n_bytes))
        if not (_is_number(offset) and _is_number(length)) or int(length) != weight.n_bytes:
            raise SourceError(
                f"{path.name} gives {length[:40]} bytes at {offset[:40]} for {weight.name!r}, "
                f"which takes {weight.n_bytes}",
                "Export the model again",
            )
        if int(offset) + int(length) > sizes[location]:
            raise SourceError(f"{location} ends before the data of {weight.name!r}", "Copy or export it again")
    return sum(sizes.values())


def _lies_inside(file: Path, folder: Path) -> bool:
    """Whether a path that the model gives leads into its own folder; one that leads nowhere does not."""
    try:
        return file.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError):  # a loop of links, a name that is too long, a NUL
        return False


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long
        return False


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < _LONGEST_NUMBER


def _without_weights(data: memoryview) -> bytes:
    """A ``ModelProto`` in which large tensors have their name, type and shape only."""
    return _rewrite(
        data, 0, len(data), _GRAPH, lambda start, end: _rewrite(data, start, end, _INITIALIZER, _tensor(data))
    )


def _rewrite(data: memoryview, start: int, end: int, number: int, change: Callable[[int, int], bytes]) -> bytes:
    """A message with every field of that number replaced."""
    out = bytearray()
    for field in read_fields(data, start, end):
        if field.number == number:
            out += message_field(number, change(field.payload, field.end))
        else:
            out += data[field.start : field.end]
    return bytes(out)


def _tensor(data: memoryview) -> Callable[[int, int], bytes]:
    def shortened(start: int, end: int) -> bytes:
        if end - start <= _SMALL_BYTES:
            return bytes(data[start:end])
        return b"".join(data[f.start : f.end] for f in read_fields(data, start, end) if f.number not in _DATA_FIELDS)

    return shortened
