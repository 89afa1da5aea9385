"""Phi-3, Phi-3.5 and Phi-4 (mini, medium): packed projections, LongRoPE, partly rotated heads."""

from __future__ import annotations

from edgeq.converters.gguf.architectures.base import Architecture, Dims, Settings, Tensor, require
from edgeq.converters.gguf.architectures.decoder import (
    ACTIVATION_SILU,
    decoder_settings,
    require_activation,
)
from edgeq.converters.gguf.config import ModelConfig

__all__ = ["ARCHITECTURE"]

_ROPE_KINDS = ("default", "longrope")


def _settings(config: ModelConfig, dims: Dims) -> Settings:
    require_activation(config, "hidden_act", ACTIVATION_SILU)
    require(dims.heads * dims.head == dims.embd, f"Phi-3 with heads of width {dims.head}")
    for flag in ("attention_bias", "mlp_bias", "lm_head_bias"):
        require(not config.flag(flag), f"Phi-3 with {flag}")
    # llama.cpp switches the window off when it loads this architecture.
    window = config.optional_count("sliding_window")
    return decoder_settings(config, dims, _ROPE_KINDS, window=window, partial_rope=True)


ARCHITECTURE = Architecture(
    names=("Phi3ForCausalLM",),
    gguf="phi3",
    tensors={
        "token_embd.weight": Tensor(("vocab", "embd")),
        "blk.{i}.attn_norm.weight": Tensor(("embd",)),
        "blk.{i}.attn_qkv.weight": Tensor(("qkv", "embd")),
        "blk.{i}.attn_output.weight": Tensor(("embd", "q")),
        "blk.{i}.ffn_norm.weight": Tensor(("embd",)),
        "blk.{i}.ffn_up.weight": Tensor(("2ff", "embd")),
        "blk.{i}.ffn_down.weight": Tensor(("embd", "ff")),
        "output_norm.weight": Tensor(("embd",)),
        "output.weight": Tensor(("vocab", "embd")),
    },
    settings=_settings,
    defaults={
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
    },
)
