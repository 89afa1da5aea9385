"""Importance matrices in llama.cpp's old format, which says nothing but sums: what is read, and what is refused."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeq.converters.gguf.imatrix import Activations, ImportanceMatrix, read_imatrix
from edgeq.errors import SourceError

ANY_FOLDER = [HealthCheck.function_scoped_fixture]


def _legacy(entries: dict[bytes, tuple[int, list[float]]], tail: bytes = b"") -> bytes:
    data = struct.pack("<i", len(entries))
    for name, (calls, values) in entries.items():
        data += struct.pack("<i", len(name)) + name + struct.pack("<ii", calls, len(values))
        data += np.array(values, "<f4").tobytes()
    return data + tail


LEGACY = _legacy(
    {b"blk.0.ffn_up.weight": (4, [8.0, 2.0, 4.0]), b"output.weight": (2, [1.0, 0.5])},
    struct.pack("<ii", 4, 8) + b"wiki.txt",
)
# What it is in the format of today, but for the names of the texts.
SAME = ImportanceMatrix(
    {
        "blk.0.ffn_up.weight": Activations(np.array([[8.0, 2.0, 4.0]], np.float32), np.array([4])),
        "output.weight": Activations(np.array([[1.0, 0.5]], np.float32), np.array([2])),
    },
    4,
    0,
)


def test_the_old_format(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.dat"
    path.write_bytes(LEGACY)
    found = read_imatrix(path)
    assert (found.chunk_count, found.chunk_tokens, found.datasets) == (4, 0, ("wiki.txt",))
    assert found.weights("blk.0.ffn_up.weight") == pytest.approx([2.0, 0.5, 1.0])
    assert found.weights("output.weight") == pytest.approx([0.5, 0.25])
    assert found.sha256 == SAME.sha256
    path.write_bytes(LEGACY[: -4 - 4 - 8])  # the oldest files end after the entries
    assert read_imatrix(path).sha256 == SAME.sha256
    assert read_imatrix(path).datasets == ()


def test_a_truncated_file_is_one_line_wherever_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "file"
    tails = {len(LEGACY) - 16, len(LEGACY) - 12}  # a file without the tail is whole
    for cut in set(range(len(LEGACY))) - tails:
        path.write_bytes(LEGACY[:cut])
        with pytest.raises(SourceError):
            read_imatrix(path)


@settings(max_examples=150, suppress_health_check=ANY_FOLDER)
@given(edits=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=6))
def test_a_damaged_file_is_read_or_refused(edits: list[tuple[int, int]], tmp_path: Path) -> None:
    path = tmp_path / "damaged"
    data = bytearray(LEGACY)
    for position, value in edits:
        data[position % len(data)] = value
    path.write_bytes(data)
    try:
        found = read_imatrix(path)
    except SourceError:
        return
    for name, entry in found.entries.items():
        weights = found.weights(name)
        assert weights is not None
        assert (entry.sums >= 0).all()


@settings(max_examples=100, suppress_health_check=ANY_FOLDER)
@given(data=st.binary(max_size=200))
def test_any_bytes_are_refused_in_one_line(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "noise"
    path.write_bytes(b"\x01\x00\x00\x00" + data)
    try:
        read_imatrix(path)
    except SourceError as error:
        assert "\n" not in str(error)
