"""From a model's config.json alone to its shapes, without weights or a tokenizer.

The tensors are those of edgeq's own GGUF export. Families that edgeq does not convert, but whose published speeds it is
compared with, are described here by shape only; llama.cpp's loader of the family (``src/models/<arch>.cpp``) says which
tensors its GGUF has.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from edgeq.converters.gguf.architectures import ARCHITECTURES
from edgeq.converters.gguf.architectures.base import Architecture, Dims, Settings, Tensor, Value, require
from edgeq.converters.gguf.architectures.decoder import DECODER, decoder_settings, read_dims
from edgeq.converters.gguf.config import ModelConfig, config_of
from edgeq.converters.gguf.export import add_key
from edgeq.converters.gguf.header import GgufHeader, GgufTensor
from edgeq.converters.gguf.layout import expected_tensors
from edgeq.converters.gguf.shape import model_shape
from edgeq.errors import SourceError, UnsupportedModelError, require_package
from edgeq.ggml_types import ggml_type, tensor_bytes
from edgeq.profiles.llm.model_shape import OUTPUT, ModelShape
from edgeq.registry import nearest

__all__ = ["shape_of_config", "write_shape_skeleton"]

_ALIGNMENT = 32  # GGUF's default


def _gemma2_settings(config: ModelConfig, dims: Dims) -> Settings:
    """Every second layer slides, the first among them (llama.cpp's gemma2.cpp, transformers' Gemma2Config)."""
    require(config.flag("tie_word_embeddings"), "Gemma 2 with an output matrix of its own")
    settings = decoder_settings(config, dims, ("default",))
    return Settings({**settings.keys, "attention.sliding_window": config.count("sliding_window")})


_NORM = Tensor(("embd",))
_GEMMA2 = Architecture(
    names=("Gemma2ForCausalLM",),
    gguf="gemma2",
    tensors={**DECODER, "blk.{i}.post_attention_norm.weight": _NORM, "blk.{i}.post_ffw_norm.weight": _NORM},
    settings=_gemma2_settings,
    defaults={
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": True,
    },
)
_SHAPE_ONLY = dict.fromkeys(_GEMMA2.names, _GEMMA2)


@dataclasses.dataclass(frozen=True)
class _Sketch:
    """A GGUF's header in memory: everything but the vocabulary."""

    gguf: str
    keys: Mapping[str, Value]
    shapes: Mapping[str, tuple[int, ...]]  # in ggml's order


def shape_of_config(config: Mapping[str, object]) -> ModelShape:
    """The shapes that edgeq's GGUF of a model has.

    Args:
        config: the whole of a Hugging Face config.json. A quantized checkpoint's is as good as the original's.

    Returns:
        The shape with ``header_bytes`` 0, because the header holds the vocabulary.

    Raises:
        UnsupportedModelError: the architecture, or a setting of it, is none that edgeq knows the shapes of.
        SourceError: a value is missing, of the wrong type, or makes no sense with the others.
    """
    sketch = _sketch(config)
    kind = ggml_type("f16").id
    header = GgufHeader(
        path=Path("config.json"),
        metadata={
            "general.architecture": sketch.gguf,
            **{f"{sketch.gguf}.{k}": [*v] if isinstance(v, list) else v for k, v in sketch.keys.items()},
        },
        tensors={name: GgufTensor(name, shape, kind, 0) for name, shape in sketch.shapes.items()},
        end=0,
        data_offset=0,
        file_bytes=0,
    )
    return dataclasses.replace(model_shape(header), header_bytes=0)


def write_shape_skeleton(config: Mapping[str, object], out: Path) -> None:
    """A GGUF of a few kilobytes with the model's keys and tensors, no vocabulary, and a hole for F16 weights.

    llama.cpp's dry run reads it, so it tells which type a preset gives each tensor (`edgeq.converters.gguf.quantize`).

    Args:
        config: as in `shape_of_config`, whose errors this raises too.
        out: the file to write; one that exists is replaced.
    """
    require_package("gguf", "convert", "to write GGUF files")
    import gguf

    sketch = _sketch(config)
    writer = gguf.GGUFWriter(out, sketch.gguf)
    data_bytes = 0
    try:
        for key, value in sketch.keys.items():
            add_key(writer, f"{sketch.gguf}.{key}", value)
        writer.add_tokenizer_model("no_vocab")
        for name, shape in sketch.shapes.items():
            kind = "f32" if len(shape) == 1 else "f16"  # as in an export
            nbytes = tensor_bytes(kind, shape)
            raw_type = gguf.GGMLQuantizationType(ggml_type(kind).id)
            writer.add_tensor_info(name, tuple(reversed(shape)), np.dtype(np.float32), nbytes, raw_dtype=raw_type)
            data_bytes += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()
    header_bytes = -(-out.stat().st_size // _ALIGNMENT) * _ALIGNMENT
    os.truncate(out, header_bytes + data_bytes)


def _sketch(values: Mapping[str, object]) -> _Sketch:
    config = config_of(values)
    architecture = _architecture(config.architecture)
    config = config.with_defaults(architecture.defaults)
    dims = read_dims(config)
    if config.optional_count("head_dim") is None and dims.embd % dims.heads:
        raise SourceError(
            f"config.json divides hidden_size {dims.embd} among {dims.heads} heads, which leaves a rest",
            "Use the config.json that belongs to the weights",
        )
    settings = architecture.settings(config, dims)
    shapes = {name: tuple(reversed(values.shape)) for name, values in sorted(settings.extra.items())}
    for name, spec in expected_tensors(architecture, config, dims).items():
        if name != OUTPUT or not config.flag("tie_word_embeddings"):
            shapes[name] = tuple(dims.size(symbol) for symbol in reversed(spec.shape))
    return _Sketch(architecture.gguf, settings.keys, shapes)


def _architecture(name: str) -> Architecture:
    found = ARCHITECTURES.get(name) or _SHAPE_ONLY.get(name)
    if found is None:
        known = sorted({*ARCHITECTURES.names(), *_SHAPE_ONLY})
        raise UnsupportedModelError(
            f"edgeq does not know the shapes of the architecture {name}",
            f"Choose a model of {', '.join(nearest(name, known) or known)}, or give a GGUF of it",
        )
    return found
