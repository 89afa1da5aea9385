from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from edgeq.converters.gguf.export import export_gguf
from edgeq.converters.gguf.header import read_header
from edgeq.converters.gguf.presets import LADDER, PRESETS, find_preset, preset_of_type
from edgeq.converters.gguf.quantize import assert_types, preview, quantizable_tensors, quantize
from edgeq.errors import ConversionError, DiskFullError, UsageError
from edgeq.ggml_types import TYPES, tensor_bytes
from edgeq.llama_library import library


@pytest.fixture(scope="module")
def source(smollm2_hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_gguf(smollm2_hf, tmp_path_factory.mktemp("source") / "bf16.gguf").path


@pytest.fixture(scope="module")
def skeleton(smollm2_hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from edgeq.converters.gguf.export import export_skeleton

    return export_skeleton(smollm2_hf, tmp_path_factory.mktemp("skeleton") / "skeleton.gguf").path


def test_presets_have_llama_cpps_numbers() -> None:
    llama_cpp = pytest.importorskip("llama_cpp.llama_cpp")
    for preset in PRESETS.values():
        name = preset.name.upper()
        constants = [f"LLAMA_FTYPE_MOSTLY_{name}", f"LLAMA_FTYPE_ALL_{name}"]
        assert preset.ftype in [getattr(llama_cpp, c) for c in constants if hasattr(llama_cpp, c)]
    assert set(LADDER) <= PRESETS.keys()
    for name, kind in TYPES.items():
        named = preset_of_type(name)
        assert named is None or named.is_float == kind.is_float


def test_unknown_presets_name_the_nearest() -> None:
    assert find_preset("Q4_K_M").ftype == 15
    with pytest.raises(UsageError, match="q4_k_m"):
        find_preset("q4km")
    with pytest.raises(UsageError, match="importance matrix"):
        find_preset("iq2_xxs")


@pytest.mark.parametrize("name", LADDER)
def test_a_preview_of_the_skeleton_is_that_of_the_model(name: str, skeleton: Path, source: Path) -> None:
    assert preview(source, PRESETS[name]) == preview(skeleton, PRESETS[name])


@pytest.mark.parametrize("width", [256, 576])  # whole rows of K-quants, and SmolLM2's, in which they fall back
@pytest.mark.parametrize("name", LADDER)
def test_a_preview_is_what_llama_cpp_writes(
    name: str, width: int, tiny_hf: Callable[..., Path], tmp_path: Path
) -> None:
    _check_written(tiny_hf("llama-untied", width=width).with_suffix(".gguf"), name, tmp_path)


@pytest.mark.slow
def test_a_preview_of_the_real_model_is_what_llama_cpp_writes(source: Path, tmp_path: Path) -> None:
    _check_written(source, "q4_k_m", tmp_path)


def _check_written(source: Path, name: str, folder: Path) -> None:
    """The oracle is llama.cpp's own mixture: no overrides, only the file type."""
    out, plain = folder / "out.gguf", folder / "plain.gguf"
    quantize(source, out, preview(source, PRESETS[name]).types, threads=1)
    lib = library()
    params = lib.llama_model_quantize_default_params()
    params.ftype, params.nthread = PRESETS[name].ftype, 1
    assert lib.llama_model_quantize(str(source).encode(), str(plain).encode(), ctypes.byref(params)) == 0
    mine, theirs = gguf.GGUFReader(out), gguf.GGUFReader(plain)
    for a, b in zip(mine.tensors, theirs.tensors, strict=True):
        assert (a.name, a.tensor_type) == (b.name, b.tensor_type)
        assert np.array_equal(a.data, b.data)


def test_every_fallback_of_a_preset_is_named(skeleton: Path) -> None:
    found = preview(skeleton, PRESETS["q4_k_m"])
    assert len(found.fallbacks) == 180
    assert all(found.types[f.tensor] == f.got != f.wanted for f in found.fallbacks)
    assert {f.wanted for f in found.fallbacks} == {"q4_k", "q6_k"}
    assert "576" in found.fallbacks[0].reason


def test_norms_are_not_for_choosing(skeleton: Path) -> None:
    free = quantizable_tensors(skeleton)
    assert "token_embd.weight" in free
    assert not any("norm" in name for name in free)
    assert len(free) == 211


def test_any_mix_is_written_as_asked_floats_too(tiny_hf: Callable[..., Path], tmp_path: Path) -> None:
    source = export_gguf(tiny_hf("llama-untied"), tmp_path / "bf16.gguf", float_type="bf16").path
    kinds = ["q8_0", "f16", "q4_0", "bf16", "iq4_nl", "q5_1", "f32"]
    types = {name: tensor.type for name, tensor in read_header(source).tensors.items()}
    for index, name in enumerate(sorted(quantizable_tensors(source))):
        types[name] = kinds[index % len(kinds)]
    out = tmp_path / "mixed.gguf"
    quantize(source, out, types, threads=2)
    header = read_header(out)
    assert {name: tensor.type for name, tensor in header.tensors.items()} == types
    padded = sum(-(-tensor_bytes(types[n], t.shape) // 32) * 32 for n, t in header.tensors.items())
    assert header.file_bytes == header.data_offset + padded


def test_a_uniform_float_file_that_is_not_the_sources_type(source: Path, tmp_path: Path) -> None:
    types = {n: ("f16" if t.type == "bf16" else t.type) for n, t in read_header(source).tensors.items()}
    seen: list[tuple[int, int, str]] = []
    quantize(source, tmp_path / "f16.gguf", types, threads=2, progress=lambda *args: seen.append(args))
    assert read_header(tmp_path / "f16.gguf").metadata["general.file_type"] == 1
    assert seen
    assert all(0 < done <= total == 272 for done, total, _ in seen)


def test_a_file_that_differs_from_the_plan_names_the_tensor(source: Path) -> None:
    types = {name: tensor.type for name, tensor in read_header(source).tensors.items()}
    assert_types(source, types)
    with pytest.raises(ConversionError, match=r"output_norm\.weight as f32, the plan says q8_0"):
        assert_types(source, {**types, "output_norm.weight": "q8_0"})
    with pytest.raises(ConversionError, match="ghost as nothing"):
        assert_types(source, {**types, "ghost": "q8_0"})


def test_what_llama_cpp_refuses_is_one_line_and_nothing_stays(tmp_path: Path) -> None:
    source = tmp_path / "nan.gguf"
    writer = gguf.GGUFWriter(source, "llama")
    for add, value in (
        (writer.add_block_count, 1),
        (writer.add_context_length, 64),
        (writer.add_embedding_length, 64),
        (writer.add_feed_forward_length, 64),
        (writer.add_head_count, 1),
        (writer.add_vocab_size, 8),
    ):
        add(value)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("no_vocab")
    weights = np.ones((64, 64), np.float32)
    weights[3, 3] = np.nan
    writer.add_tensor("blk.0.ffn_down.weight", weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ConversionError, match="has invalid data"):
        quantize(source, tmp_path / "out.gguf", {"blk.0.ffn_down.weight": "q8_0"})
    assert not (tmp_path / "out.gguf").exists()


def test_a_full_disk_is_noticed_although_llama_cpp_does_not(source: Path, small_disk: Callable[[int], Path]) -> None:
    types, disk = preview(source, PRESETS["q8_0"]).types, small_disk(20)
    with pytest.raises(DiskFullError, match="No space left"):
        quantize(source, disk / "out.gguf", types)
    assert list(disk.iterdir()) == []
