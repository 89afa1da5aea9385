"""Importance matrices: their files against the gguf package and llama.cpp's own reader, and what quantizing does."""

from __future__ import annotations

import ctypes
import gc
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeq.converters.gguf.header import GgufHeader, read_header
from edgeq.converters.gguf.imatrix import Activations, ImportanceMatrix, check_matches, read_imatrix, write_imatrix
from edgeq.converters.gguf.presets import PRESETS, find_preset
from edgeq.converters.gguf.quantize import _imatrix_array, preview, quantizable_tensors, quantize
from edgeq.converters.gguf.recipe import Override, apply_overrides
from edgeq.errors import ConversionError, DiskFullError, SourceError, UsageError
from edgeq.ggml_types import ggml_type
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


def test_the_old_format(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.dat"
    path.write_bytes(LEGACY)
    found = read_imatrix(path)
    assert (found.chunk_count, found.chunk_tokens, found.datasets) == (4, 0, ("wiki.txt",))
    assert found.weights("blk.0.ffn_up.weight") == pytest.approx([2.0, 0.5, 1.0])
    assert found.weights("output.weight") == pytest.approx([0.5, 0.25])
    assert found.sha256 == PLAIN.sha256
    path.write_bytes(LEGACY[: -4 - 4 - 8])  # the oldest files end after the entries
    assert read_imatrix(path).sha256 == PLAIN.sha256
    assert read_imatrix(path).datasets == ()


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
    tails = {len(LEGACY) - 16}  # a file without the tail is whole
    for cut in range(len(LEGACY)):
        path.write_bytes(LEGACY[:cut])
        if cut not in tails and cut != len(LEGACY) - 12:
            with pytest.raises(SourceError):
                read_imatrix(path)


@settings(max_examples=300, suppress_health_check=ANY_FOLDER)
@given(
    start=st.sampled_from(["gguf", "dat"]),
    edits=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=6),
)
def test_a_damaged_file_is_read_or_refused(start: str, edits: list[tuple[int, int]], tmp_path: Path) -> None:
    path = tmp_path / "damaged"
    data = bytearray(_written(PLAIN, path) if start == "gguf" else LEGACY)
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


# Matching


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float Llama of two layers whose rows allow K-quants."""
    path = tmp_path_factory.mktemp("model") / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(256)
    writer.add_feed_forward_length(512)
    writer.add_head_count(4)
    writer.add_vocab_size(64)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("no_vocab")
    rng = np.random.default_rng(0)
    writer.add_tensor("token_embd.weight", rng.standard_normal((64, 256)).astype(np.float16))
    writer.add_tensor("output_norm.weight", np.ones(256, np.float32))
    for i in range(2):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{name}.weight", np.ones(256, np.float32))
        for name, shape in (
            *((f"attn_{x}", (256, 256)) for x in ("q", "k", "v", "output")),
            ("ffn_gate", (512, 256)),
            ("ffn_up", (512, 256)),
            ("ffn_down", (256, 512)),
        ):
            writer.add_tensor(f"blk.{i}.{name}.weight", rng.standard_normal(shape).astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _for(header: GgufHeader, names: list[str], seed: int = 1) -> ImportanceMatrix:
    rng = np.random.default_rng(seed)
    return ImportanceMatrix(
        {
            name: Activations(
                rng.uniform(0.01, 4, (1, header.tensors[name].shape[0])).astype(np.float32) ** 2, np.array([100])
            )
            for name in names
        },
        1,
        100,
    )


def test_a_matrix_of_this_model_matches(model: Path) -> None:
    header, needed = read_header(model), sorted(quantizable_tensors(model))
    assert check_matches(_for(header, needed), header, needed) == []


def test_another_models_matrix_is_refused_with_figures(model: Path) -> None:
    header, needed = read_header(model), sorted(quantizable_tensors(model))
    whole = _for(header, needed)
    n = len(needed)
    name = "blk.0.ffn_down.weight"
    narrow = {**whole.entries, name: Activations(np.ones((1, 300), np.float32), np.ones(1, np.int64))}
    with pytest.raises(UsageError, match=rf"{n} of its {n} names .* {name} has 300 columns there and 512 .*1 lengths"):
        check_matches(ImportanceMatrix(narrow, 1, 1), header, needed)
    deeper = {**whole.entries, "blk.2.ffn_up.weight": whole.entries["blk.1.ffn_up.weight"]}
    with pytest.raises(UsageError, match=rf"{n} of its {n + 1} names .* blk\.2\.ffn_up\.weight"):
        check_matches(ImportanceMatrix(deeper, 1, 1), header, needed)
    shallower = {k: v for k, v in whole.entries.items() if not k.startswith("blk.1.")}
    with pytest.raises(UsageError, match="1 of 2 layers, layer 1"):
        check_matches(ImportanceMatrix(shallower, 1, 1), header, needed)
    with pytest.raises(UsageError, match="0 of its 2 names"):
        check_matches(_matrix({"a": ([[1.0]], [1]), "b": ([[1.0]], [1])}), header, needed)


def test_what_is_missing_is_told(model: Path) -> None:
    header, needed = read_header(model), sorted(quantizable_tensors(model))
    entries = dict(_for(header, needed).entries)
    del entries["token_embd.weight"]  # llama-imatrix never has it
    sums = entries["blk.1.ffn_up.weight"].sums.copy()
    sums[0, 10:14] = 0
    entries["blk.1.ffn_up.weight"] = Activations(sums, np.array([100]))
    entries["blk.0.ffn_up.weight"] = Activations(np.zeros((1, 256), np.float32), np.array([0]))
    warnings = check_matches(ImportanceMatrix(entries, 1, 1), header, needed)
    assert [w for w in warnings if "no entry for 1 of 15" in w and "token_embd.weight" in w]
    assert [w for w in warnings if "4 of the 256 columns of blk.1.ffn_up.weight" in w]
    assert [w for w in warnings if "1 of the 1 matrices in blk.0.ffn_up.weight" in w]
    assert len(warnings) == 3


# Quantizing


def _quantized(rows: npt.NDArray[np.float32], kind: str, weights: npt.NDArray[np.float32] | None) -> bytes:
    lib = library()._lib
    n_rows, n_columns = rows.shape
    size = n_rows * ggml_type(kind).row_bytes(n_columns)
    out = ctypes.create_string_buffer(size)
    pointer = ctypes.c_void_p
    lib.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, *[ctypes.c_int64] * 3, pointer]
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    data = None if weights is None else weights.ctypes.data
    assert lib.ggml_quantize_chunk(ggml_type(kind).id, rows.ctypes.data, out, 0, n_rows, n_columns, data) == size
    return out.raw


@pytest.mark.parametrize("kind", ["q4_0", "q4_k", "iq2_xxs"])
def test_llama_cpp_quantizes_with_the_weights_of_each_tensor(kind: str, model: Path, tmp_path: Path) -> None:
    header, free = read_header(model), sorted(quantizable_tensors(model))
    matrix = _for(header, free)
    types = {name: kind if name in free else tensor.type for name, tensor in header.tensors.items()}
    quantize(model, tmp_path / "out.gguf", types, imatrix=matrix, threads=1)
    floats = {t.name: np.array(t.data, np.float32) for t in gguf.GGUFReader(model).tensors}
    differs = 0
    for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors:
        if tensor.name in free:
            weights = matrix.weights(tensor.name)
            assert tensor.data.tobytes() == _quantized(floats[tensor.name], kind, weights)
            flat = np.ones_like(weights)
            differs += tensor.data.tobytes() != _quantized(floats[tensor.name], kind, flat)
    assert differs == len(free)


def test_a_preset_that_needs_a_matrix_works_with_one(model: Path, tmp_path: Path) -> None:
    header, free = read_header(model), sorted(quantizable_tensors(model))
    matrix = _for(header, free)
    with pytest.raises(UsageError, match=r"importance matrix.*--imatrix FILE.*--search always"):
        find_preset("iq2_xxs")
    preset = find_preset("IQ2_XXS", imatrix=True)
    types = preview(model, preset, imatrix=matrix).types
    quantize(model, tmp_path / "out.gguf", types, imatrix=matrix, threads=1)
    assert read_header(tmp_path / "out.gguf").tensors["blk.0.ffn_up.weight"].type == "iq2_xxs"


def test_a_matrix_changes_what_some_presets_are(model: Path) -> None:
    matrix = _for(read_header(model), sorted(quantizable_tensors(model)))
    without = preview(model, PRESETS["iq3_xxs"]).types
    with_one = preview(model, PRESETS["iq3_xxs"], imatrix=matrix).types
    # llama.cpp trusts the preset's own type with the values' matrix only where there is one.
    assert without["blk.1.attn_v.weight"] != with_one["blk.1.attn_v.weight"]


def test_what_would_end_the_process_is_refused_first(model: Path, tmp_path: Path) -> None:
    header, free = read_header(model), sorted(quantizable_tensors(model))
    types = {name: tensor.type for name, tensor in header.tensors.items()} | {"token_embd.weight": "iq2_xxs"}
    partial = _for(header, [name for name in free if name != "token_embd.weight"])
    for matrix in (None, partial):
        with pytest.raises(UsageError, match=r"token_embd\.weight cannot become iq2_xxs .*--imatrix"):
            quantize(model, tmp_path / "out.gguf", types, imatrix=matrix)
    wrong = _matrix({"token_embd.weight": ([[1.0, 2.0]], [1])})
    with pytest.raises(UsageError, match="another model"):
        quantize(model, tmp_path / "out.gguf", types, imatrix=wrong)
    assert not list(tmp_path.iterdir())


def test_the_values_live_as_long_as_the_parameters(model: Path) -> None:
    params = library().llama_model_quantize_default_params()
    params.imatrix = _imatrix_array(library(), PLAIN)
    for _ in range(3):
        gc.collect()
        np.ones(1000)
    found = {}
    for index in range(3):
        entry = params.imatrix[index]
        if entry.name is not None:
            found[entry.name.decode()] = entry.data[: entry.size]
    assert found == {"blk.0.ffn_up.weight": [2.0, 0.5, 1.0], "output.weight": [0.5, 0.25]}
    assert params.imatrix[2].name is None


def test_an_override_may_ask_for_a_type_that_needs_a_matrix_where_there_is_one() -> None:
    base, shapes = {"a": "q8_0"}, {"a": (256, 4)}
    with pytest.raises(UsageError, match=r"--imatrix FILE.*--search always"):
        apply_overrides(base, [Override("a", "iq2_s")], ["a"], shapes)
    assert apply_overrides(base, [Override("a", "iq2_s")], ["a"], shapes, imatrix=True) == {"a": "iq2_s"}
