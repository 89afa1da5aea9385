"""What all supported decoders share: gated feed-forward, RMS norms, rotated queries and keys."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from edgeq.converters.gguf.architectures.base import Dims, Settings, Tensor, Value, require
from edgeq.converters.gguf.architectures.rope import rope_settings
from edgeq.converters.gguf.config import ModelConfig, read_rope
from edgeq.errors import SourceError

__all__ = ["ACTIVATION_SILU", "DECODER", "decoder_settings", "read_dims", "require_activation"]

ACTIVATION_SILU = ("silu", "swish")
# LLAMA_MAX_LAYERS in llama-hparams.h.
_MAX_LAYERS = 512

DECODER: Mapping[str, Tensor] = {
    "token_embd.weight": Tensor(("vocab", "embd")),
    "blk.{i}.attn_norm.weight": Tensor(("embd",)),
    "blk.{i}.attn_q.weight": Tensor(("q", "embd")),
    "blk.{i}.attn_k.weight": Tensor(("kv", "embd")),
    "blk.{i}.attn_v.weight": Tensor(("kv", "embd")),
    "blk.{i}.attn_output.weight": Tensor(("embd", "q")),
    "blk.{i}.ffn_norm.weight": Tensor(("embd",)),
    "blk.{i}.ffn_gate.weight": Tensor(("ff", "embd")),
    "blk.{i}.ffn_up.weight": Tensor(("ff", "embd")),
    "blk.{i}.ffn_down.weight": Tensor(("embd", "ff")),
    "output_norm.weight": Tensor(("embd",)),
    "output.weight": Tensor(("vocab", "embd")),
}
"""The tensors of a decoder with gated feed-forward, RMS norms and separate Q, K and V."""


def read_dims(config: ModelConfig) -> Dims:
    """The sizes in config.json.

    Raises:
        SourceError: one is absent or makes no sense with the others.
        UnsupportedModelError: more layers than llama.cpp holds.
    """
    embd, heads = config.count("hidden_size"), config.count("num_attention_heads")
    kv_heads = config.optional_count("num_key_value_heads") or heads
    head = config.optional_count("head_dim") or embd // heads
    remedy = "Use the config.json that belongs to the weights"
    if heads % kv_heads:
        raise SourceError(f"{heads} attention heads cannot share {kv_heads} key and value heads", remedy)
    if head < 2 or head % 2:
        raise SourceError(f"Heads of width {head} (config.json) cannot be rotated", remedy)
    dims = Dims(
        layers=config.count("num_hidden_layers"),
        embd=embd,
        ff=config.count("intermediate_size"),
        heads=heads,
        kv_heads=kv_heads,
        head=head,
        vocab=config.count("vocab_size"),
        context=config.count("max_position_embeddings"),
    )
    require(dims.layers <= _MAX_LAYERS, f"{dims.layers} layers, more than the {_MAX_LAYERS} it holds")
    return dims


def _base_keys(config: ModelConfig, dims: Dims) -> dict[str, Value]:
    """The keys that every decoder has."""
    return {
        "vocab_size": dims.vocab,
        "context_length": dims.context,
        "embedding_length": dims.embd,
        "block_count": dims.layers,
        "feed_forward_length": dims.ff,
        "attention.head_count": dims.heads,
        "attention.head_count_kv": dims.kv_heads,
        "attention.key_length": dims.head,
        "attention.value_length": dims.head,
        "attention.layer_norm_rms_epsilon": config.number("rms_norm_eps"),
    }


def require_activation(config: ModelConfig, key: str, names: Collection[str]) -> None:
    """Refuse a feed-forward activation that llama.cpp does not use here. Raises UnsupportedModelError."""
    activation = config.text(key)
    require(activation in names, f"{key} {activation!r}")


def decoder_settings(
    config: ModelConfig,
    dims: Dims,
    rope_kinds: Collection[str],
    *,
    window: int | None = None,
    partial_rope: bool = False,
) -> Settings:
    """The keys that every decoder has, with its RoPE scaling.

    Args:
        config: the model's.
        dims: its sizes.
        rope_kinds: RoPE scalings that llama.cpp applies in this architecture.
        window: a sliding window that it does not apply. Up to there both compute the same, so the context ends there.
        partial_rope: whether it can leave a part of each head unrotated.

    Raises:
        UnsupportedModelError: llama.cpp would rotate differently.
        SourceError: a setting is absent or of the wrong type.
    """
    rope = rope_settings(read_rope(config), dims, rope_kinds, partial=partial_rope)
    keys = {**_base_keys(config, dims), **rope.keys}
    notes = rope.notes
    context = keys["context_length"]
    if window is not None and isinstance(context, int) and window < context:
        keys["context_length"] = window
        note = (
            f"context limited to the sliding window of {window} tokens (trained for {context}): "
            "beyond it llama.cpp would attend to everything in this architecture"
        )
        notes = (*notes, note)
    return Settings(keys, rope.extra, notes)
