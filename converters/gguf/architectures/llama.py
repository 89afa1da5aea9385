"""Llama and its kin: SmolLM2, TinyLlama, Llama 2 and 3, in any class that calls itself Llama."""

from __future__ import annotations

from collections.abc import Mapping

from edgeq.converters.gguf.architectures.base import Architecture, Dims, Settings, Tensor
from edgeq.converters.gguf.architectures.decoder import ACTIVATION_SILU, DECODER, decoder_settings, require_activation
from edgeq.converters.gguf.config import ModelConfig

__all__ = ["ARCHITECTURE", "LLAMA_TENSORS", "ROPE_KINDS"]

ROPE_KINDS = ("default", "linear", "dynamic", "yarn", "llama3")


def _attention_bias(config: ModelConfig) -> bool:
    return config.flag("attention_bias")


def _mlp_bias(config: ModelConfig) -> bool:
    return config.flag("mlp_bias")


LLAMA_TENSORS: Mapping[str, Tensor] = {
    **DECODER,
    "blk.{i}.attn_q.weight": Tensor(("q", "embd"), interleave=True),
    "blk.{i}.attn_k.weight": Tensor(("kv", "embd"), interleave=True),
}
"""A decoder whose heads llama.cpp rotates by neighbouring pairs (``LLAMA_ROPE_TYPE_NORM``)."""


def _settings(config: ModelConfig, dims: Dims) -> Settings:
    require_activation(config, "hidden_act", ACTIVATION_SILU)
    return decoder_settings(config, dims, ROPE_KINDS)


ARCHITECTURE = Architecture(
    names=("LlamaForCausalLM", "LLaMAForCausalLM"),
    gguf="llama",
    tensors={
        **LLAMA_TENSORS,
        "blk.{i}.attn_q.bias": Tensor(("q",), when=_attention_bias, interleave=True),
        "blk.{i}.attn_k.bias": Tensor(("kv",), when=_attention_bias, interleave=True),
        "blk.{i}.attn_v.bias": Tensor(("kv",), when=_attention_bias),
        "blk.{i}.attn_output.bias": Tensor(("embd",), when=_attention_bias),
        "blk.{i}.ffn_gate.bias": Tensor(("ff",), when=_mlp_bias),
        "blk.{i}.ffn_up.bias": Tensor(("ff",), when=_mlp_bias),
        "blk.{i}.ffn_down.bias": Tensor(("embd",), when=_mlp_bias),
    },
    settings=_settings,
    defaults={
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
    },
)
