"""Read the header of a GGUF file without trusting it.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little endian). Every length is
checked against the file's size before anything is allocated, so that a truncated or hostile file gets one line.
``gguf.GGUFReader`` is the oracle in the tests; this reader exists because it maps whole files and trusts their counts.
"""

from __future__ import annotations

import dataclasses
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from edgeq.errors import SourceError
from edgeq.ggml_types import ggml_type_by_id

__all__ = ["GgufHeader", "GgufTensor", "read_header"]

Scalar = bool | int | float | str
Value = Scalar | list[Scalar]

_SCALARS: dict[int, tuple[str, int]] = {
    0: ("<B", 1),
    1: ("<b", 1),
    2: ("<H", 2),
    3: ("<h", 2),
    4: ("<I", 4),
    5: ("<i", 4),
    6: ("<f", 4),
    7: ("<?", 1),
    10: ("<Q", 8),
    11: ("<q", 8),
    12: ("<d", 8),
}
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4
_DEFAULT_ALIGNMENT = 32


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """One tensor's entry.

    Attributes:
        name: as in the file.
        shape: in ggml's order, the row length first.
        type_id: ``enum ggml_type``.
        offset: of its data from the start of the file.
    """

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int

    @property
    def type(self) -> str:
        """The type's name, or ``type-<id>`` for one that edgeq does not know."""
        known = ggml_type_by_id(self.type_id)
        return known.name if known else f"type-{self.type_id}"

    @property
    def n_params(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int | None:
        """Bytes of its data without padding; None for an unknown type."""
        known = ggml_type_by_id(self.type_id)
        return known.row_bytes(self.shape[0]) * math.prod(self.shape[1:]) if known else None


@dataclasses.dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says before its data.

    Attributes:
        path: the file.
        metadata: key to value; arrays are lists.
        tensors: by name, in the file's order.
        end: of the header itself, before the padding up to ``data_offset``.
        data_offset: where tensor data starts.
        file_bytes: the file's size.
    """

    path: Path
    metadata: Mapping[str, Value]
    tensors: Mapping[str, GgufTensor]
    end: int
    data_offset: int
    file_bytes: int

    @property
    def architecture(self) -> str:
        """``general.architecture``.

        Raises:
            SourceError: the key is missing or no string.
        """
        return self.text("general.architecture")

    def text(self, key: str) -> str:
        """A string that must be there."""
        value = self.metadata.get(key)
        if not isinstance(value, str):
            raise SourceError(f"{self.path} has no {key}", "Convert the model again; this GGUF is incomplete")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        """An integer of the architecture's namespace (``{arch}.key``); a per-layer list gives its maximum.

        Raises:
            SourceError: it is missing and there is no default.
        """
        value = self.metadata.get(f"{self.architecture}.{key}")
        if isinstance(value, list) and value and all(isinstance(v, int) for v in value):
            return max(int(v) for v in value)
        if isinstance(value, int):
            return int(value)
        if default is None:
            raise SourceError(
                f"{self.path} has no {self.architecture}.{key}", "Convert the model again; this GGUF is incomplete"
            )
        return default

    def integers(self, key: str, count: int, default: int | None = None) -> list[int]:
        """An integer for each of ``count`` layers, whether the file holds one for all or a list."""
        value = self.metadata.get(f"{self.architecture}.{key}")
        if isinstance(value, list) and len(value) >= count and all(isinstance(v, int) for v in value):
            return [int(v) for v in value[:count]]
        return [self.integer(key, default)] * count


class _Cursor:
    """Reads forward and never past the end of the file."""

    def __init__(self, file: BinaryIO, path: Path, size: int) -> None:
        self._file, self._path, self._left = file, path, size
        self._size = size

    @property
    def position(self) -> int:
        return self._size - self._left

    def fail(self, what: str) -> SourceError:
        return SourceError(f"{self._path} is no valid GGUF file: {what}", "Copy or convert the file again")

    def need(self, n_bytes: int) -> None:
        if n_bytes > self._left:
            raise self.fail(f"it ends within its header (byte {self._size})")

    def take(self, n_bytes: int) -> bytes:
        self.need(n_bytes)
        self._left -= n_bytes
        return self._file.read(n_bytes)

    def number(self, layout: str, n_bytes: int) -> int | float | bool:
        value: int | float | bool = struct.unpack(layout, self.take(n_bytes))[0]
        return value

    def count(self) -> int:
        return int(self.number("<Q", 8))

    def u32(self) -> int:
        return int(self.number("<I", 4))

    def string(self) -> str:
        return self.take(self.count()).decode("utf-8", errors="surrogateescape")

    def array(self) -> list[Scalar]:
        kind, length = self.u32(), self.count()
        if kind == _STRING:
            self.need(8 * length)
            return [self.string() for _ in range(length)]
        if kind not in _SCALARS:
            raise self.fail(f"it holds an array of unknown type {kind}")
        layout, width = _SCALARS[kind]
        raw = self.take(width * length)
        return list(struct.unpack(f"<{length}{layout[1]}", raw))

    def value(self) -> Value:
        kind = self.u32()
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array()
        if kind not in _SCALARS:
            raise self.fail(f"it holds a value of unknown type {kind}")
        return self.number(*_SCALARS[kind])


def read_header(path: Path) -> GgufHeader:
    """Read and check a header.

    Raises:
        SourceError: no such file, no GGUF, a big-endian or future version, truncated, or tensors past its end.
    """
    try:
        with path.open("rb") as file:
            cursor = _Cursor(file, path, os.fstat(file.fileno()).st_size)
            return _read(cursor, path)
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}", "Check the path and its permissions") from error


def _read(cursor: _Cursor, path: Path) -> GgufHeader:
    if cursor.take(4) != b"GGUF":
        raise cursor.fail("it does not start with GGUF")
    version = cursor.u32()
    if version not in (2, 3):
        raise cursor.fail(f"its version is {version}; edgeq reads 2 and 3 (little endian)")
    n_tensors, n_keys = cursor.count(), cursor.count()
    cursor.need(12 * n_keys + 24 * n_tensors)
    metadata: dict[str, Value] = {}
    for _ in range(n_keys):
        key = cursor.string()
        metadata[key] = cursor.value()
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise cursor.fail(f"its alignment is {alignment!r}")
    entries = [_entry(cursor) for _ in range(n_tensors)]
    return _checked(cursor, path, metadata, entries, alignment)


def _entry(cursor: _Cursor) -> GgufTensor:
    name, n_dims = cursor.string(), cursor.u32()
    if not 1 <= n_dims <= _MAX_DIMS:
        raise cursor.fail(f"tensor {name!r} has {n_dims} dimensions")
    shape = tuple(cursor.count() for _ in range(n_dims))
    return GgufTensor(name, shape, cursor.u32(), cursor.count())


def _checked(
    cursor: _Cursor, path: Path, metadata: dict[str, Value], entries: list[GgufTensor], alignment: int
) -> GgufHeader:
    size = path.stat().st_size
    data_offset = -(-cursor.position // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for entry in entries:
        tensor = dataclasses.replace(entry, offset=data_offset + entry.offset)
        if entry.name in tensors:
            raise cursor.fail(f"tensor {entry.name!r} is there twice")
        end = tensor.offset + (tensor.nbytes or 0)
        if end > size:
            raise cursor.fail(f"tensor {entry.name!r} ends at byte {end}, the file at {size}: it is truncated")
        tensors[entry.name] = tensor
    return GgufHeader(path, metadata, tensors, cursor.position, data_offset, size)
