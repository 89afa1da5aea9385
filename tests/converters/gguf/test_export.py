"""What the exporter writes, and what it refuses: small Llama checkpoints made by hand."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from edgeq.converters.gguf import weights
from edgeq.converters.gguf.export import export_gguf, export_skeleton, supported_architectures
from edgeq.converters.gguf.layout import FloatType
from edgeq.converters.gguf.presets import find_preset
from edgeq.converters.gguf.quantize import preview
from edgeq.errors import ConversionError, DiskFullError, SourceError, UnsupportedModelError

gguf = pytest.importorskip("gguf")
tokenizers = pytest.importorskip("tokenizers")
torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")

VOCAB = 300
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}
Q0 = "model.layers.0.self_attn.q_proj.weight"
UP0 = "model.layers.0.mlp.up_proj.weight"
Tensors = dict[str, Any]


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory: pytest.TempPathFactory) -> str:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=280, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the robot moves its arm"] * 20, trainer)
    text: str = tokenizer.to_str()
    return text


@pytest.fixture
def folder(tmp_path: Path, tokenizer_json: str) -> Path:
    """A model folder without weights."""
    path = tmp_path / "tiny-llama"
    path.mkdir()
    (path / "tokenizer.json").write_text(tokenizer_json)
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    _config(path)
    return path


def _config(folder: Path, **changes: object) -> None:
    values = {key: value for key, value in {**CONFIG, **changes}.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(values))


def _tensors(dtype: str = "bfloat16") -> Tensors:
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int) -> Any:
        return torch.randn(shape, generator=generator).to(getattr(torch, dtype))

    tensors = {"model.embed_tokens.weight": make(VOCAB, 32), "model.norm.weight": make(32)}
    for i in range(2):
        prefix = f"model.layers.{i}"
        tensors[f"{prefix}.input_layernorm.weight"] = make(32)
        tensors[f"{prefix}.post_attention_layernorm.weight"] = make(32)
        for name, rows in (("q", 32), ("k", 16), ("v", 16), ("o", 32)):
            tensors[f"{prefix}.self_attn.{name}_proj.weight"] = make(rows, 32)
        tensors[f"{prefix}.mlp.gate_proj.weight"] = make(48, 32)
        tensors[f"{prefix}.mlp.up_proj.weight"] = make(48, 32)
        tensors[f"{prefix}.mlp.down_proj.weight"] = make(32, 48)
    return tensors


def _save(folder: Path, tensors: Tensors) -> None:
    safetensors_torch.save_file(tensors, folder / "model.safetensors")


def _read(path: Path) -> dict[str, tuple[str, npt.NDArray[Any]]]:
    """GGUF name to type and data, by the gguf package."""
    reader = gguf.GGUFReader(path)
    return {tensor.name: (tensor.tensor_type.name.lower(), np.array(tensor.data)) for tensor in reader.tensors}


def _leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.parent.iterdir() if path != folder)


def test_supported_architectures() -> None:
    assert {
        "Gemma3ForCausalLM",
        "Gemma3ForConditionalGeneration",
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "Phi3ForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
    } <= set(supported_architectures())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("float_type", ["source", "f16", "bf16", "f32"])
def test_every_weight_is_what_torch_makes_of_it(folder: Path, dtype: str, float_type: FloatType) -> None:
    tensors = _tensors(dtype)
    _save(folder, tensors)
    out = folder.parent / "out.gguf"
    result = export_gguf(folder, out, float_type=float_type)
    source = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}[dtype]
    kind = source if float_type == "source" else float_type
    torch_kind = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}[kind]
    read = _read(out)
    assert set(read) == set(result.tensors)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, tensor in tensors.items():
        target = names.get_name(name, try_suffixes=(".weight",))
        found_type, data = read[target]
        assert found_type == ("f32" if tensor.ndim == 1 else kind)
        assert result.tensors[target] == (found_type, tuple(reversed(tensor.shape)))
        expected = tensor.float() if tensor.ndim == 1 else tensor.to(torch_kind)
        if "q_proj" in name or "k_proj" in name:
            # Rows of a head of 8: 0 4 1 5 2 6 3 7.
            order = np.array([0, 4, 1, 5, 2, 6, 3, 7])
            rows = np.concatenate([order + 8 * head for head in range(tensor.shape[0] // 8)])
            expected = expected[torch.from_numpy(rows)]
        assert data.tobytes() == expected.contiguous().view(torch.uint8).numpy().tobytes()
    assert result.file_bytes == out.stat().st_size
    assert result.path == out
    assert _leftovers(folder) == ["out.gguf"]


def test_metadata(folder: Path) -> None:
    _save(folder, _tensors())
    (folder / "README.md").write_text("---\ntags: [x]\nlicense: apache-2.0\n---\nlicense: mit\n")
    export_gguf(folder, folder.parent / "out.gguf")
    fields = gguf.GGUFReader(folder.parent / "out.gguf").fields
    values = {name: field.contents() for name, field in fields.items() if name.startswith(("general", "llama"))}
    assert values == {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "tiny-llama",
        "general.size_label": "25K",
        "general.license": "apache-2.0",
        "general.file_type": 32,
        "general.quantization_version": 2,
        "llama.vocab_size": VOCAB,
        "llama.context_length": 128,
        "llama.embedding_length": 32,
        "llama.block_count": 2,
        "llama.feed_forward_length": 48,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 8,
        "llama.attention.value_length": 8,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        "llama.rope.freq_base": 10_000.0,
        "llama.rope.dimension_count": 8,
    }


def test_name_of_a_snapshot_in_the_hubs_cache(folder: Path) -> None:
    _save(folder, _tensors())
    snapshot = folder.parent / "models--HuggingFaceTB--SmolLM2-135M" / "snapshots" / "abc123"
    shutil.copytree(folder, snapshot)
    export_skeleton(snapshot, folder.parent / "out.gguf")
    fields = gguf.GGUFReader(folder.parent / "out.gguf").fields
    assert fields["general.name"].contents() == "SmolLM2-135M"


def test_small_pieces_write_the_same_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _save(folder, _tensors())
    whole, pieces = folder.parent / "whole.gguf", folder.parent / "pieces.gguf"
    export_gguf(folder, whole, float_type="f16")
    monkeypatch.setattr(weights, "_CHUNK_WEIGHTS", 100)
    seen: list[tuple[int, int, str]] = []
    export_gguf(folder, pieces, float_type="f16", progress=lambda *args: seen.append(args))
    assert whole.read_bytes() == pieces.read_bytes()
    assert len(seen) > 100
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    assert {total for _, total, _ in seen} == {whole.stat().st_size}
    assert seen[-1][2] == "output_norm.weight"


@pytest.mark.parametrize("float_type", ["source", "f16"])
def test_skeleton_is_the_same_header_over_a_hole(folder: Path, float_type: FloatType) -> None:
    _save(folder, _tensors())
    real, hole = folder.parent / "real.gguf", folder.parent / "hole.gguf"
    result = export_gguf(folder, real, float_type=float_type)
    skeleton = export_skeleton(folder, hole, float_type=float_type)
    assert skeleton.tensors == result.tensors
    assert skeleton.file_bytes == result.file_bytes == hole.stat().st_size
    start = gguf.GGUFReader(real).data_offset
    assert real.read_bytes()[:start] == hole.read_bytes()[:start]
    assert not any(hole.read_bytes()[start:])


def test_skeleton_of_a_huge_model_takes_no_room(folder: Path) -> None:
    _config(folder, hidden_size=8192, intermediate_size=28672, num_attention_heads=64, num_key_value_heads=8)
    header: dict[str, Any] = {}
    position = 0
    sizes = {"q": (8192, 8192), "k": (1024, 8192), "v": (1024, 8192), "o": (8192, 8192), "gate": (28672, 8192),
             "up": (28672, 8192), "down": (8192, 28672)}  # fmt: skip
    for name, tensor in _tensors().items():
        kind = name.split(".")[-2].removesuffix("_proj")
        shape = (8192,) if tensor.ndim == 1 else sizes.get(kind, (VOCAB, 8192))
        end = position + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + position)
    result = export_skeleton(folder, folder.parent / "out.gguf")
    assert result.file_bytes > 3 * 10**9
    assert result.path.stat().st_blocks * 512 < 10**6


def test_llama_cpp_plans_a_quantization_on_the_skeleton(folder: Path) -> None:
    pytest.importorskip("llama_cpp")
    _save(folder, _tensors())
    export_skeleton(folder, folder.parent / "out.gguf")
    types = preview(folder.parent / "out.gguf", find_preset("q8_0")).types
    assert types["blk.0.ffn_up.weight"] == "q8_0"
    assert types["blk.0.attn_norm.weight"] == "f32"


def test_weights_beyond_f16_stay_finite_and_are_noted(folder: Path) -> None:
    tensors = _tensors()
    tensors[UP0][40, 3] = 1e6
    _save(folder, tensors)
    out = folder.parent / "out.gguf"
    result = export_gguf(folder, out, float_type="f16")
    read = _read(out)
    assert read["blk.0.ffn_up.weight"][0] == result.tensors["blk.0.ffn_up.weight"][0] == "bf16"
    assert read["blk.0.ffn_up.weight"][1].tobytes() == tensors[UP0].view(torch.uint8).numpy().tobytes()
    assert [name for name, (kind, _) in read.items() if kind == "bf16"] == ["blk.0.ffn_up.weight"]
    assert read["blk.1.ffn_up.weight"][1].tobytes() == (
        tensors[UP0.replace("0", "1")].half().contiguous().view(torch.uint8).numpy().tobytes()
    )
    assert any("blk.0.ffn_up.weight" in note and "bf16" in note for note in result.notes)


def test_weights_beyond_bf16_are_refused(folder: Path) -> None:
    tensors = _tensors("float32")
    tensors[UP0][40, 3] = 3.4e38
    _save(folder, tensors)
    with pytest.raises(ConversionError, match="beyond the range of bf16"):
        export_gguf(folder, folder.parent / "out.gguf", float_type="bf16")
    assert _leftovers(folder) == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name", [Q0, "model.norm.weight"])
def test_nan_and_infinity_are_refused_with_their_number(
    folder: Path, dtype: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "_CHUNK_WEIGHTS", 64)
    tensors = _tensors(dtype)
    flat = tensors[name].reshape(-1)
    flat[3], flat[17], flat[-1] = float("nan"), float("inf"), float("-inf")
    _save(folder, tensors)
    with pytest.raises(SourceError, match=rf"{name} holds 3 weights that are NaN or infinite"):
        export_gguf(folder, folder.parent / "out.gguf")
    assert _leftovers(folder) == []


def test_tied_output_is_left_out_only_if_it_is_the_embedding(folder: Path) -> None:
    tensors = _tensors()
    out = folder.parent / "out.gguf"
    _save(folder, {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    assert "output.weight" not in export_gguf(folder, out).tensors
    other = tensors["model.embed_tokens.weight"].clone()
    other[-1, -1] += 1
    _save(folder, {**tensors, "lm_head.weight": other})
    result = export_gguf(folder, out)
    assert "output.weight" in result.tensors
    assert any("lm_head.weight differs" in note for note in result.notes)
    assert export_skeleton(folder, out).tensors == result.tensors
    _config(folder, tie_word_embeddings=False)
    assert "output.weight" in export_gguf(folder, out).tensors
    _save(folder, tensors)
    with pytest.raises(SourceError, match=r"lacks output\.weight"):
        export_gguf(folder, out)


def _without(name: str) -> Tensors:
    return {key: value for key, value in _tensors().items() if key != name}


@pytest.mark.parametrize(
    ("tensors", "config", "cause"),
    [
        (_without(Q0), {}, r"lacks blk\.0\.attn_q\.weight"),
        ({**_tensors(), "model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}, {}, "config.json says it has not"),
        ({**_tensors(), "model.layers.7.mlp.up_proj.weight": torch.zeros(2)}, {}, "have no place in a llama GGUF"),
        ({**_tensors(), "lm_head.scale": torch.zeros(2)}, {}, r"lm_head\.scale of the checkpoint have no place"),
        ({**_tensors(), UP0: torch.zeros(48, 31)}, {}, r"has the shape 48x31, config\.json makes it 48x32"),
        ({**_tensors(), UP0: torch.zeros(48, 32, dtype=torch.int8)}, {}, "is of dtype I8"),
        ({**_tensors(), UP0: torch.zeros(48, 32, dtype=torch.float64)}, {}, "is of dtype F64"),
        (_tensors(), {"vocab_size": 299}, "has the shape 300x32"),
        (_tensors(), {"num_hidden_layers": 3}, r"lacks blk\.2\.attn_norm\.weight.* and 4 more"),
        (_tensors(), {"num_hidden_layers": 10**9}, "1000000000 layers"),
        (_tensors(), {"attention_bias": True}, r"lacks blk\.0\.attn_q\.bias"),
        (_tensors(), {"num_key_value_heads": 3}, "cannot share 3"),
        (_tensors(), {"hidden_size": ...}, "has no hidden_size"),
        (_tensors(), {"hidden_size": "32"}, "hidden_size in config.json is '32'"),
        (_tensors(), {"hidden_size": -1}, "hidden_size in config.json is -1"),
        (_tensors(), {"rms_norm_eps": "small"}, "rms_norm_eps in config.json"),
        (_tensors(), {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        (_tensors(), {"architectures": ...}, "names no architectures"),
        (_tensors(), {"architectures": []}, "names no architectures"),
        (_tensors(), {"quantization_config": {"quant_method": "gptq"}}, r"quantized already \(gptq\)"),
        (_tensors(), {"rope_scaling": {"type": "longrope"}}, "RoPE scaling of type longrope"),
        (_tensors(), {"rope_scaling": {"rope_type": "default", "mrope_section": [1, 2]}}, "RoPE with mrope_section"),
        (_tensors(), {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "RoPE on 4 of 8"),
        (_tensors(), {"rope_parameters": [1]}, "rope_parameters in config.json"),
        (_tensors(), {"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "has no low_freq_factor"),
    ],
)
def test_refusals(folder: Path, tensors: Tensors, config: dict[str, object], cause: str) -> None:
    _config(folder, **config)
    _save(folder, tensors)
    with pytest.raises(SourceError, match=cause) as caught:
        export_gguf(folder, folder.parent / "out.gguf")
    assert caught.value.remedy
    assert _leftovers(folder) == []


def test_an_unknown_architecture_names_the_known_and_the_way_out(folder: Path) -> None:
    _config(folder, architectures=["MixtralForCausalLM"])
    _save(folder, _tensors())
    with pytest.raises(UnsupportedModelError) as caught:
        export_skeleton(folder, folder.parent / "out.gguf")
    text = str(caught.value)
    assert "MixtralForCausalLM" in text
    assert all(name in text for name in supported_architectures())
    assert "F16 GGUF" in text
    assert "--llama-cpp DIR" in text


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 100_000, "\x00"])
def test_config_that_is_no_json_object(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(SourceError, match="is no JSON"):
        export_gguf(folder, folder.parent / "out.gguf")


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(SourceError, match=r"has no config\.json"):
        export_gguf(folder, folder.parent / "out.gguf")


def test_inverse_frequencies_of_old_checkpoints_are_left_out(folder: Path) -> None:
    _save(folder, {**_tensors(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    assert (
        export_gguf(folder, folder.parent / "out.gguf").notes
        == export_skeleton(folder, folder.parent / "out.gguf").notes
    )


def test_an_existing_file_survives_a_failure_and_is_replaced_by_success(folder: Path) -> None:
    out = folder.parent / "out.gguf"
    out.write_text("old")
    with pytest.raises(SourceError):
        export_gguf(folder, out)
    assert out.read_text() == "old"
    _save(folder, _tensors())
    export_gguf(folder, out)
    assert out.read_bytes()[:4] == b"GGUF"


def test_no_such_output_folder(folder: Path) -> None:
    _save(folder, _tensors())
    with pytest.raises(ConversionError, match="cannot be written"):
        export_gguf(folder, folder / "nowhere" / "out.gguf")


def test_too_little_room_is_seen_before_writing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _save(folder, _tensors())
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(DiskFullError, match=r"KiB needed, [\d.]+ KiB free"):
        export_gguf(folder, folder.parent / "out.gguf")
    assert _leftovers(folder) == []


def test_disk_full_while_writing(folder: Path) -> None:
    """A real full disk: a tmpfs of 64 KiB in a mount namespace of its own."""
    _save(folder, _tensors("float32"))
    disk = folder.parent / "disk"
    disk.mkdir()
    child = textwrap.dedent(f"""
        import os, shutil, sys
        from pathlib import Path
        from edgeq.converters.gguf.export import export_gguf
        from edgeq.errors import DiskFullError
        real = shutil.disk_usage
        shutil.disk_usage = lambda path: real("/dev/shm")._replace(free=1 << 40)
        try:
            export_gguf(Path({str(folder)!r}), Path({str(disk)!r}) / "out.gguf")
        except DiskFullError as error:
            assert os.listdir({str(disk)!r}) == [], os.listdir({str(disk)!r})
            print(error)
    """)
    script = f"mount -t tmpfs -o size=64k none {disk} && exec {sys.executable} -c '{child.replace(chr(39), chr(34))}'"
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-Urm", "true"], check=False, capture_output=True).returncode:
        pytest.skip("this machine allows no mount namespace")
    done = subprocess.run([unshare, "-Urm", "sh", "-c", script], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.match(r"No room for .*out\.gguf: 98\.\d KiB needed, .* free\.", done.stdout)
