"""Importance matrices: their figures, and their files against the gguf package and llama.cpp's own reader."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeq.converters.gguf.imatrix import Activations, ImportanceMatrix, read_imatrix, write_imatrix
from edgeq.errors import ConversionError, DiskFullError, SourceError
from edgeq.llama_library import library

ANY_FOLDER = [HealthCheck.function_scoped_fixture]


def _matrix(entries: dict[str, tuple[list[list[float]], list[int]]], **changes: object) -> ImportanceMatrix:
    made = {
        name: Activations(np.array(sums, np.float32), np.array(counts, np.int64))
        for name, (sums, counts) in entries.items()
    }
    values: dict[str, object] = {"chunk_count": 3, "chunk_tokens": 64, "datasets": ("text", "weiß"), **changes}
    return ImportanceMatrix(made, **values)  # type: ignore[arg-type]


PLAIN = _matrix({"blk.0.ffn_up.weight": ([[8.0, 2.0, 4.0]], [4]), "output.weight": ([[1.0, 0.5]], [2])})
MERGED = _matrix({"blk.0.ffn_up_exps.weight": ([[8.0, 4.0], [0.0, 0.0], [3.0, 0.0]], [4, 0, 3])})


def _same(a: ImportanceMatrix, b: ImportanceMatrix) -> bool:
    return (
        (a.chunk_count, a.chunk_tokens, a.datasets, set(a.entries))
        == (b.chunk_count, b.chunk_tokens, b.datasets, set(b.entries))
        and all(np.array_equal(a.entries[n].sums, b.entries[n].sums) for n in a.entries)
        and all(np.array_equal(a.entries[n].counts, b.entries[n].counts) for n in a.entries)
    )


# Weights


def test_weights_are_means() -> None:
    assert PLAIN.weights("output.weight") == pytest.approx([0.5, 0.25])
    assert PLAIN.weights("blk.0.ffn_up.weight") == pytest.approx([2.0, 0.5, 1.0])
    assert PLAIN.weights("blk.1.ffn_up.weight") is None
    assert PLAIN.matrix_weights("blk.1.ffn_up.weight") is None


def test_experts_have_their_own_weights_and_those_of_all_tokens_together() -> None:
    name = "blk.0.ffn_up_exps.weight"
    own = MERGED.matrix_weights(name)
    assert own is not None
    # The expert that was never used has ones; the column that was never used has the least of its matrix.
    assert own.tolist() == [[2.0, 1.0], [1.0, 1.0], [1.0, 1.0]]
    assert MERGED.weights(name) == pytest.approx([11 / 7, 4 / 7])


@given(
    sums=st.lists(st.one_of(st.just(0.0), st.floats(2.0**-60, 2.0**60, width=32)), min_size=1, max_size=20),
    count=st.integers(0, 10**6),
)
def test_weights_are_always_positive_and_keep_the_order_of_the_sums(sums: list[float], count: int) -> None:
    weights = _matrix({"a": ([sums], [count])}).weights("a")
    assert weights is not None
    assert weights.dtype == np.float32
    assert (weights > 0).all()
    assert np.isfinite(weights).all()
    order = np.argsort(sums, kind="stable")
    assert count == 0 or (np.diff(weights[order]) >= 0).all()


def test_the_hash_is_of_the_content(tmp_path: Path) -> None:
    write_imatrix(PLAIN, tmp_path / "a.gguf")
    renamed = ImportanceMatrix(dict(reversed(list(PLAIN.entries.items()))), 3, 64, ("another name",))
    assert read_imatrix(tmp_path / "a.gguf").sha256 == PLAIN.sha256 == renamed.sha256
    others = [
        _matrix({"blk.0.ffn_up.weight": ([[8.0, 2.0, 4.0]], [4]), "output.weight": ([[1.0, 0.5]], [3])}),
        _matrix({"blk.0.ffn_up.weight": ([[8.0, 2.0, 4.0]], [4]), "output.weight": ([[1.0, 0.25]], [2])}),
        _matrix({"blk.0.ffn_up.weight": ([[8.0, 2.0, 4.0]], [4])}),
        MERGED,
    ]
    assert len({m.sha256 for m in [PLAIN, *others]}) == 5


def test_arrays_that_do_not_fit_are_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="counts of"):
        Activations(np.ones((2, 3), np.float32), np.ones(3, np.int64))
    with pytest.raises(ValueError, match="read-only"):
        PLAIN.entries["output.weight"].sums[0, 0] = 1


# Files


@pytest.mark.parametrize("matrix", [PLAIN, MERGED])
def test_the_file_is_what_the_gguf_package_and_llama_cpp_read(matrix: ImportanceMatrix, tmp_path: Path) -> None:
    path = tmp_path / "imatrix.gguf"
    write_imatrix(matrix, path)
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.datasets"].contents() == ["text", "weiß"]
    assert reader.fields["imatrix.chunk_count"].contents() == 3
    assert reader.fields["imatrix.chunk_size"].contents() == 64
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == 2 * len(matrix.entries)
    for name, entry in matrix.entries.items():
        assert np.array_equal(tensors[f"{name}.in_sum2"].data, entry.sums)
        assert np.array_equal(tensors[f"{name}.counts"].data[:, 0], entry.counts)
    assert _native_read(path) == ({f"{n}.{s}" for n in matrix.entries for s in ("in_sum2", "counts")}, 3, 64, 2)
    assert _same(read_imatrix(path), matrix)


def _native_read(path: Path) -> tuple[set[str], int, int, int]:
    """Tensor names, chunks, their size and number of datasets, by the C functions that llama-quantize reads with."""

    class Params(ctypes.Structure):
        _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))

    lib = library()._lib
    pointer, number, text = ctypes.c_void_p, ctypes.c_int64, ctypes.c_char_p
    for name, result, arguments in (
        ("gguf_init_from_file", pointer, [text, Params]),
        ("gguf_free", None, [pointer]),
        ("gguf_get_n_tensors", number, [pointer]),
        ("gguf_get_tensor_name", text, [pointer, number]),
        ("gguf_find_key", number, [pointer, text]),
        ("gguf_get_val_u32", ctypes.c_uint32, [pointer, number]),
        ("gguf_get_arr_n", ctypes.c_size_t, [pointer, number]),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    file = lib.gguf_init_from_file(str(path).encode(), Params(True, None))
    assert file
    keys = [lib.gguf_find_key(file, f"imatrix.{key}".encode()) for key in ("chunk_count", "chunk_size", "datasets")]
    assert min(keys) >= 0
    names = {lib.gguf_get_tensor_name(file, i).decode() for i in range(lib.gguf_get_n_tensors(file))}
    found = (
        names,
        lib.gguf_get_val_u32(file, keys[0]),
        lib.gguf_get_val_u32(file, keys[1]),
        lib.gguf_get_arr_n(file, keys[2]),
    )
    lib.gguf_free(file)
    return found


def test_no_dataset_has_a_name_and_the_bytes_are_always_the_same(tmp_path: Path) -> None:
    nameless = ImportanceMatrix(PLAIN.entries, 3, 64)
    reordered = ImportanceMatrix(dict(reversed(list(PLAIN.entries.items()))), 3, 64)
    write_imatrix(nameless, tmp_path / "a.gguf")
    write_imatrix(reordered, tmp_path / "b.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert read_imatrix(tmp_path / "a.gguf").datasets == ()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.gguf", "b.gguf"]


_ENTRY = st.tuples(st.integers(1, 4), st.integers(1, 9))


@settings(max_examples=30, suppress_health_check=ANY_FOLDER)
@given(
    shapes=st.dictionaries(st.text("abc.0_", min_size=1, max_size=20), _ENTRY, min_size=1, max_size=5),
    seed=st.integers(0, 2**32 - 1),
)
def test_reads_what_the_gguf_package_writes_and_writes_the_same(
    shapes: dict[str, tuple[int, int]], seed: int, tmp_path: Path
) -> None:
    rng = np.random.default_rng(seed)
    path = tmp_path / "theirs.gguf"
    writer = gguf.GGUFWriter(path, "ignored")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["calibration.txt"])
    writer.add_uint32("imatrix.chunk_count", 7)
    writer.add_uint32("imatrix.chunk_size", 512)
    sums = {name: rng.random(shape, np.float32) for name, shape in shapes.items()}
    counts = {name: rng.integers(0, 10**6, shape[0]) for name, shape in shapes.items()}
    for name in shapes:
        writer.add_tensor(f"{name}.in_sum2", sums[name])
        writer.add_tensor(f"{name}.counts", counts[name].astype(np.float32)[:, np.newaxis])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = read_imatrix(path)
    assert (found.chunk_count, found.chunk_tokens, found.datasets) == (7, 512, ("calibration.txt",))
    for name in shapes:
        assert np.array_equal(found.entries[name].sums, sums[name])
        assert np.array_equal(found.entries[name].counts, counts[name])
    write_imatrix(found, tmp_path / "ours.gguf")
    assert _same(read_imatrix(tmp_path / "ours.gguf"), found)


def _written(matrix: ImportanceMatrix, path: Path) -> bytes:
    write_imatrix(matrix, path)
    return path.read_bytes()


def test_a_truncated_file_is_one_line_wherever_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "file"
    whole = _written(PLAIN, path)
    padding = 32 - 4 * 2  # after the last tensor's one value, beside what the head may lose: nothing is missing yet
    for cut in range(len(whole) - padding - 8):
        path.write_bytes(whole[:cut])
        with pytest.raises(SourceError):
            read_imatrix(path)


@settings(max_examples=150, suppress_health_check=ANY_FOLDER)
@given(edits=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=6))
def test_a_damaged_file_is_read_or_refused(edits: list[tuple[int, int]], tmp_path: Path) -> None:
    path = tmp_path / "damaged"
    data = bytearray(_written(PLAIN, path))
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


def _gguf_bytes(tmp_path: Path, change: Callable[[bytes], bytes]) -> Path:
    path = tmp_path / "changed.gguf"
    path.write_bytes(change(_written(PLAIN, path)))
    return path


def test_wrong_files_say_what_is_wrong(tmp_path: Path, smollm2_gguf: Path) -> None:
    with pytest.raises(SourceError, match=r"no importance matrix \(its general\.type is 'model'\)"):
        read_imatrix(smollm2_gguf)
    with pytest.raises(SourceError, match="cannot be read"):
        read_imatrix(tmp_path / "missing")
    with pytest.raises(SourceError, match="cannot be read"):
        read_imatrix(tmp_path)
    eight = struct.pack("<f", 8.0)
    with pytest.raises(SourceError, match="NaN"):
        read_imatrix(_gguf_bytes(tmp_path, lambda data: data.replace(eight, struct.pack("<f", float("nan")))))
    with pytest.raises(SourceError, match="no sum of squares"):
        read_imatrix(_gguf_bytes(tmp_path, lambda data: data.replace(eight, struct.pack("<f", -1.0))))
    with pytest.raises(SourceError, match="2 sums and 1 counts"):
        read_imatrix(_gguf_bytes(tmp_path, lambda data: data.replace(b"output.weight.counts", b"output.weight.c0unts")))
    with pytest.raises(SourceError, match=r"output\.weight\.counts is missing"):
        read_imatrix(_gguf_bytes(tmp_path, lambda data: data.replace(b"output.weight.counts", b"0utput.weight.counts")))
    with pytest.raises(SourceError, match="datasets"):
        read_imatrix(_gguf_bytes(tmp_path, lambda data: data.replace(b"imatrix.datasets", b"imatrix.d4tasets")))
    with pytest.raises(SourceError, match="chunk_count is None"):
        read_imatrix(_gguf_bytes(tmp_path, lambda data: data.replace(b"imatrix.chunk_count", b"imatrix.chunk_c0unt")))


def test_tensors_that_share_their_bytes_cannot_fill_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "overlap.gguf"
    n_values = 1 << 14
    head = b"GGUF" + struct.pack("<IQQ", 3, 200, 2)

    def string(text: bytes) -> bytes:
        return struct.pack("<Q", len(text)) + text

    head += string(b"general.type") + struct.pack("<I", 8) + string(b"imatrix")
    head += string(b"imatrix.datasets") + struct.pack("<IIQ", 9, 8, 0)
    for index in range(100):
        for suffix in (b".in_sum2", b".counts"):
            head += string(b"t%d" % index + suffix) + struct.pack("<IQIQ", 1, n_values, 0, 0)
    path.write_bytes(head + bytes(-len(head) % 32) + bytes(4 * n_values))
    with pytest.raises(SourceError, match="overlap"):
        read_imatrix(path)


def test_writing_fails_in_one_line_and_leaves_nothing(tmp_path: Path, small_disk: Callable[[int], Path]) -> None:
    with pytest.raises(ConversionError, match="63 bytes"):
        write_imatrix(_matrix({"x" * 60: ([[1.0]], [1])}), tmp_path / "long.gguf")
    with pytest.raises(ConversionError, match="No such file"):
        write_imatrix(PLAIN, tmp_path / "no" / "folder.gguf")
    assert not list(tmp_path.iterdir())
    disk = small_disk(1)
    big = ImportanceMatrix({"a": Activations(np.ones((1, 1 << 20), np.float32), np.ones(1, np.int64))}, 1, 1)
    with pytest.raises(DiskFullError):
        write_imatrix(big, disk / "big.gguf")
    assert not list(disk.iterdir())
