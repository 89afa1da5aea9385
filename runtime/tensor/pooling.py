"""From the hidden states of tokens to one vector a text, as sentence-transformers does it."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

__all__ = ["Pooling", "normalized", "pool"]

Pooling = Literal["mean", "cls", "max", "last"]
Vectors = npt.NDArray[np.float32]

_LEAST_LENGTH = 1e-12  # torch.nn.functional.normalize


def pool(hidden: Vectors, mask: npt.NDArray[np.int64], pooling: Pooling) -> Vectors:
    """One vector a text.

    Args:
        hidden: states of the tokens, float32 of (texts, tokens, width).
        mask: 1 for tokens that count, (texts, tokens); each text has at least one.
        pooling: the mean or the largest value over these tokens, or the first (``"cls"``) or last of them.

    Returns:
        float32 of (texts, width).
    """
    vectors: Vectors
    if pooling in {"cls", "last"}:
        tokens = mask.shape[1]
        places = mask.argmax(axis=1) if pooling == "cls" else tokens - 1 - mask[:, ::-1].argmax(axis=1)
        vectors = hidden[np.arange(len(hidden)), places]
    elif pooling == "max":
        vectors = np.where(mask[..., None] != 0, hidden, np.float32(-np.inf)).max(axis=1)
    else:
        kept = mask.astype(np.float32)
        # As a product of (1, tokens) with (tokens, width): hidden * mask would take a copy of all states.
        vectors = np.matmul(kept[:, None, :], hidden)[:, 0] / kept.sum(axis=1, keepdims=True)
    return vectors


def normalized(vectors: Vectors) -> Vectors:
    """Each row divided by its length; rows of zeros stay."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    result: Vectors = vectors / np.maximum(lengths, np.float32(_LEAST_LENGTH))
    return result
