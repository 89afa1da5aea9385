"""Which files an ONNX graph reads: found without the package onnx, which a robot does not have.

TensorRT's parser follows whatever place a tensor's external data names. A bundle is untrusted, so the places are looked
at first. Field numbers are those of onnx.proto (ModelProto, GraphProto, NodeProto, AttributeProto, TensorProto).
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

from edgeq.errors import SourceError
from edgeq.profiles.onnx.wire import BYTES, WireError, read_fields

__all__ = ["external_files", "graph_bytes"]

# Which fields of a message hold messages of which kind, on the way to tensors.
_WAYS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
_KEY, _VALUE = 1, 2
_DEEPEST = 32  # graphs within graphs


def external_files(onnx: Path) -> tuple[Path, ...]:
    """The files beside a model that hold its weights, by name.

    Raises:
        SourceError: the model cannot be read, is no ONNX file, or names a file outside its folder or one that is not
            there.
    """
    try:
        with onnx.open("rb") as file:
            if not onnx.stat().st_size:
                raise SourceError(f"{onnx} is empty", "Convert the model again")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as data:
                names = sorted(set(_locations(data, 0, len(data), "model", 0)))
    except OSError as error:
        raise SourceError(f"{onnx} cannot be read: {error.strerror or error}", "Check the path") from error
    except WireError as error:
        raise SourceError(f"{onnx} is no ONNX file, or was cut off ({error})", "Convert the model again") from error
    return tuple(_beside(onnx, name) for name in names)


def graph_bytes(onnx: Path) -> int:
    """Size of a model with its external data.

    Raises:
        SourceError: as `external_files`.
    """
    return sum(path.stat().st_size for path in (onnx, *external_files(onnx)))


def _locations(data: memoryview, start: int, end: int, kind: str, depth: int) -> Iterator[str]:
    """The values under ``location`` of all tensors in a message of that kind."""
    if depth > _DEEPEST:
        raise WireError("graphs within graphs without end")
    ways = _WAYS[kind]
    for field in read_fields(data, start, end):
        below = ways.get(field.number)
        if below is None or field.wire_type != BYTES:
            continue
        if below == "entry":
            entry = {f.number: bytes(data[f.payload : f.end]) for f in read_fields(data, field.payload, field.end)}
            if entry.get(_KEY) == b"location":
                yield entry.get(_VALUE, b"").decode("utf-8", errors="replace")
        else:
            yield from _locations(data, field.payload, field.end, below, depth + (below == "graph"))


def _beside(onnx: Path, name: str) -> Path:
    path = onnx.parent / name
    try:
        inside = bool(name) and path.resolve().is_relative_to(onnx.parent.resolve())
        there = inside and path.is_file()
    except (OSError, RuntimeError, ValueError):  # a loop of links, a name that is too long, a NUL
        inside = there = False
    if not inside:
        raise SourceError(
            f"{onnx} refers to data at {name[:200]!r}, outside its own folder", "Do not use this model; export it again"
        )
    if not there:
        raise SourceError(f"The weights of {onnx} are in {name[:200]!r}, which is not there", f"Put it beside {onnx}")
    return path
