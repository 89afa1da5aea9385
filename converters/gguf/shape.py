"""From a GGUF's header to what the cost model must know."""

from __future__ import annotations

from edgeq.converters.gguf.header import GgufHeader
from edgeq.profiles.cost import EMBEDDING, LayerShape, ModelShape
from edgeq.types import Artifact

__all__ = ["describe_artifact", "model_shape"]

# Architectures whose sliding window llama.cpp applies, with the period of its layers: all but the last of each period
# look back at the window only (llama.cpp, load_swa_pattern).
_WINDOW_PERIOD = {"gemma3": 6}


def _windows(header: GgufHeader, n_layers: int) -> list[int | None]:
    """The window of each layer, None where a layer sees everything."""
    period = _WINDOW_PERIOD.get(header.architecture)
    window = header.integer("attention.sliding_window", 0)
    if period is None or window <= 0:
        return [None] * n_layers
    pattern = header.metadata.get(f"{header.architecture}.attention.sliding_window_pattern")
    if isinstance(pattern, list):
        return [window if flag else None for flag in pattern[:n_layers]]
    if isinstance(pattern, int) and not isinstance(pattern, bool):
        period = pattern
    return [window if i % period < period - 1 else None for i in range(n_layers)]


def model_shape(header: GgufHeader) -> ModelShape:
    """The shapes of a model, from the header of its GGUF or of a skeleton.

    Raises:
        SourceError: a hyperparameter that every language model has is missing.
    """
    n_layers = header.integer("block_count")
    width = header.integer("embedding_length")
    heads = header.integers("attention.head_count", n_layers)
    kv_heads = header.integers("attention.head_count_kv", n_layers, heads[0])
    key_head = header.integer("attention.key_length", width // max(1, heads[0]))
    value_head = header.integer("attention.value_length", key_head)
    windows = _windows(header, n_layers)
    alignment = header.metadata.get("general.alignment", 32)
    return ModelShape(
        tensors={name: tensor.shape for name, tensor in header.tensors.items()},
        layers=[LayerShape(n * key_head, n * value_head, w) for n, w in zip(kv_heads, windows, strict=True)],
        key_head_width=key_head,
        value_head_width=value_head,
        embedding_width=width,
        feed_forward_width=header.integer("feed_forward_length"),
        n_vocab=_n_vocab(header),
        tied_embedding="output.weight" not in header.tensors,
        header_bytes=header.data_offset + _added_header_bytes(header),
        alignment=alignment if isinstance(alignment, int) else 32,
    )


def _n_vocab(header: GgufHeader) -> int:
    embedding = header.tensors.get(EMBEDDING)
    return embedding.shape[-1] if embedding else header.integer("vocab_size")


def _added_header_bytes(header: GgufHeader) -> int:
    """Bytes by which llama.cpp's quantizer grows the header: two keys, where the file lacks them.

    A key is its length (8 bytes), its text, the type of its value (4) and a 32-bit value (4). The sum is rounded up to
    the alignment together with the header, which is a multiple of it already.
    """
    keys = ("general.quantization_version", "general.file_type")
    grown = sum(16 + len(key) for key in keys if key not in header.metadata)
    return -(-grown // 32) * 32


def describe_artifact(header: GgufHeader) -> Artifact:
    """What a session must know of a GGUF."""
    return Artifact(
        architecture=header.architecture,
        n_layers=header.integer("block_count"),
        n_vocab=_n_vocab(header),
        trained_context_tokens=header.integer("context_length"),
        has_chat_template="tokenizer.chat_template" in header.metadata,
    )
