"""What an architecture declares: names, sizes, tensors with their shapes, hyperparameters, and what it refuses.

The tables say what llama.cpp's loader of that architecture takes (``src/models/<arch>.cpp``): a tensor that is missing,
left over or of another shape is an error before a byte is written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from edgeq.converters.gguf.config import ModelConfig
from edgeq.errors import UnsupportedModelError

__all__ = ["WAY_OUT", "Architecture", "Dims", "Floats", "Ignored", "Settings", "Tensor", "Value", "require"]

Value = int | float | bool | str | list[bool]
Floats = npt.NDArray[np.float32]

WAY_OUT = (
    "Bring an F16 GGUF of the model, or pass --llama-cpp DIR to use the convert_hf_to_gguf.py of a llama.cpp checkout"
)


@dataclasses.dataclass(frozen=True)
class Dims:
    """Sizes of a decoder.

    Attributes:
        layers: transformer blocks.
        embd: width of the residual stream.
        ff: width of the feed-forward part.
        heads: query heads.
        kv_heads: key and value heads.
        head: width of a head.
        vocab: rows of the embedding.
        context: tokens that the model was trained for.
    """

    layers: int
    embd: int
    ff: int
    heads: int
    kv_heads: int
    head: int
    vocab: int
    context: int

    def size(self, symbol: str) -> int:
        """The size that a symbol in a tensor table stands for."""
        q, kv = self.heads * self.head, self.kv_heads * self.head
        sizes = {
            "embd": self.embd,
            "ff": self.ff,
            "2ff": 2 * self.ff,
            "q": q,
            "kv": kv,
            "qkv": q + 2 * kv,
            "head": self.head,
            "vocab": self.vocab,
        }
        return sizes[symbol]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One row of a tensor table.

    Attributes:
        shape: symbols of `Dims.size`, in the checkpoint's order (rows first).
        when: whether a model with this config has the tensor.
        interleave: pair the two halves of each head's rows, because the architecture rotates neighbours
            (``LLAMA_ROPE_TYPE_NORM``) where transformers rotates halves.
        add: is added to every weight; only for tensors that are stored as f32.
    """

    shape: tuple[str, ...]
    when: Callable[[ModelConfig], bool] = lambda _: True
    interleave: bool = False
    add: float = 0.0


@dataclasses.dataclass(frozen=True)
class Ignored:
    """Tensors of the checkpoint that a GGUF does not need.

    Attributes:
        pattern: regular expression, searched in the tensor's name.
        note: what a user must know, or None if nothing is lost.
    """

    pattern: str
    note: str | None = None


@dataclasses.dataclass(frozen=True)
class Settings:
    """What an architecture makes of one config.

    Attributes:
        keys: GGUF keys without the architecture's prefix.
        extra: tensors that are computed, not read: GGUF name to f32 values.
        notes: what a user must know, one line each.
    """

    keys: Mapping[str, Value]
    extra: Mapping[str, Floats] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One family of models.

    Attributes:
        names: as ``architectures`` in config.json has them.
        gguf: as ``general.architecture`` has it.
        tensors: GGUF name, with ``{i}`` for the block, to what it must be.
        settings: hyperparameters; raises UnsupportedModelError for what llama.cpp would compute differently.
        defaults: what the class in transformers assumes for keys that are absent.
        prefixes: beginnings of tensor names to replace, the first match only.
        ignored: tensors to leave out.
    """

    names: tuple[str, ...]
    gguf: str
    tensors: Mapping[str, Tensor]
    settings: Callable[[ModelConfig, Dims], Settings]
    defaults: Mapping[str, object] = dataclasses.field(default_factory=dict)
    prefixes: tuple[tuple[str, str], ...] = ()
    ignored: tuple[Ignored, ...] = (Ignored(r"\.rotary_emb\.inv_freq$"),)


def require(condition: bool, what: str) -> None:
    """Refuse a setting that llama.cpp would compute differently.

    Raises:
        UnsupportedModelError: the condition is false.
    """
    if not condition:
        raise UnsupportedModelError(f"llama.cpp does not compute this model as transformers does: {what}", WAY_OUT)
