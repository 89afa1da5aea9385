"""The importance matrices that llama.cpp wrote before 2025 (``.dat``), which are still the ones that people share.

Little endian: int32 entries; for each an int32 length and the name, int32 chunks, int32 values and so many float32,
each a mean of squares times the chunks. Then, in all but the oldest, int32 chunks and the dataset's name.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from edgeq.errors import SourceError

__all__ = ["read_legacy"]

Floats = npt.NDArray[np.float32]

_LARGEST_NAME = 4096
_ENTRY_BYTES = 12


class _Reader:
    """Reads forward and never past the end of the file."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path = file, path
        self.left = os.fstat(file.fileno()).st_size

    def fail(self, what: str) -> SourceError:
        return SourceError(
            f"{self._path} is no importance matrix: {what}", "Give a file that llama-imatrix or edgeq wrote"
        )

    def take(self, n_bytes: int, what: str) -> bytes:
        if not 0 <= n_bytes <= self.left:
            raise self.fail(f"{what} would take {n_bytes} bytes where {self.left} are left")
        self.left -= n_bytes
        return self._file.read(n_bytes)

    def number(self, what: str) -> int:
        value: int = struct.unpack("<i", self.take(4, what))[0]
        return value

    def text(self, what: str) -> str:
        length = self.number(f"the length of {what}")
        if length > _LARGEST_NAME:
            raise self.fail(f"{what} has {length} bytes")
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} is no text") from error


def read_legacy(path: Path) -> tuple[dict[str, tuple[Floats, Floats]], int, tuple[str, ...]]:
    """Read a file of the old format.

    Returns:
        By name the sums, float32 of (1, n_values), and the count to divide them by, float32 of (1,); merged experts
        follow each other in one row. Then the number of chunks and the names of the datasets.

    Raises:
        SourceError: not of this format, or truncated.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        reader = _Reader(file, path)
        n_entries = reader.number("its head")
        if not 0 < n_entries <= reader.left // _ENTRY_BYTES:
            raise reader.fail("it neither starts with GGUF nor has a plausible number of entries")
        entries: dict[str, tuple[Floats, Floats]] = {}
        for index in range(n_entries):
            name = reader.text(f"the name of entry {index}")
            calls, n_values = reader.number("its chunks"), reader.number("its length")
            if n_values < 1 or name in entries:
                raise reader.fail(f"{name} has {n_values} values, or is there twice")
            values = np.frombuffer(reader.take(4 * n_values, f"{name} with {n_values} values"), "<f4")
            entries[name] = (values.astype(np.float32)[np.newaxis], np.array([max(calls, 1)], np.float32))
        if not reader.left:
            return entries, 0, ()
        chunks = reader.number("the number of chunks")
        dataset = reader.text("the dataset's name") if reader.left else ""
        return entries, max(chunks, 0), (dataset,) if dataset else ()
