"""From a plan's choices to bytes and milliseconds. Nothing here reads a file or loads a library."""

from __future__ import annotations

from collections.abc import Mapping

from edgeq.profiles.device import DeviceProfile
from edgeq.profiles.llm.model_latency import Speeds, decode_ms, speeds_of, ttft_ms
from edgeq.profiles.llm.model_memory import (
    compute_buffer_bytes,
    file_bytes,
    kv_cache_bytes,
    vocabulary_bytes,
    weights_bytes,
)
from edgeq.profiles.llm.model_shape import ModelShape
from edgeq.types import Prediction

__all__ = ["predict"]


def predict(
    shape: ModelShape,
    types: Mapping[str, str],
    profile: DeviceProfile,
    *,
    context_tokens: int,
    kv_types: tuple[str, str],
    ubatch_tokens: int,
    prompt_tokens: int,
    speeds: Speeds | None = None,
) -> Prediction:
    """Predict memory and latency of a model with these types on a device.

    Args:
        shape: the model.
        types: of every tensor in ``shape.tensors``.
        profile: the device; its first backend for language models is used.
        context_tokens: cells of the KV cache.
        kv_types: of keys and values.
        ubatch_tokens: prompt tokens computed at once.
        prompt_tokens: the prompt that the time to first token is for.
        speeds: what times are predicted from; None for what the profile says.

    Time between tokens is that of a full context: the slowest token of a session, not the first.
    """
    backend = profile.backend
    speeds = speeds_of(profile) if speeds is None else speeds
    weights = weights_bytes(shape, types, profile)
    kv_cache = kv_cache_bytes(shape, context_tokens, *kv_types, ubatch_tokens)
    compute = compute_buffer_bytes(shape, context_tokens, ubatch_tokens)
    runtime = (backend.runtime_bytes or 0) + backend.device_overhead_bytes + vocabulary_bytes(shape)
    itl_ms = decode_ms(shape, types, speeds, kv_types=kv_types, cached_tokens=context_tokens)
    return Prediction(
        file_bytes=file_bytes(shape, types),
        weights_bytes=weights,
        kv_cache_bytes=kv_cache,
        compute_bytes=compute,
        runtime_bytes=runtime,
        peak_memory_bytes=weights + kv_cache + compute + runtime,
        itl_ms=itl_ms,
        tokens_per_s=1e3 / itl_ms,
        ttft_ms=ttft_ms(
            shape, types, speeds, kv_types=kv_types, prompt_tokens=prompt_tokens, ubatch_tokens=ubatch_tokens
        ),
        prompt_tokens=prompt_tokens,
    )
