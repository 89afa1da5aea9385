"""What a text encoder is there for: one vector a text, made of the hidden states that its graph gives."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from edgeq.errors import ConversionError
from edgeq.runtime.tensor.pooling import normalized, pool
from edgeq.tensor_types import Embedding

__all__ = ["sentence_vectors"]

Arrays = Mapping[str, npt.NDArray[np.generic]]

_HIDDEN, _MASK = "last_hidden_state", "attention_mask"
_RANK = 3  # (texts, tokens, width)


def sentence_vectors(inputs: Arrays, outputs: Arrays, embedding: Embedding) -> npt.NDArray[np.float32]:
    """The vectors of one call, as `edgeq.runtime.tensor.embedding.EmbeddingSession` makes them, but always of length 1.

    Args:
        inputs: of the call; without an ``attention_mask`` all tokens count, and texts without a token are left out.
        outputs: of the graph, with hidden states of (texts, tokens, width).
        embedding: how these become vectors.

    Returns:
        float32 of (texts, width).

    Raises:
        ConversionError: no output has hidden states.
    """
    hidden = _hidden_states(outputs)
    mask = inputs.get(_MASK, np.ones(hidden.shape[:2], np.int64)).astype(np.int64)
    kept = mask.any(axis=1)
    return normalized(pool(hidden[kept], mask[kept], embedding.pooling))


def _hidden_states(outputs: Arrays) -> npt.NDArray[np.float32]:
    for _, array in sorted(outputs.items(), key=lambda entry: entry[0] != _HIDDEN):
        if array.ndim == _RANK:
            return array.astype(np.float32)
    raise ConversionError(
        f"None of the outputs {', '.join(outputs)} holds hidden states of (texts, tokens, width)",
        "Export the model for feature-extraction",
    )
