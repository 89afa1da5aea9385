"""Hyperparameters from every spelling of config.json, and the settings that are refused because llama.cpp differs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeq.converters.gguf.architectures import ARCHITECTURES
from edgeq.converters.gguf.architectures.base import Settings
from edgeq.converters.gguf.architectures.decoder import read_dims
from edgeq.converters.gguf.config import load_config, read_license, read_rope
from edgeq.converters.gguf.layout import plan_layout
from edgeq.errors import SourceError, UnsupportedModelError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
safetensors_torch = pytest.importorskip("safetensors.torch")

BASE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 1024,
}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16}


def _settings(folder: Path, architecture: str, **values: object) -> Settings:
    """What the architecture makes of a config.json with these values."""
    (folder / "config.json").write_text(json.dumps({"architectures": [architecture], **BASE, **values}))
    found = ARCHITECTURES.get(architecture)
    assert found is not None
    config = load_config(folder).with_defaults(found.defaults)
    return found.settings(config, read_dims(config))


@pytest.mark.parametrize("name", ARCHITECTURES.names())
def test_defaults_are_those_of_the_class_in_transformers(name: str) -> None:
    """An absent key means what transformers takes it for."""
    found = ARCHITECTURES.get(name)
    assert found is not None
    if name == "LLaMAForCausalLM":
        name = "LlamaForCausalLM"
    config = getattr(transformers, name).config_class()
    config = getattr(config, "text_config", config)
    parameters = config.rope_parameters
    ours = dict(found.defaults)
    if "sliding_attention" in parameters:
        assert ours.pop("rope_local_base_freq") == parameters["sliding_attention"]["rope_theta"]
        assert ours.pop("sliding_window_pattern") == config._sliding_window_pattern
        parameters = parameters["full_attention"]
    assert ours.pop("rope_theta") == parameters["rope_theta"]
    if "use_sliding_window" in dir(config):
        ours["sliding_window"] = None
        assert not config.use_sliding_window
    assert {key: getattr(config, key) for key in ours} == ours
    assert config.tie_word_embeddings == ours.get("tie_word_embeddings", False)


@pytest.mark.parametrize(
    "form",
    [
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 4}},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}},
        {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}}},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0}, "rope_theta": 5e5},
    ],
)
def test_old_and_new_rope_spellings_are_the_same(tmp_path: Path, form: dict[str, Any]) -> None:
    keys = _settings(tmp_path, "LlamaForCausalLM", **form).keys
    rope = {key: value for key, value in keys.items() if key.startswith("rope")}
    assert rope == {
        "rope.freq_base": 5e5,
        "rope.dimension_count": 16,
        "rope.scaling.type": "linear",
        "rope.scaling.factor": 4.0,
    }


@pytest.mark.parametrize(
    ("factor", "low", "high", "original", "theta"),
    [(8.0, 1.0, 4.0, 8192, 5e5), (32.0, 1.0, 4.0, 8192, 5e5), (4.0, 2.0, 3.0, 64, 1e4), (2.0, 1.0, 4.0, 512, 1e6)],
)
def test_llama3_factors_are_those_of_transformers(
    tmp_path: Path, factor: float, low: float, high: float, original: int, theta: float
) -> None:
    parameters = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
        "rope_theta": theta,
    }
    values = {**BASE, "hidden_size": 512}
    ours = _settings(tmp_path, "LlamaForCausalLM", **{**values, "rope_parameters": parameters}).extra
    config = transformers.LlamaConfig(**values, rope_parameters=parameters)
    scaled, _ = rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1.0 / theta ** (np.arange(0, 128, 2) / 128)
    np.testing.assert_allclose(ours["rope_freqs.weight"], plain / scaled.numpy(), rtol=2e-5)
    assert ours["rope_freqs.weight"].dtype == np.float32


@pytest.mark.parametrize("given", [{}, {"factor": 32.0}, {"attention_factor": 1.25}])
def test_longrope_attention_factor_is_that_of_transformers(tmp_path: Path, given: dict[str, float]) -> None:
    parameters = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "long_factor": [2.0] * 8,
        "short_factor": [1.0] * 8,
        "original_max_position_embeddings": 128,
        **given,
    }
    values = {"rope_parameters": parameters, "original_max_position_embeddings": 128}
    settings = _settings(tmp_path, "Phi3ForCausalLM", **values)
    config = transformers.Phi3Config(**BASE, **values, pad_token_id=0)
    _, attention = rope_utils.ROPE_INIT_FUNCTIONS["longrope"](config, "cpu")
    assert settings.keys["rope.scaling.attn_factor"] == pytest.approx(attention)
    assert settings.keys["rope.scaling.original_context_length"] == 128
    assert settings.extra["rope_factors_long.weight"].tolist() == [2.0] * 8
    assert any("short factors" in note for note in settings.notes)


def test_yarn_extends_the_context(tmp_path: Path) -> None:
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    keys = _settings(tmp_path, "Qwen2ForCausalLM", rope_scaling=scaling).keys
    assert keys["context_length"] == 4096
    assert keys["rope.scaling.original_context_length"] == 1024


def test_dynamic_scaling_ends_where_it_would_begin(tmp_path: Path) -> None:
    settings = _settings(tmp_path, "LlamaForCausalLM", rope_scaling={"type": "dynamic", "factor": 2.0})
    assert settings.keys["context_length"] == 1024
    assert "rope.scaling.type" not in settings.keys
    assert any("1024" in note for note in settings.notes)


@pytest.mark.parametrize(
    ("architecture", "values", "context", "noted"),
    [
        ("MistralForCausalLM", {"sliding_window": 256}, 256, True),
        ("MistralForCausalLM", {"sliding_window": None}, 1024, False),
        ("MistralForCausalLM", {"sliding_window": 1024}, 1024, False),
        ("MistralForCausalLM", {"max_position_embeddings": 32768}, 4096, True),
        ("Phi3ForCausalLM", {"sliding_window": 1023}, 1023, True),
        ("Phi3ForCausalLM", {}, 1024, False),
        ("Qwen2ForCausalLM", {"sliding_window": 256}, 1024, False),
        ("Qwen2ForCausalLM", {"sliding_window": 256, "use_sliding_window": True, "max_window_layers": 3}, 256, True),
        ("Qwen2ForCausalLM", {"sliding_window": 256, "use_sliding_window": True, "max_window_layers": 6}, 1024, False),
        (
            "Qwen3ForCausalLM",
            {"sliding_window": 256, "use_sliding_window": True, "layer_types": ["full_attention"] * 6},
            1024,
            False,
        ),
    ],
)
def test_a_window_that_llama_cpp_ignores_limits_the_context(
    tmp_path: Path, architecture: str, values: dict[str, Any], context: int, noted: bool
) -> None:
    settings = _settings(tmp_path, architecture, **values)
    assert settings.keys["context_length"] == context
    assert any("sliding window" in note for note in settings.notes) == noted


@pytest.mark.parametrize(
    ("values", "pattern"),
    [
        ({}, 6),
        ({"sliding_window_pattern": 3}, 3),
        ({"layer_types": ["sliding_attention", "full_attention"] * 3}, 2),
        ({"layer_types": ["sliding_attention"] * 6}, 0),
        ({"layer_types": ["sliding_attention"] * 4 + ["full_attention"] * 2}, [True] * 4 + [False] * 2),
        ({"layer_types": ["full_attention"] * 6}, None),
    ],
)
def test_gemma_window_pattern(tmp_path: Path, values: dict[str, Any], pattern: int | list[bool] | None) -> None:
    keys = _settings(tmp_path, "Gemma3ForCausalLM", **GEMMA, **values).keys
    assert keys.get("attention.sliding_window_pattern") == pattern
    assert keys.get("attention.sliding_window") == (None if pattern is None else 4096)
    assert keys["rope.freq_base"] == 1e6
    assert keys.get("rope.freq_base_swa") == (None if pattern is None else 1e4)


def test_gemma_of_62_layers_is_scaled_as_the_27b(tmp_path: Path) -> None:
    wide = {"num_hidden_layers": 62, "hidden_size": 672, "head_dim": 128}
    assert _settings(tmp_path, "Gemma3ForCausalLM", **wide, query_pre_attn_scalar=168).keys["block_count"] == 62
    with pytest.raises(UnsupportedModelError, match="query_pre_attn_scalar 128 where it assumes 168"):
        _settings(tmp_path, "Gemma3ForCausalLM", **wide, query_pre_attn_scalar=128)


@pytest.mark.parametrize(
    ("architecture", "values", "cause"),
    [
        ("Gemma3ForCausalLM", {**GEMMA, "query_pre_attn_scalar": 32}, "query_pre_attn_scalar 32"),
        ("Gemma3ForCausalLM", {**GEMMA, "attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("Gemma3ForCausalLM", {**GEMMA, "use_bidirectional_attention": True}, "bidirectional"),
        ("Gemma3ForCausalLM", {**GEMMA, "attention_bias": True}, "attention_bias"),
        ("Gemma3ForCausalLM", {**GEMMA, "hidden_activation": "silu"}, "hidden_activation 'silu'"),
        ("Gemma3ForCausalLM", {**GEMMA, "layer_types": ["chunked_attention"] * 6}, "layer_types"),
        ("Gemma3ForCausalLM", {**GEMMA, "layer_types": ["full_attention"] * 5}, "layer_types"),
        ("Gemma3ForCausalLM", {**GEMMA, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "type yarn"),
        (
            "Gemma3ForCausalLM",
            {**GEMMA, "rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "linear on sliding layers",
        ),
        ("Qwen2ForCausalLM", {"head_dim": 32}, "heads of width 32"),
        ("Qwen2ForCausalLM", {"rope_scaling": {"type": "llama3", "factor": 2.0}}, "type llama3"),
        ("Qwen2ForCausalLM", {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}, "type mrope"),
        ("Qwen2ForCausalLM", {"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": 16}}, "beta_fast"),
        ("Qwen2ForCausalLM", {"rope_scaling": {"type": "yarn", "factor": 2.0, "attention_factor": 2}}, "attention_fac"),
        ("Qwen2ForCausalLM", {"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": 1.0}}, "mscale"),
        ("Qwen3ForCausalLM", {"attention_bias": True}, "attention_bias"),
        ("MistralForCausalLM", {"rope_parameters": {"llama_4_scaling_beta": 0.1}}, "llama_4_scaling_beta"),
        ("Phi3ForCausalLM", {"head_dim": 32}, "heads of width 32"),
        ("Phi3ForCausalLM", {"attention_bias": True}, "attention_bias"),
        ("Phi3ForCausalLM", {"rope_scaling": {"type": "su", "long_factor": [1.0], "short_factor": [1.0]}}, "1 numbers"),
        ("Phi3ForCausalLM", {"rope_scaling": {"type": "su", "long_factor": "1"}}, "not a list of numbers"),
        ("LlamaForCausalLM", {"head_dim": 15}, "width 15"),
    ],
)
def test_what_llama_cpp_computes_differently_is_refused(
    tmp_path: Path, architecture: str, values: dict[str, Any], cause: str
) -> None:
    with pytest.raises(SourceError, match=cause) as caught:
        _settings(tmp_path, architecture, **values)
    assert caught.value.remedy


def test_rope_of_sliding_layers_keeps_clear_of_rope_scaling(tmp_path: Path) -> None:
    values = {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_theta": 1e6, "rope_local_base_freq": 1e4}
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Gemma3ForCausalLM"], **values}))
    config = load_config(tmp_path)
    local = read_rope(config, "sliding_attention", theta_key="rope_local_base_freq")
    assert (local.kind, local.theta) == ("default", 1e4)
    assert (read_rope(config).kind, read_rope(config).theta) == ("linear", 1e6)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model.", "model."])
def test_gemma_text_model_inside_a_multimodal_checkpoint(tmp_path: Path, prefix: str) -> None:
    config = transformers.Gemma3TextConfig(**{**BASE, **GEMMA, "num_hidden_layers": 2, "pad_token_id": 0})
    model = transformers.Gemma3ForCausalLM(config)
    tensors = {
        name.replace("model.", prefix, 1): value.contiguous()
        for name, value in model.state_dict().items()
        if name != "lm_head.weight"
    }
    tensors["vision_tower.vision_model.embeddings.patch_embedding.weight"] = torch.zeros(3, 3)
    tensors["multi_modal_projector.mm_input_projection_weight"] = torch.zeros(3, 3)
    safetensors_torch.save_file(tensors, tmp_path / "model.safetensors")
    text = {**BASE, **GEMMA, "num_hidden_layers": 2}
    outer = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text, "vision_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(outer))
    layout = plan_layout(tmp_path, "source")
    assert len(layout.tensors) == len(tensors) - 2
    assert [note for note in layout.settings.notes if "vision tower" in note]
    assert all(planned.add == (1.0 if len(planned.shape) == 1 else 0.0) for planned in layout.tensors)


@pytest.mark.parametrize(
    ("card", "license_name"),
    [
        ("---\nlicense: apache-2.0\n---\n", "apache-2.0"),
        ('---\nlicense: "mit"\n---\n', "mit"),
        ("---\ntags:\n- a\n---\nlicense: mit\n", None),
        ("license: mit\n", None),
        (None, None),
    ],
)
def test_license(tmp_path: Path, card: str | None, license_name: str | None) -> None:
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert read_license(tmp_path) == license_name
