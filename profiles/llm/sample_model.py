"""A language model of random weights, made where the probe runs: what llama.cpp does beside matrices needs no training.

A llama in llama.cpp's sense (RMS norms, rotary embeddings, gated feed-forward, grouped-query attention) with a byte
vocabulary, written without any library that a robot does not have.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from edgeq.ggml_types import ggml_type, tensor_bytes
from edgeq.gguf_bytes import ALIGNMENT, Value, encode_header, encode_tensor_info
from edgeq.profiles.kernels.sample_weights import sample_blocks
from edgeq.profiles.llm.model_shape import EMBEDDING, LayerShape, ModelShape

__all__ = ["SampleModel", "sample_types", "write_sample_model"]

_BYTES = 256
_NORMAL, _CONTROL = 1, 3  # enum llama_token_type


@dataclasses.dataclass(frozen=True)
class SampleModel:
    """Hyperparameters.

    Attributes:
        layers: transformer blocks.
        width: of the embedding, heads times head size.
        feed_forward: width between the halves of a block.
        heads: query heads.
        kv_heads: key and value heads.
        vocabulary: tokens, at least 258.
        context_tokens: that it says it was trained for.
        type: of all matrices.
    """

    layers: int
    width: int
    feed_forward: int
    heads: int
    kv_heads: int
    vocabulary: int = 512
    context_tokens: int = 4096
    type: str = "q8_0"

    @property
    def head_width(self) -> int:
        """Values of one head."""
        return self.width // self.heads

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes, row length first; the embedding is tied."""
        kv = self.kv_heads * self.head_width
        block = {
            "attn_norm": (self.width,),
            "attn_q": (self.width, self.width),
            "attn_k": (self.width, kv),
            "attn_v": (self.width, kv),
            "attn_output": (self.width, self.width),
            "ffn_norm": (self.width,),
            "ffn_gate": (self.width, self.feed_forward),
            "ffn_up": (self.width, self.feed_forward),
            "ffn_down": (self.feed_forward, self.width),
        }
        result: dict[str, tuple[int, ...]] = {EMBEDDING: (self.width, self.vocabulary)}
        for index in range(self.layers):
            result |= {f"blk.{index}.{name}.weight": shape for name, shape in block.items()}
        return {**result, "output_norm.weight": (self.width,)}

    def shape(self) -> ModelShape:
        """What the cost model knows of it; the header's size is left out."""
        kv = self.kv_heads * self.head_width
        return ModelShape(
            tensors=self.tensors(),
            layers=[LayerShape(kv, kv, self.heads)] * self.layers,
            key_head_width=self.head_width,
            value_head_width=self.head_width,
            embedding_width=self.width,
            feed_forward_width=self.feed_forward,
            n_vocab=self.vocabulary,
            tied_embedding=True,
            header_bytes=0,
        )


def sample_types(model: SampleModel) -> dict[str, str]:
    """Type of every tensor."""
    return {name: model.type if len(shape) > 1 else "f32" for name, shape in model.tensors().items()}


def write_sample_model(model: SampleModel, path: Path) -> None:
    """Write the model as a GGUF that llama.cpp loads.

    Raises:
        OSError: the disk is full or the folder is not there.
    """
    types = sample_types(model)
    infos, offset = [], 0
    for name, shape in model.tensors().items():
        infos.append(encode_tensor_info(name, shape, ggml_type(types[name]).id, offset))
        size = tensor_bytes(types[name], shape)
        offset += size + -size % ALIGNMENT
    with path.open("wb") as file:
        file.write(encode_header(_metadata(model), infos))
        for name, shape in model.tensors().items():
            data = _data(types[name], shape)
            file.write(data + bytes(-len(data) % ALIGNMENT))


def _data(type_name: str, shape: tuple[int, ...]) -> bytes:
    if len(shape) == 1:
        return np.ones(shape, np.float32).tobytes()
    return np.resize(sample_blocks(ggml_type(type_name), shape[0]), tensor_bytes(type_name, shape)).tobytes()


def _metadata(model: SampleModel) -> dict[str, Value]:
    numbers = {
        "block_count": model.layers,
        "context_length": model.context_tokens,
        "embedding_length": model.width,
        "feed_forward_length": model.feed_forward,
        "attention.head_count": model.heads,
        "attention.head_count_kv": model.kv_heads,
        "rope.dimension_count": model.head_width,
    }
    controls = range(_BYTES, model.vocabulary)
    return {
        "general.architecture": "llama",
        "general.name": "edgeq sample",
        **{f"llama.{key}": value for key, value in numbers.items()},
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [*_byte_tokens(), *(f"<|{index}|>" for index in controls)],
        "tokenizer.ggml.token_type": [_NORMAL] * _BYTES + [_CONTROL] * len(controls),
        "tokenizer.ggml.merges": ["t h"],
        "tokenizer.ggml.bos_token_id": _BYTES,
        "tokenizer.ggml.eos_token_id": _BYTES + 1,
    }


def _byte_tokens() -> list[str]:
    """Every byte as the printable character that GPT-2's vocabulary has for it (OpenAI's ``bytes_to_unicode``)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(_BYTES) if byte not in printable]
    moved = {byte: chr(_BYTES + index) for index, byte in enumerate(others)}
    return [moved.get(byte, chr(byte)) for byte in range(_BYTES)]
