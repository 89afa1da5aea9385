from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeq.converters.gguf.header import read_header
from edgeq.errors import SourceError

_SCALARS = st.one_of(
    st.booleans(),
    st.integers(-(2**31), 2**31 - 1),
    st.text(min_size=1, max_size=20),
    st.lists(st.text(max_size=5), min_size=1, max_size=4),
)
_SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=3)


def _write(path: Path, metadata: dict[str, object], shapes: list[list[int]]) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        name = f"test.{key}"
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_int32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        else:
            assert isinstance(value, list)
            writer.add_array(name, value)
    for index, shape in enumerate(shapes):
        writer.add_tensor(f"tensor.{index}", np.zeros(shape, np.float32 if index % 2 else np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    metadata=st.dictionaries(st.text("abcdef", min_size=1, max_size=6), _SCALARS, max_size=5),
    shapes=st.lists(_SHAPES, min_size=1, max_size=5),
)
def test_reads_what_gguf_py_writes(tmp_path: Path, metadata: dict[str, object], shapes: list[list[int]]) -> None:
    path = tmp_path / "model.gguf"
    _write(path, metadata, shapes)
    header, oracle = read_header(path), gguf.GGUFReader(path)
    for key, value in metadata.items():
        assert header.metadata[f"test.{key}"] == value
    for tensor in oracle.tensors:
        mine = header.tensors[tensor.name]
        assert mine.shape == tuple(int(n) for n in tensor.shape)
        assert mine.type_id == tensor.tensor_type
        assert mine.offset == tensor.data_offset
        assert mine.nbytes == tensor.n_bytes


def test_the_real_model_agrees_with_gguf_py(smollm2_gguf: Path) -> None:
    header, oracle = read_header(smollm2_gguf), gguf.GGUFReader(smollm2_gguf)
    assert list(header.tensors) == [tensor.name for tensor in oracle.tensors]
    assert all(header.tensors[t.name].offset == t.data_offset for t in oracle.tensors)
    assert header.metadata["tokenizer.ggml.tokens"] == oracle.fields["tokenizer.ggml.tokens"].contents()
    assert header.integer("block_count") == 30
    assert header.integers("attention.head_count_kv", 30) == [3] * 30


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_are_one_line_and_never_a_crash(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "model.gguf"
    if not path.exists():
        _write(path, {"a": 1, "b": "text", "c": ["x", "y"]}, [[4, 4], [3]])
        (tmp_path / "good").write_bytes(path.read_bytes())
    good = bytearray((tmp_path / "good").read_bytes())
    if data.draw(st.booleans(), "truncate"):
        damaged = bytes(good[: data.draw(st.integers(0, len(good) - 1))])
    else:
        position = data.draw(st.integers(0, min(len(good) - 8, 400)))
        good[position : position + 8] = data.draw(st.binary(min_size=8, max_size=8))
        damaged = bytes(good)
    path.write_bytes(damaged)
    try:
        header = read_header(path)
    except SourceError as error:
        assert "\n" not in str(error)
    else:
        assert all(t.offset + (t.nbytes or 0) <= len(damaged) for t in header.tensors.values())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "ends within"),
        (b"PK\x03\x04" + bytes(100), "does not start with GGUF"),
        (b"GGUF" + struct.pack("<IQQ", 99, 0, 0), "version is 99"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version is"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), "ends within"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "ends within"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 4, 2**62), "ends within"),
    ],
)
def test_hostile_counts_are_refused_before_anything_is_allocated(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "bad.gguf").write_bytes(data)
    with pytest.raises(SourceError, match=message):
        read_header(tmp_path / "bad.gguf")


def test_a_truncated_model_names_the_tensor(tmp_path: Path, smollm2_gguf: Path) -> None:
    short = tmp_path / "short.gguf"
    with smollm2_gguf.open("rb") as whole:
        short.write_bytes(whole.read(40_000_000))
    with pytest.raises(SourceError, match=r"blk\..*truncated"):
        read_header(short)
    with pytest.raises(SourceError, match="cannot be read"):
        read_header(tmp_path / "missing.gguf")
