"""Gemma 3, the text part: sliding and full layers with their own RoPE, norms on both sides of each block."""

from __future__ import annotations

from edgeq.converters.gguf.architectures.base import Architecture, Dims, Ignored, Settings, Tensor, Value, require
from edgeq.converters.gguf.architectures.decoder import DECODER, decoder_settings, require_activation
from edgeq.converters.gguf.config import ModelConfig, read_rope
from edgeq.errors import SourceError

__all__ = ["ARCHITECTURE"]

# transformers multiplies by (1 + weight), llama.cpp by the weight.
_NORM = Tensor(("embd",), add=1.0)
_HEAD_NORM = Tensor(("head",), add=1.0)
# llama.cpp takes models with this many layers for the 27B, whose scale differs (llama_model_gemma3).
_LAYERS_27B = 62


def _is_sliding(config: ModelConfig, dims: Dims) -> list[bool]:
    kinds = config.strings("layer_types")
    if kinds is None:
        pattern = config.count("sliding_window_pattern")
        return [(i + 1) % pattern != 0 for i in range(dims.layers)]
    if len(kinds) != dims.layers or not set(kinds) <= {"sliding_attention", "full_attention"}:
        raise SourceError(
            f"layer_types in config.json does not name sliding_attention or full_attention for {dims.layers} layers",
            "Use the config.json that belongs to the weights",
        )
    return [kind == "sliding_attention" for kind in kinds]


def _window_keys(config: ModelConfig, dims: Dims) -> dict[str, Value]:
    sliding = _is_sliding(config, dims)
    if not any(sliding):
        return {}
    local = read_rope(config, "sliding_attention", theta_key="rope_local_base_freq")
    require(local.kind == "default", f"RoPE scaling of type {local.kind} on sliding layers")
    first_full = sliding.index(False) + 1 if False in sliding else 0
    regular = sliding == [first_full == 0 or (i + 1) % first_full != 0 for i in range(dims.layers)]
    return {
        "attention.sliding_window": config.count("sliding_window"),
        "attention.sliding_window_pattern": first_full if regular else sliding,
        "rope.freq_base_swa": local.theta,
    }


def _settings(config: ModelConfig, dims: Dims) -> Settings:
    require_activation(config, "hidden_activation", ("gelu_pytorch_tanh",))
    require(not config.flag("attention_bias"), "Gemma 3 with attention_bias")
    require(not config.flag("use_bidirectional_attention"), "Gemma 3 with bidirectional attention")
    require(config.get("attn_logit_softcapping") is None, "Gemma 3 with attn_logit_softcapping")
    scalar = dims.embd // dims.heads if dims.layers == _LAYERS_27B else dims.head
    given = config.number("query_pre_attn_scalar")
    require(given == scalar, f"Gemma 3 with query_pre_attn_scalar {given:g} where it assumes {scalar}")
    settings = decoder_settings(config, dims, ("default", "linear"))
    keys = {**settings.keys, **_window_keys(config, dims)}
    if config.get("final_logit_softcapping") is not None:
        keys["final_logit_softcapping"] = config.number("final_logit_softcapping")
    return Settings(keys, settings.extra, settings.notes)


ARCHITECTURE = Architecture(
    names=("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
    gguf="gemma3",
    tensors={
        **DECODER,
        "blk.{i}.attn_norm.weight": _NORM,
        "blk.{i}.attn_q_norm.weight": _HEAD_NORM,
        "blk.{i}.attn_k_norm.weight": _HEAD_NORM,
        "blk.{i}.post_attention_norm.weight": _NORM,
        "blk.{i}.ffn_norm.weight": _NORM,
        "blk.{i}.post_ffw_norm.weight": _NORM,
        "output_norm.weight": _NORM,
    },
    settings=_settings,
    defaults={
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 131_072,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-6,
        "rope_local_base_freq": 10_000.0,
        "rope_theta": 1_000_000.0,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "tie_word_embeddings": True,
        "vocab_size": 262_208,
    },
    prefixes=(
        ("language_model.lm_head.", "lm_head."),
        ("language_model.model.", "model."),
        ("model.language_model.", "model."),
    ),
    ignored=(
        Ignored(r"\.rotary_emb\.inv_freq$"),
        Ignored(
            r"^(model\.)?(vision_tower|multi_modal_projector)\.",
            "the vision tower was left out: the GGUF is the text model",
        ),
    ),
)
