"""Vectors of texts from an encoder in a GGUF: several texts at once, pooled by llama.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from edgeq.errors import SessionError, UsageError
from edgeq.llama_decoder import Decoder
from edgeq.llama_library import library
from edgeq.llama_model import Model

__all__ = ["EmbeddingContext", "Pooling"]

Pooling = Literal["mean", "cls", "last"]

_MOST_SEQUENCES = 64
# enum llama_pooling_type of llama.h
_POOLING_IDS: dict[Pooling | None, int] = {None: -1, "mean": 1, "cls": 2, "last": 3}
_POOLING_NAMES: dict[int, Pooling] = {1: "mean", 2: "cls", 3: "last"}


class EmbeddingContext(Decoder):
    """Computes vectors of texts; a context manager, not thread-safe but for `interrupt`.

    Attributes:
        model: what it runs.
        pooling: how states of tokens become one vector.
        dimensions: of a vector.
        batch_tokens: the most tokens of one `embed`.
        longest_tokens: the most of one text.
        most_texts: the most texts of one `embed`.
    """

    _REMEDY = "Use smaller batches"

    def __init__(
        self, model: Model, *, batch_tokens: int = 512, threads: int | None = None, pooling: Pooling | None = None
    ) -> None:
        """Allocate everything that encoding needs.

        Args:
            model: not loaded with ``vocab_only``.
            batch_tokens: the most tokens of one `embed`; no text can be longer, nor than the model was trained for.
            threads: None for `default_threads`.
            pooling: None for what the GGUF says.

        Raises:
            SessionError: too little memory, or a GGUF that says nothing of pooling, if nothing is given either.
            UsageError: numbers of tokens or threads that make no sense.
        """
        if batch_tokens < 1:
            raise UsageError(f"{batch_tokens} tokens make no sense", "Choose at least 1")
        lib, params = library(), self._parameters(model, threads)
        params.embeddings, params.pooling_type = True, _POOLING_IDS[pooling]
        # Without a cache, or with one for each text: whichever the model has, all tokens are computed in one go.
        params.n_seq_max = min(_MOST_SEQUENCES, batch_tokens)
        params.n_ctx = params.n_seq_max * min(batch_tokens, model.n_ctx_train)
        params.n_batch = params.n_ubatch = params.n_outputs_max = batch_tokens
        params.kv_unified = False
        super().__init__(
            model,
            params,
            np.zeros(batch_tokens, np.int32),
            what=f"{batch_tokens} tokens",
            remedy="Use smaller batches",
        )
        found = _POOLING_NAMES.get(int(lib.llama_pooling_type(self.pointer)))
        if found is None:
            self.close()
            raise SessionError(
                f"{model.path.name} does not say how a text becomes one vector", "Say it with pooling='mean' or 'last'"
            )
        self.pooling: Pooling = found
        self.batch_tokens = batch_tokens
        self.longest_tokens = min(batch_tokens, model.n_ctx_train)
        self.most_texts = int(params.n_seq_max)
        self.dimensions = int(lib.llama_model_n_embd_out(model.pointer))

    def embed(self, texts: Sequence[Sequence[int]]) -> npt.NDArray[np.float32]:
        """One vector a text, not normalized.

        Args:
            texts: token ids of each; at most ``most_texts`` of at most ``longest_tokens``, ``batch_tokens`` in all.

        Returns:
            float32 of (texts, dimensions).

        Raises:
            SessionError: llama.cpp failed.
            UsageError: an id outside of the vocabulary.
        """
        lengths = [len(ids) for ids in texts]
        total = sum(lengths)
        if not 0 < len(texts) <= self.most_texts or total > self.batch_tokens or not min(lengths) > 0:
            message = f"{len(texts)} texts of {total} tokens in a batch of {self.batch_tokens}"
            raise ValueError(message)
        if max(lengths) > self.longest_tokens:  # beyond its positions llama.cpp would end the process
            raise SessionError(f"a text has {max(lengths)} tokens, and the model takes {self.longest_tokens}")
        ids = np.concatenate([np.asarray(text, np.int32) for text in texts])
        self.model.check_token(int(ids.min()))
        self.model.check_token(int(ids.max()))
        if self._memory:
            self._lib.llama_memory_clear(self._memory, False)
        self._tokens[:total] = ids
        self._positions[:total] = np.concatenate([np.arange(length) for length in lengths])
        self._sequences[:total] = np.repeat(np.arange(len(texts)), lengths)
        self._outputs[:total] = 1
        if not self._run(total, total):
            raise SessionError("embedding was interrupted")
        return np.stack([self._vector(index) for index in range(len(texts))])

    def _vector(self, sequence: int) -> npt.NDArray[np.float32]:
        pointer = self._lib.llama_get_embeddings_seq(self.pointer, sequence)
        if not pointer:
            raise SessionError("llama.cpp gave no vector for a text")
        view: npt.NDArray[np.float32] = np.ctypeslib.as_array(pointer, (self.dimensions,))
        return view
