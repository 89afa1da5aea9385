"""From a GGUF's header to what the cost model must know."""

from __future__ import annotations

from edgeq.converters.gguf.header import GgufHeader
from edgeq.errors import SourceError
from edgeq.profiles.llm.model_shape import EMBEDDING, LayerShape, ModelShape
from edgeq.types import Artifact

__all__ = ["describe_artifact", "model_shape"]

# Architectures whose sliding window llama.cpp applies, with the period of its layers: all but the last of each period
# look back at the window only (llama.cpp, load_swa_pattern).
_WINDOW_PERIOD = {"gemma2": 2, "gemma3": 6}
_MAX_LAYERS = 512  # LLAMA_MAX_LAYERS
_ALIGNMENT = 32  # the only one that llama.cpp's quantizer writes, whatever the header says


def _windows(header: GgufHeader, n_layers: int) -> list[int | None]:
    """The window of each layer, None where a layer sees everything.

    The pattern is a flag for each layer, or a period: all but the last layer of each slide, and with 0 all do.
    """
    period = _WINDOW_PERIOD.get(header.architecture)
    window = header.integer("attention.sliding_window", 0)
    if period is None or window <= 0:
        return [None] * n_layers
    pattern = header.metadata.get(f"{header.architecture}.attention.sliding_window_pattern", period)
    if isinstance(pattern, list):
        if len(pattern) < n_layers:
            raise _implausible(header, f"{len(pattern)} flags of sliding windows for {n_layers} layers")
        return [window if flag else None for flag in pattern[:n_layers]]
    if not isinstance(pattern, int) or isinstance(pattern, bool) or pattern < 0:
        raise _implausible(header, f"a sliding window pattern of {pattern!r}")
    return [window if pattern == 0 or i % pattern < pattern - 1 else None for i in range(n_layers)]


def _implausible(header: GgufHeader, what: str) -> SourceError:
    return SourceError(f"{header.path} has {what}", "Convert the model again; this GGUF is damaged")


def _n_layers(header: GgufHeader) -> int:
    """The number of blocks, before anything is made for each of them."""
    n_layers = header.integer("block_count")
    if not 1 <= n_layers <= _MAX_LAYERS:
        raise _implausible(header, f"{n_layers} layers")
    return n_layers


def model_shape(header: GgufHeader) -> ModelShape:
    """The shapes of a model, from the header of its GGUF or of a skeleton.

    Raises:
        SourceError: a hyperparameter that every language model has is missing.
    """
    n_layers = _n_layers(header)
    if header.metadata.get("general.alignment", _ALIGNMENT) != _ALIGNMENT:
        raise SourceError(
            f"{header.path} is aligned to {header.metadata['general.alignment']} bytes, llama.cpp quantizes to 32",
            "Write it again with the default alignment",
        )
    width = header.integer("embedding_length")
    heads = header.integers("attention.head_count", n_layers)
    kv_heads = header.integers("attention.head_count_kv", n_layers, heads[0])
    key_head = header.integer("attention.key_length", width // max(1, heads[0]))
    value_head = header.integer("attention.value_length", key_head)
    windows = _windows(header, n_layers)
    return ModelShape(
        tensors={name: tensor.shape for name, tensor in header.tensors.items()},
        layers=[
            LayerShape(kv * key_head, kv * value_head, n, window)
            for kv, n, window in zip(kv_heads, heads, windows, strict=True)
        ],
        key_head_width=key_head,
        value_head_width=value_head,
        embedding_width=width,
        feed_forward_width=header.integer("feed_forward_length"),
        n_vocab=_n_vocab(header),
        tied_embedding="output.weight" not in header.tensors,
        header_bytes=-(-(header.end + _added_header_bytes(header)) // _ALIGNMENT) * _ALIGNMENT,
        alignment=_ALIGNMENT,
        experts_used=header.integer("expert_used_count", 0) or None,
    )


def _n_vocab(header: GgufHeader) -> int:
    embedding = header.tensors.get(EMBEDDING)
    return embedding.shape[-1] if embedding else header.integer("vocab_size")


def _added_header_bytes(header: GgufHeader) -> int:
    """Bytes by which llama.cpp's quantizer grows the header: two keys, where the file lacks them.

    A key is its length (8 bytes), its text, the type of its value (4) and a 32-bit value (4).
    """
    keys = ("general.quantization_version", "general.file_type")
    return sum(16 + len(key) for key in keys if key not in header.metadata)


def describe_artifact(header: GgufHeader) -> Artifact:
    """What a session must know of a GGUF."""
    return Artifact(
        architecture=header.architecture,
        n_layers=_n_layers(header),
        n_vocab=_n_vocab(header),
        trained_context_tokens=header.integer("context_length"),
        has_chat_template="tokenizer.chat_template" in header.metadata,
    )
