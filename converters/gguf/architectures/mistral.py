"""Mistral 7B, Nemo and their kin: llama.cpp's Llama with a head width of its own and a sliding window in some."""

from __future__ import annotations

from edgeq.converters.gguf.architectures.base import Architecture, Dims, Settings
from edgeq.converters.gguf.architectures.decoder import ACTIVATION_SILU, decoder_settings, require_activation
from edgeq.converters.gguf.architectures.llama import LLAMA_TENSORS, ROPE_KINDS
from edgeq.converters.gguf.config import ModelConfig

__all__ = ["ARCHITECTURE"]


def _settings(config: ModelConfig, dims: Dims) -> Settings:
    require_activation(config, "hidden_act", ACTIVATION_SILU)
    return decoder_settings(config, dims, ROPE_KINDS, window=config.optional_count("sliding_window"))


ARCHITECTURE = Architecture(
    names=("MistralForCausalLM",),
    gguf="llama",
    tensors=LLAMA_TENSORS,
    settings=_settings,
    defaults={
        "hidden_act": "silu",
        "max_position_embeddings": 131_072,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "sliding_window": 4096,
    },
)
