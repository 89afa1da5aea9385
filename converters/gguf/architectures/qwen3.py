"""Qwen3, dense: norms on queries and keys, a head width of its own."""

from __future__ import annotations

from edgeq.converters.gguf.architectures.base import Architecture, Dims, Settings, Tensor, require
from edgeq.converters.gguf.architectures.decoder import (
    ACTIVATION_SILU,
    DECODER,
    decoder_settings,
    require_activation,
)
from edgeq.converters.gguf.architectures.qwen2 import QWEN_ROPE_KINDS, qwen_window
from edgeq.converters.gguf.config import ModelConfig

__all__ = ["ARCHITECTURE"]


def _settings(config: ModelConfig, dims: Dims) -> Settings:
    require_activation(config, "hidden_act", ACTIVATION_SILU)
    require(not config.flag("attention_bias"), "Qwen3 with attention_bias")
    return decoder_settings(config, dims, QWEN_ROPE_KINDS, window=qwen_window(config, dims))


ARCHITECTURE = Architecture(
    names=("Qwen3ForCausalLM",),
    gguf="qwen3",
    tensors={
        **DECODER,
        "blk.{i}.attn_q_norm.weight": Tensor(("head",)),
        "blk.{i}.attn_k_norm.weight": Tensor(("head",)),
    },
    settings=_settings,
    defaults={
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 32_768,
        "max_window_layers": 28,
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "sliding_window": 4096,
    },
)
