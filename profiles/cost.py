"""From a plan's choices to bytes and milliseconds.

Weights, KV cache and file are exact (true block bytes); compute buffers, process baseline and times are models, whose
constants and errors are in docs/memory.md. Nothing here reads a file or loads a library.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from edgeq.ggml_types import ggml_type, tensor_bytes
from edgeq.types import DeviceProfile, Prediction

__all__ = [
    "EMBEDDING",
    "LayerShape",
    "ModelShape",
    "compute_buffer_bytes",
    "file_bytes",
    "held_twice",
    "kv_cache_bytes",
    "predict",
    "prefill_ms",
    "weights_bytes",
]

EMBEDDING = "token_embd.weight"  # the token embedding's name in every GGUF

_PAD_CELLS = 256  # llama.cpp rounds the cells of a KV cache up to this
# Live activations of the graph for each prompt token, in multiples of the embedding's width, beside the two halves of
# the feed-forward. llama.cpp's own "compute buffer size" implies 5.7 to 9.8 over eight models, see docs/memory.md.
_ACTIVATION_WIDTHS = 8.0
# Strings, hash maps and scores that llama.cpp keeps for each token of the vocabulary; measured, docs/memory.md.
_VOCAB_BYTES_PER_TOKEN = 420
# Matrices that llama.cpp's CPU backend repacks for the vector unit (ggml-cpu/repack.cpp). A tied embedding of such a
# type is held twice: as it is for the look-up, and repacked for the output.
_REPACKED = {
    "x86_64": frozenset({"q4_0", "iq4_nl", "q4_k", "q2_k"}),
    "aarch64": frozenset({"q4_0", "iq4_nl", "q4_k", "q5_k", "q6_k", "q8_0"}),
}


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """One transformer block, as far as its KV cache goes.

    Attributes:
        key_width: key values of one token (heads times head size).
        value_width: value values of one token.
        window: tokens that it can look back at; None for all.
    """

    key_width: int
    value_width: int
    window: int | None = None


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """What the cost model must know of a model.

    Attributes:
        tensors: name to shape in ggml's order, row length first.
        layers: every block with a KV cache.
        key_head_width: key values of one head; a quantized KV cache needs a multiple of its block.
        value_head_width: value values of one head.
        embedding_width: ``n_embd``.
        feed_forward_width: of the widest block.
        n_vocab: rows of the output matrix.
        tied_embedding: the output matrix is the token embedding.
        header_bytes: of the GGUF, up to the tensor data.
        alignment: tensor data is padded to it.
    """

    tensors: Mapping[str, tuple[int, ...]]
    layers: Sequence[LayerShape]
    key_head_width: int
    value_head_width: int
    embedding_width: int
    feed_forward_width: int
    n_vocab: int
    tied_embedding: bool
    header_bytes: int
    alignment: int = 32


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


def prefill_ms(shape: ModelShape, profile: DeviceProfile, prompt_tokens: int) -> float:
    """Arithmetic of a prompt, two operations for each weight and token, whatever the weights' types."""
    multiplied = sum(math.prod(s) for n, s in shape.tensors.items() if len(s) > 1 and n != EMBEDDING)
    return 1e3 * 2 * multiplied * prompt_tokens / profile.backend.compute_flops_per_s


def predict(
    shape: ModelShape,
    types: Mapping[str, str],
    profile: DeviceProfile,
    *,
    context_tokens: int,
    kv_types: tuple[str, str],
    ubatch_tokens: int,
    prompt_tokens: int,
    matrices_ms: float | None = None,
) -> Prediction:
    """Predict memory and latency of a model with these types on a device.

    Args:
        shape: the model.
        types: of every tensor in ``shape.tensors``.
        profile: the device; its first backend is used.
        context_tokens: cells of the KV cache.
        kv_types: of keys and values.
        ubatch_tokens: prompt tokens computed at once.
        prompt_tokens: the prompt that the time to first token is for.
        matrices_ms: time of all matrices of a decoded token where it was measured; None for their bytes over the
            profile's bandwidth.

    Decoding reads every weight but the rows of the embedding that are not looked up, and the whole KV cache, at the
    profile's effective bandwidth: the slowest token of a session, not the first. The first token takes `prefill_ms`,
    or a token's time if that is more, and a token's time.
    """
    backend = profile.backend
    weights = weights_bytes(shape, types, profile)
    kv_cache = kv_cache_bytes(shape, context_tokens, *kv_types, ubatch_tokens)
    compute = compute_buffer_bytes(shape, context_tokens, ubatch_tokens)
    runtime = backend.runtime_bytes + backend.device_overhead_bytes + _VOCAB_BYTES_PER_TOKEN * shape.n_vocab
    read = sum(tensor_bytes(types[n], s) for n, s in shape.tensors.items() if n != EMBEDDING or shape.tied_embedding)
    bandwidth = profile.memory.bandwidth_bytes_per_s * backend.decode_efficiency
    if matrices_ms is None:
        matrices_ms = 1e3 * read / bandwidth
    itl_ms = backend.token_overhead_ms + matrices_ms + 1e3 * kv_cache / bandwidth
    return Prediction(
        file_bytes=file_bytes(shape, types),
        weights_bytes=weights,
        kv_cache_bytes=kv_cache,
        compute_bytes=compute,
        runtime_bytes=runtime,
        peak_memory_bytes=weights + kv_cache + compute + runtime,
        itl_ms=itl_ms,
        tokens_per_s=1e3 / itl_ms,
        ttft_ms=max(prefill_ms(shape, profile, prompt_tokens), itl_ms) + itl_ms,
        prompt_tokens=prompt_tokens,
    )
