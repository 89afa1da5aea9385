"""Qwen2 and Qwen2.5: biases on queries, keys and values."""

from __future__ import annotations

from edgeq.converters.gguf.architectures.base import Architecture, Dims, Settings, Tensor, require
from edgeq.converters.gguf.architectures.decoder import (
    ACTIVATION_SILU,
    DECODER,
    decoder_settings,
    require_activation,
)
from edgeq.converters.gguf.config import ModelConfig

__all__ = ["ARCHITECTURE", "QWEN_ROPE_KINDS", "qwen_window"]

QWEN_ROPE_KINDS = ("default", "linear", "dynamic", "yarn")


def qwen_window(config: ModelConfig, dims: Dims) -> int | None:
    """The sliding window that some layers of the model use, or None."""
    kinds = config.strings("layer_types")
    if not config.flag("use_sliding_window"):
        return None
    sliding = config.count("max_window_layers") < dims.layers if kinds is None else "sliding_attention" in kinds
    return config.optional_count("sliding_window") if sliding else None


def _settings(config: ModelConfig, dims: Dims) -> Settings:
    require_activation(config, "hidden_act", ACTIVATION_SILU)
    require(dims.heads * dims.head == dims.embd, f"Qwen2 with heads of width {dims.head}")
    return decoder_settings(config, dims, QWEN_ROPE_KINDS, window=qwen_window(config, dims))


ARCHITECTURE = Architecture(
    names=("Qwen2ForCausalLM",),
    gguf="qwen2",
    tensors={
        **DECODER,
        "blk.{i}.attn_q.bias": Tensor(("q",)),
        "blk.{i}.attn_k.bias": Tensor(("kv",)),
        "blk.{i}.attn_v.bias": Tensor(("kv",)),
    },
    settings=_settings,
    defaults={
        "hidden_act": "silu",
        "max_position_embeddings": 32_768,
        "max_window_layers": 28,
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "sliding_window": 4096,
    },
)
