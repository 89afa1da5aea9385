"""What the cost model must know of a language model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

__all__ = ["EMBEDDING", "OUTPUT", "LayerShape", "ModelShape"]

# Names of every GGUF.
EMBEDDING = "token_embd.weight"
OUTPUT = "output.weight"


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """One transformer block, as far as its KV cache goes.

    Attributes:
        key_width: key values of one token (heads times head size).
        value_width: value values of one token.
        heads: query heads.
        window: tokens that it can look back at; None for all.
    """

    key_width: int
    value_width: int
    heads: int
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
        experts_used: of each stack of matrices, how many a token goes through; None if all.
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
    experts_used: int | None = None

    def is_output(self, tensor: str) -> bool:
        """Whether that tensor turns the last hidden state into logits."""
        return tensor == (EMBEDDING if self.tied_embedding else OUTPUT)
