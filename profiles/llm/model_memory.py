"""Bytes of a language model on a device.

Weights, KV cache and file are exact (true block bytes); the compute buffer is a model, whose errors are in
docs/memory.md.
"""

from __future__ import annotations

from collections.abc import Mapping

from edgeq.ggml_types import ggml_type, tensor_bytes
from edgeq.profiles.device import DeviceProfile
from edgeq.profiles.llm.model_shape import EMBEDDING, ModelShape

__all__ = [
    "compute_buffer_bytes",
    "file_bytes",
    "held_twice",
    "kv_cache_bytes",
    "vocabulary_bytes",
    "weights_bytes",
]

_PAD_CELLS = 256  # llama.cpp rounds the cells of a KV cache up to this
# Live activations of the graph for each prompt token, in multiples of the embedding's width, beside the two halves of
# the feed-forward. llama.cpp's own "compute buffer size" implies 5.7 to 9.8 over eight models, see docs/memory.md.
_ACTIVATION_WIDTHS = 8.0
# Strings, hash maps and scores that llama.cpp keeps for each token of the vocabulary; measured, docs/memory.md.
_VOCAB_BYTES_PER_TOKEN = 340
# Matrices that llama.cpp's CPU backend repacks for the vector unit (ggml-cpu/repack.cpp). A tied embedding of such a
# type is held twice: as it is for the look-up, and repacked for the output.
_REPACKED = {
    "x86_64": frozenset({"q4_0", "iq4_nl", "q4_k", "q2_k"}),
    "aarch64": frozenset({"q4_0", "iq4_nl", "q4_k", "q5_k", "q6_k", "q8_0"}),
}


def file_bytes(shape: ModelShape, types: Mapping[str, str]) -> int:
    """Exact size of the GGUF that holds these types."""
    padded = (-(-tensor_bytes(types[n], s) // shape.alignment) * shape.alignment for n, s in shape.tensors.items())
    return shape.header_bytes + sum(padded)


def weights_bytes(shape: ModelShape, types: Mapping[str, str], profile: DeviceProfile) -> int:
    """Bytes of tensor data that stay resident on that device.

    A tied embedding counts twice where the look-up and the output need it in different forms or memories.
    """
    total = sum(tensor_bytes(types[name], dims) for name, dims in shape.tensors.items())
    if held_twice(shape, EMBEDDING, types[EMBEDDING], profile):
        total += tensor_bytes(types[EMBEDDING], shape.tensors[EMBEDDING])
    return total


def held_twice(shape: ModelShape, tensor: str, type_name: str, profile: DeviceProfile) -> bool:
    """Whether a tensor of that type is in memory in two forms: a tied embedding that is repacked or on a device."""
    if tensor != EMBEDDING or not shape.tied_embedding:
        return False
    repacked = _REPACKED.get(profile.arch, frozenset().union(*_REPACKED.values()))
    return profile.accelerator != "cpu" or type_name in repacked


def kv_cache_bytes(shape: ModelShape, context_tokens: int, type_k: str, type_v: str, ubatch_tokens: int) -> int:
    """Exact size of llama.cpp's KV cache for one sequence with sliding windows honoured.

    Raises:
        UsageError: a type that is not known.
    """
    total = 0
    for layer in shape.layers:
        wanted = context_tokens if layer.window is None else min(context_tokens, layer.window + ubatch_tokens)
        cells = -(-wanted // _PAD_CELLS) * _PAD_CELLS
        keys = ggml_type(type_k).row_bytes(layer.key_width)
        values = ggml_type(type_v).row_bytes(layer.value_width)
        total += cells * (keys + values)
    return total


def compute_buffer_bytes(shape: ModelShape, context_tokens: int, ubatch_tokens: int) -> int:
    """Scratch of the graph with flash attention and logits for one token at a time."""
    widths = 2 * shape.feed_forward_width + _ACTIVATION_WIDTHS * shape.embedding_width
    activations = 4 * ubatch_tokens * widths
    mask = 2 * ubatch_tokens * (-(-context_tokens // _PAD_CELLS) * _PAD_CELLS)
    masks = mask * (2 if any(layer.window is not None for layer in shape.layers) else 1)
    logits = 4 * shape.n_vocab * 2
    return round(activations + masks + logits)


def vocabulary_bytes(shape: ModelShape) -> int:
    """What llama.cpp keeps of the vocabulary beside the model's tensors."""
    return _VOCAB_BYTES_PER_TOKEN * shape.n_vocab
