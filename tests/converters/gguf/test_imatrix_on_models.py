"""Importance matrices and a model: whether they belong together, and what quantizing with one does."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from edgeq.converters.gguf.header import GgufHeader, read_header
from edgeq.converters.gguf.imatrix import Activations, ImportanceMatrix, check_matches
from edgeq.converters.gguf.presets import PRESETS, find_preset
from edgeq.converters.gguf.quantize import _imatrix_array, preview, quantizable_tensors, quantize
from edgeq.converters.gguf.recipe import Override, apply_overrides
from edgeq.errors import UsageError
from edgeq.ggml_types import ggml_type
from edgeq.llama_library import library


def _matrix(entries: dict[str, tuple[list[list[float]], list[int]]]) -> ImportanceMatrix:
    made = {
        name: Activations(np.array(sums, np.float32), np.array(counts, np.int64))
        for name, (sums, counts) in entries.items()
    }
    return ImportanceMatrix(made, 1, 1)


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
    matrix = _matrix({"blk.0.ffn_up.weight": ([[8.0, 2.0, 4.0]], [4]), "output.weight": ([[1.0, 0.5]], [2])})
    params.imatrix = _imatrix_array(library(), matrix)
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
