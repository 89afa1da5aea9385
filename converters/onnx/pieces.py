"""A model cut into pieces that run one after the other, each a session of its own.

A piece makes some values of the graph from others. Weights are no copies: every piece refers to one file, which
ONNX Runtime maps. So the tensors of a model can be looked at without holding all of them at once, and a layer can be
run on inputs that another model made.
"""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.onnx.feeds import input_specs
from edgeq.converters.onnx.skeleton import read_skeleton
from edgeq.errors import ConversionError, DiskFullError, SessionError, UsageError, require_package
from edgeq.profiles.onnx.session import import_onnxruntime, onnx_session_options, start_session
from edgeq.profiles.onnx.wire import message_field, read_fields
from edgeq.registry import nearest

if TYPE_CHECKING:
    import onnx
    import onnxruntime

__all__ = ["CutModel", "Piece", "Values", "named_arrays"]

Values = Mapping[str, NDArray[np.generic]]

_SMALL_BYTES = 4096  # tensors up to here stay in the graph, where shape inference and fusions read them
_ALIGNED = 4096  # a page: what is mapped can be read by any kernel
_GRAPH, _INITIALIZER, _RAW, _FILE = 7, 5, 9, "weights"  # ModelProto.graph, GraphProto.initializer, TensorProto.raw_data
_FOLDER_OPTION = "session.model_external_initializers_file_folder_path"


class CutModel:
    """A model whose parts can be run; a context manager.

    Args:
        path: the ``.onnx`` file; external data lies beside it.
        threads: of each call.

    Attributes:
        specs: of what a caller feeds.
        nodes: of the graph, in topological order.
        constants: values that do not depend on what is fed, weights among them.
        makers: the place in `nodes` of what makes a value.

    Raises:
        MissingPackageError: the package onnx or onnxruntime is not installed.
        SourceError: no sound ONNX file; see `read_skeleton`.
        DiskFullError: no room for the weights in the folder for temporary files.
    """

    def __init__(self, path: Path, *, threads: int = 1) -> None:
        require_package("onnx", "onnx", "to read ONNX models")
        import_onnxruntime()
        self._threads = threads
        self._folder = tempfile.TemporaryDirectory(prefix="edgeq-pieces-")
        try:
            self._model, self._data = _without_weights(path, Path(self._folder.name))
            self.specs = input_specs(self._model)
        except BaseException:
            self._folder.cleanup()
            raise
        graph = self._model.graph
        self.nodes: Sequence[onnx.NodeProto] = list(graph.node)
        self.makers = {name: n for n, node in enumerate(self.nodes) for name in node.output if name}
        self._fed = {value.name: value for value in graph.input}
        self._weights = {weight.name: weight for weight in graph.initializer}
        self.reads = [tuple(dict.fromkeys(_reads(node))) for node in self.nodes]
        self.constants = self._find_constants()

    def __enter__(self) -> CutModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove the file of weights; pieces cannot be made any more."""
        self._folder.cleanup()

    def check_names(self, names: Iterable[str]) -> None:
        """Refuse names of tensors that no caller feeds and no node makes.

        Raises:
            UsageError: such a name.
        """
        for name in names:
            if name in self._weights:
                raise UsageError(f"{name!r} is a weight, no activation", "Take its range from the weight itself")
            if name not in self.makers and name not in self._fed:
                close = nearest(name, [*self.makers, *self._fed], limit=1)
                raise UsageError(f"The graph has no tensor {name!r}", f"Did you mean {close[0]!r}" if close else "")

    def _find_constants(self) -> frozenset[str]:
        constants = set(self._weights)
        for node, reads in zip(self.nodes, self.reads, strict=True):
            if constants.issuperset(reads) and not node.op_type.startswith("Random"):
                constants.update(name for name in node.output if name)
        return frozenset(constants)

    def is_constant(self, place: int) -> bool:
        """Whether a node makes nothing but constants."""
        return self.constants.issuperset(filter(None, self.nodes[place].output))

    def above(self, names: Iterable[str], stop: frozenset[str] = frozenset()) -> list[int]:
        """Places of the nodes that these values need, in order.

        Args:
            names: values.
            stop: values that are given, and what lies above them is not needed; not those in `names` themselves.
        """
        found: set[int] = set()
        waiting = [self.makers[name] for name in names if name in self.makers]
        while waiting:
            place = waiting.pop()
            if place not in found:
                found.add(place)
                waiting += [self.makers[n] for n in self.reads[place] if n in self.makers and n not in stop]
        return sorted(found)

    def piece(self, places: Iterable[int], gives: Sequence[str]) -> Piece:
        """Nodes as a model of their own, which reads what they need of others.

        Args:
            places: in `nodes`; nodes that make constants for them are added.
            gives: names of what shall come out.
        """
        own = set(places)
        made = {name for place in own for name in self.nodes[place].output}
        constants = {name for place in own for name in self.reads[place] if name in self.constants and name not in made}
        own.update(self.above(constants))
        made.update(name for place in own for name in self.nodes[place].output)
        read = dict.fromkeys(name for place in sorted(own) for name in self.reads[place] if name not in made)
        weights = [self._weights[name] for name in read if name in self._weights]
        reads = tuple(name for name in read if name not in self._weights)
        return Piece(self, [self.nodes[place] for place in sorted(own)], weights, reads, tuple(gives))

    def open(self, piece: Piece, values: Values) -> onnxruntime.InferenceSession:
        """A session of a piece; types of its inputs are those of the values that it is opened for.

        Raises:
            SessionError: ONNX Runtime cannot load it.
        """
        import onnx

        model = onnx.ModelProto(ir_version=self._model.ir_version, opset_import=self._model.opset_import)
        model.functions.extend(self._model.functions)
        model.graph.name = "piece"
        model.graph.node.extend(piece.nodes)
        model.graph.initializer.extend(piece.weights)
        model.graph.input.extend(self._fed.get(name) or _value_info(name, values[name]) for name in piece.reads)
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in piece.gives)
        options = onnx_session_options(self._threads)
        options.add_session_config_entry(_FOLDER_OPTION, str(self._data))
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # pieces wait for each other
        try:
            return start_session(model.SerializeToString(), options)
        except SessionError as error:
            raise SessionError(
                f"The part of the model that makes {piece.gives[-1]!r}: {error.cause}", error.remedy
            ) from error


class Piece:
    """Part of a model.

    Attributes:
        nodes: in topological order.
        weights: that they read.
        reads: names of the values that it needs.
        gives: names of the values that it makes.
    """

    def __init__(
        self,
        model: CutModel,
        nodes: Sequence[onnx.NodeProto],
        weights: Sequence[onnx.TensorProto],
        reads: tuple[str, ...],
        gives: tuple[str, ...],
    ) -> None:
        self._model = model
        self._session: onnxruntime.InferenceSession | None = None
        self.nodes = nodes
        self.weights = weights
        self.reads = reads
        self.gives = gives

    def run(self, values: Values) -> dict[str, NDArray[np.generic]]:
        """What it makes; the session is opened at the first call.

        Args:
            values: all of `reads`, and maybe others.

        Raises:
            SessionError: ONNX Runtime cannot load the piece.
            ConversionError: it cannot run it on these values.
        """
        if not self.gives:
            return {}
        if self._session is None:
            self._session = self._model.open(self, values)
        try:
            made = self._session.run(list(self.gives), {name: values[name] for name in self.reads})
        except Exception as error:  # its exceptions have no common base but Exception
            raise ConversionError(
                f"ONNX Runtime cannot compute {self.gives[-1]!r} from these inputs: {_one_line(error)}",
                "Give inputs of the sizes that the model takes",
            ) from error
        return named_arrays(self.gives, made)

    def close(self) -> None:
        """Give its memory back; the next call opens it again."""
        self._session = None


def named_arrays(names: Sequence[str], made: Sequence[object]) -> dict[str, NDArray[np.generic]]:
    """What a session made, by name.

    Raises:
        ConversionError: a sequence, a map or a sparse tensor is among them.
    """
    arrays = {name: value for name, value in zip(names, made, strict=True) if isinstance(value, np.ndarray)}
    for name in names:
        if name not in arrays:
            raise ConversionError(f"{name!r} is no dense tensor", "Export the model with tensors alone")
    return arrays


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """Values that a node reads, those that its subgraphs take from outside among them."""
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            own = {value.name for value in (*graph.input, *graph.initializer)}
            own.update(name for inner in graph.node for name in inner.output)
            yield from (name for inner in graph.node for name in _reads(inner) if name not in own)
            yield from (value.name for value in graph.output if value.name not in own)


def _value_info(name: str, array: NDArray[np.generic]) -> onnx.ValueInfoProto:
    """An input with its type and its number of axes; their sizes may change from call to call."""
    import onnx

    return onnx.helper.make_tensor_value_info(
        name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), [None] * array.ndim
    )


def _without_weights(path: Path, folder: Path) -> tuple[onnx.ModelProto, Path]:
    """The model with its weights in a file, and the folder of that file."""
    import onnx

    skeleton = read_skeleton(path)  # refuses what is no model, and data outside of its folder
    if any(weight.location is not None for weight in skeleton.weights):
        return onnx.load(os.fspath(path), load_external_data=False), path.parent
    try:
        with (
            path.open("rb") as file,
            (folder / _FILE).open("wb") as out,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
            memoryview(mapped) as data,
        ):
            return onnx.ModelProto.FromString(_moved(data, out)), folder
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiskFullError(
            f"No room for the weights of {path.name} in {folder.parent}", "Free some, or set TMPDIR to another folder"
        ) from error


def _moved(data: memoryview, out: IO[bytes]) -> bytes:
    """A ``ModelProto`` whose large tensors lie in another file; they are copied without being held."""
    model = bytearray()
    for field in read_fields(data):
        if field.number != _GRAPH:
            model += data[field.start : field.end]
            continue
        graph = bytearray()
        for inner in read_fields(data, field.payload, field.end):
            if inner.number == _INITIALIZER:
                graph += message_field(_INITIALIZER, _moved_tensor(data, inner.payload, inner.end, out))
            else:
                graph += data[inner.start : inner.end]
        model += message_field(_GRAPH, bytes(graph))
    return bytes(model)


def _moved_tensor(data: memoryview, start: int, end: int, out: IO[bytes]) -> bytes:
    """A ``TensorProto`` that refers to where its data was written to."""
    import onnx

    raw = next((f for f in read_fields(data, start, end) if f.number == _RAW), None)
    if raw is None or raw.end - raw.payload <= _SMALL_BYTES:
        return bytes(data[start:end])
    offset = -(-out.tell() // _ALIGNED) * _ALIGNED
    out.seek(offset)
    out.write(data[raw.payload : raw.end])
    tensor = onnx.TensorProto.FromString(bytes(data[start : raw.start]) + bytes(data[raw.end : end]))
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", _FILE), ("offset", offset), ("length", raw.end - raw.payload)):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, str(value)
    moved: bytes = tensor.SerializeToString()
    return moved


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
