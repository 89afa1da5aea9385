"""Shapes from config.json alone, against transformers' own models and against real exports."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeq.converters.config_shape import shape_of_config, write_shape_skeleton
from edgeq.converters.gguf.header import read_header
from edgeq.converters.gguf.layout import plan_layout
from edgeq.converters.gguf.presets import PRESETS
from edgeq.converters.gguf.quantize import preview
from edgeq.converters.gguf.shape import model_shape
from edgeq.errors import SourceError, UnsupportedModelError
from edgeq.profiles.llm.model_shape import ModelShape

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

SMALL: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
GEMMA3 = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 32}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "long_factor": [2.0] * 8,
    "short_factor": [1.0] * 8,
    "original_max_position_embeddings": 128,
}
# Class in transformers, settings on top of SMALL.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "llama-tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "llama-bias": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "llama3-rope": ("LlamaForCausalLM", {"rope_parameters": LLAMA3_ROPE}),
    "mistral": ("MistralForCausalLM", {"head_dim": 24, "sliding_window": 128}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen2-tied": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 32}),
    "gemma3": ("Gemma3ForCausalLM", GEMMA3),
    "phi3": ("Phi3ForCausalLM", {"pad_token_id": 0}),
    "phi3-long": (
        "Phi3ForCausalLM",
        {"pad_token_id": 0, "rope_parameters": LONG_ROPE, "original_max_position_embeddings": 128},
    ),
    "gemma2": ("Gemma2ForCausalLM", {"head_dim": 32, "sliding_window": 48}),
}
# general.architecture of each class.
FAMILIES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "Phi3ForCausalLM": "phi3",
}
EXTRA = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}


def _build(name: str) -> tuple[Any, dict[str, Any]]:
    """A model without weights, and the config.json that transformers writes for it."""
    kind, values = CASES[name]
    model_class = getattr(transformers, kind)
    config = model_class.config_class(**{**SMALL, **values}, architectures=[kind])
    with torch.device("meta"):
        model = model_class(config)
    return model, json.loads(config.to_json_string(use_diff=False))


def _gguf_shapes(model: Any, architecture: str) -> dict[str, tuple[int, ...]]:
    """The model's own tensors under the names that the gguf package gives them, row length first."""
    kind = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(kind, SMALL["num_hidden_layers"])
    tied = model.config.tie_word_embeddings
    found = {}
    for name, value in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert target is not None, name
        found[target] = tuple(reversed(value.shape))
    return found


@pytest.mark.parametrize("name", CASES)
def test_tensors_and_heads_are_those_of_transformers(name: str) -> None:
    model, config = _build(name)
    shape = shape_of_config(config)
    tensors = {key: value for key, value in shape.tensors.items() if key not in EXTRA}
    assert tensors == _gguf_shapes(model, FAMILIES[CASES[name][0]])
    assert shape.tied_embedding == model.config.tie_word_embeddings
    attention = model.model.layers[0].self_attn
    head = attention.head_dim
    assert (shape.key_head_width, shape.value_head_width) == (head, head)
    kv = model.config.num_key_value_heads * head
    assert [(layer.key_width, layer.value_width, layer.heads) for layer in shape.layers] == [(kv, kv, 4)] * 7
    assert (shape.n_vocab, shape.embedding_width, shape.feed_forward_width) == (320, 64, 96)
    assert shape.header_bytes == 0


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_windows_are_those_of_transformers(name: str) -> None:
    model, config = _build(name)
    kinds = model.config.layer_types
    assert {"sliding_attention", "full_attention"} == set(kinds)
    windows = [model.config.sliding_window if kind == "sliding_attention" else None for kind in kinds]
    assert [layer.window for layer in shape_of_config(config).layers] == windows


@pytest.mark.parametrize("name", ["mistral", "phi3"])
def test_windows_that_llama_cpp_ignores_are_ignored(name: str) -> None:
    _, config = _build(name)
    assert {layer.window for layer in shape_of_config({**config, "sliding_window": 16}).layers} == {None}


@pytest.mark.parametrize("name", [name for name in CASES if name != "gemma2"])
def test_same_as_the_export(name: str, tmp_path: Path) -> None:
    """What the converter makes of a whole checkpoint, in the same order."""
    model, config = _build(name)
    tensors = {key: torch.zeros(value.shape) for key, value in model.state_dict().items()}
    safetensors_torch.save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    layout = plan_layout(tmp_path, "f16")
    assert [*shape_of_config(config).tensors.items()] == [(t.name, t.ggml_shape) for t in layout.tensors]


def test_same_as_a_real_file(tiny_gguf: Any) -> None:
    path: Path = tiny_gguf()
    config = json.loads((path.with_suffix("") / "config.json").read_text())
    real = model_shape(read_header(path))
    assert shape_of_config(config) == dataclasses.replace(real, header_bytes=0)


@pytest.mark.parametrize("name", CASES)
def test_skeleton_has_the_same_shape(name: str, tmp_path: Path) -> None:
    _, config = _build(name)
    write_shape_skeleton(config, tmp_path / "s.gguf")
    found = model_shape(read_header(tmp_path / "s.gguf"))
    assert dataclasses.replace(found, header_bytes=0) == shape_of_config(config)


@pytest.mark.parametrize("preset", ["q4_k_m", "q8_0", "q4_0"])
def test_llama_cpp_gives_the_skeleton_the_types_of_the_real_file(preset: str, tiny_gguf: Any, tmp_path: Path) -> None:
    path: Path = tiny_gguf()
    write_shape_skeleton(json.loads((path.with_suffix("") / "config.json").read_text()), tmp_path / "s.gguf")
    assert preview(tmp_path / "s.gguf", PRESETS[preset]).types == preview(path, PRESETS[preset]).types


def test_parameters_of_llama_3_2_1b() -> None:
    """The number that its safetensors have."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": {**LLAMA3_ROPE, "factor": 32.0, "original_max_position_embeddings": 8192},
        "tie_word_embeddings": True,
    }
    assert sum(math.prod(s) for n, s in shape_of_config(config).tensors.items() if n not in EXTRA) == 1_235_814_400


VALID: dict[str, Any] = {"architectures": ["Qwen3ForCausalLM"], **SMALL}


@pytest.mark.parametrize(
    ("values", "error", "cause"),
    [
        ({"architectures": ["Qwen3MoeForCausalLM"]}, UnsupportedModelError, "Qwen3MoeForCausalLM"),
        ({"architectures": None}, SourceError, "names no architectures"),
        ({"architectures": []}, SourceError, "names no architectures"),
        ({"architectures": "LlamaForCausalLM"}, SourceError, "not a list of strings"),
        ({"hidden_size": None}, SourceError, "has no hidden_size"),
        ({"vocab_size": None}, SourceError, "has no vocab_size"),
        ({"hidden_size": "1024"}, SourceError, "'1024', not a whole number"),
        ({"num_hidden_layers": 0}, SourceError, "num_hidden_layers"),
        ({"num_hidden_layers": 10**6}, UnsupportedModelError, "1000000 layers"),
        ({"intermediate_size": -96}, SourceError, "intermediate_size"),
        ({"vocab_size": True}, SourceError, "vocab_size"),
        ({"num_attention_heads": 3}, SourceError, "3 attention heads cannot share 2"),
        ({"architectures": ["LlamaForCausalLM"], "num_attention_heads": 6}, SourceError, "64 among 6 heads"),
        ({"head_dim": 15}, SourceError, "width 15"),
        ({"attention_bias": True}, UnsupportedModelError, "attention_bias"),
        (
            {"architectures": ["Gemma2ForCausalLM"], "tie_word_embeddings": False},
            UnsupportedModelError,
            "output matrix",
        ),
        ({"text_config": 5}, SourceError, "text_config"),
        ({"architectures": ["Gemma2ForCausalLM"], "sliding_window": "all"}, SourceError, "sliding_window"),
    ],
)
def test_bad_configs_are_one_line(values: dict[str, Any], error: type[SourceError], cause: str) -> None:
    with pytest.raises(error, match=cause) as caught:
        shape_of_config({**VALID, **values})
    assert "\n" not in str(caught.value)
    assert caught.value.remedy


def test_an_unknown_architecture_gets_the_nearest_names() -> None:
    with pytest.raises(UnsupportedModelError, match="Gemma2ForCausalLM"):
        shape_of_config({**VALID, "architectures": ["Gemma4ForCausalLM"]})
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM"):
        shape_of_config({**VALID, "architectures": ["XYZ"]})


def test_text_part_of_a_multimodal_config() -> None:
    text = {**SMALL, **GEMMA3}
    whole = {"architectures": ["Gemma3ForConditionalGeneration"], "vision_config": {}, "text_config": text}
    alone = {"architectures": ["Gemma3ForCausalLM"], **text}
    assert shape_of_config(whole) == shape_of_config(alone)


def test_a_quantized_checkpoints_config_is_good_enough() -> None:
    assert shape_of_config({**VALID, "quantization_config": {"quant_method": "awq"}}) == shape_of_config(VALID)


_JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 2**33),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(), max_size=2),
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(
    architecture=st.sampled_from([kind for kind, _ in CASES.values()]),
    junk=st.dictionaries(
        st.sampled_from([*SMALL, "head_dim", "sliding_window", "rope_scaling", "rope_theta", "tie_word_embeddings"]),
        _JUNK,
        max_size=3,
    ),
)
def test_any_values_give_a_shape_or_one_line(architecture: str, junk: dict[str, Any]) -> None:
    try:
        shape = shape_of_config({**VALID, "architectures": [architecture], **junk})
    except SourceError as error:
        assert "\n" not in str(error)
    else:
        assert isinstance(shape, ModelShape)
        assert all(n > 0 for dims in shape.tensors.values() for n in dims)
