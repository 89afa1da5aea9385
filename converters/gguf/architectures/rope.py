"""RoPE scaling as GGUF keys and tensors, so that ``ggml_rope_ext`` rotates by the same angles as transformers.

Formulas: transformers' ``modeling_rope_utils.py`` on the one side, ``rope_yarn`` in ggml's ops and
``llama_model::get_rope_factors`` on the other.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np

from edgeq.converters.gguf.architectures.base import Dims, Settings, Value, require
from edgeq.converters.gguf.config import Rope
from edgeq.errors import SourceError

__all__ = ["rope_settings", "rotated_width"]

_ORIGINAL = "original_max_position_embeddings"
# What transformers' own classes know; anything else (mrope_section, llama_4_scaling_beta …) changes the computation.
_KNOWN = {
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "factor",
    "high_freq_factor",
    "long_factor",
    "low_freq_factor",
    _ORIGINAL,
    "partial_rotary_factor",
    "short_factor",
}
# Beyond the defaults of YaRN, llama.cpp and transformers go different ways.
_YARN_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0}


def rotated_width(rope: Rope, dims: Dims) -> int:
    """How many of a head's dimensions are rotated."""
    return int(dims.head * (rope.optional("partial_rotary_factor") or 1.0))


def rope_settings(rope: Rope, dims: Dims, kinds: Collection[str], *, partial: bool = False) -> Settings:
    """Keys, tensors and notes for the RoPE of a model's full-attention layers.

    Args:
        rope: the settings in config.json.
        dims: sizes; ``context`` must be ``max_position_embeddings``.
        kinds: the scalings that llama.cpp applies in this architecture.
        partial: whether it can leave a part of each head unrotated.

    Returns:
        Settings whose keys hold ``context_length`` where scaling extends it.

    Raises:
        UnsupportedModelError: llama.cpp would rotate differently.
        SourceError: a setting is absent or of the wrong type.
    """
    require(rope.kind in kinds, f"RoPE scaling of type {rope.kind}")
    unknown = sorted(set(rope.keys()) - _KNOWN)
    require(not unknown, f"RoPE with {', '.join(unknown)}")
    width = rotated_width(rope, dims)
    require(partial or width == dims.head, f"RoPE on {width} of {dims.head} dimensions")
    keys: dict[str, Value] = {"rope.freq_base": rope.theta, "rope.dimension_count": width}
    scaling = _SCALINGS[rope.kind](rope, dims, width)
    return Settings({**keys, **scaling.keys}, scaling.extra, scaling.notes)


def _default(_rope: Rope, _dims: Dims, _width: int) -> Settings:
    return Settings({})


def _linear(rope: Rope, _dims: Dims, _width: int) -> Settings:
    return Settings({"rope.scaling.type": "linear", "rope.scaling.factor": rope.number("factor")})


def _dynamic(_rope: Rope, dims: Dims, _width: int) -> Settings:
    # transformers changes the base only beyond max_position_embeddings, where the context ends here.
    return Settings({}, notes=(f"dynamic RoPE scaling acts beyond {dims.context} tokens only: context ends there",))


def _yarn(rope: Rope, dims: Dims, _width: int) -> Settings:
    factor = rope.number("factor")
    for key, default in _YARN_DEFAULTS.items():
        require(rope.optional(key) in (None, default), f"YaRN with {key}")
    mscale = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    given = rope.optional("attention_factor")
    require(given is None or math.isclose(given, mscale, rel_tol=1e-5), "YaRN with an attention_factor of its own")
    original = _original(rope, dims)
    return Settings(
        {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": factor,
            "rope.scaling.original_context_length": original,
            "context_length": max(dims.context, int(original * factor)),
        }
    )


def _llama3(rope: Rope, dims: Dims, width: int) -> Settings:
    factor, low, high = rope.number("factor"), rope.number("low_freq_factor"), rope.number("high_freq_factor")
    require(factor > 0 and high != low, "a llama3 RoPE scaling with equal frequency factors")
    original = _original(rope, dims)
    wavelength = 2 * math.pi * rope.theta ** (np.arange(0, width, 2, dtype=np.float64) / width)
    smooth = np.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
    # ggml divides the angle by this: 1 for short waves, ``factor`` for long ones, in between the harmonic mix.
    divisor = 1.0 / ((1.0 - smooth) / factor + smooth)
    return Settings({}, {"rope_freqs.weight": divisor.astype(np.float32)})


def _longrope(rope: Rope, dims: Dims, width: int) -> Settings:
    original = _original(rope, dims)
    extra = {}
    for which in ("long", "short"):
        values = rope.numbers(f"{which}_factor")
        if len(values) != width // 2:
            raise SourceError(
                f"{which}_factor in config.json has {len(values)} numbers, not {width // 2}",
                "Use the config.json that belongs to the weights",
            )
        extra[f"rope_factors_{which}.weight"] = np.array(values, dtype=np.float32)
    scale = rope.optional("factor") or dims.context / original
    computed = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
    attention = rope.optional("attention_factor")
    note = (
        f"LongRoPE: llama.cpp takes the short factors for a context of up to {original} tokens and the long ones for "
        "any longer context, whatever the prompt's length; transformers decides by the prompt"
    )
    keys: dict[str, Value] = {
        "rope.scaling.type": "longrope",
        "rope.scaling.original_context_length": original,
        "rope.scaling.attn_factor": computed if attention is None else attention,
    }
    return Settings(keys, extra, (note,) if dims.context > original else ())


def _original(rope: Rope, dims: Dims) -> int:
    value = rope.optional(_ORIGINAL)
    if value is not None and value < 2:
        raise SourceError(f"{_ORIGINAL} in config.json is {value}", "Use the config.json that belongs to the weights")
    return dims.context if value is None else int(value)


_SCALINGS = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
}
