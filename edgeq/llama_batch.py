"""Many sequences on one model at once, one token of each a step: reading the weights once serves them all."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from edgeq.errors import SessionError, UsageError
from edgeq.llama_decoder import Decoder
from edgeq.llama_library import library
from edgeq.llama_model import Model

__all__ = ["ParallelContext"]

_MOST_SEQUENCES = 256  # LLAMA_MAX_SEQ in llama.cpp


class ParallelContext(Decoder):
    """The state of several sequences that advance together; a context manager, not thread-safe but for `interrupt`.

    Attributes:
        model: what it runs.
        n_sequences: how many there are, numbered from 0.
        sequence_tokens: the most tokens of one.
    """

    _REMEDY = "Use fewer sequences"

    def __init__(self, model: Model, *, n_sequences: int, sequence_tokens: int, threads: int | None = None) -> None:
        """Allocate everything that decoding needs.

        Args:
            model: not loaded with ``vocab_only``.
            n_sequences: 1 to 256.
            sequence_tokens: the most tokens of one.
            threads: None for `default_threads`.

        Raises:
            SessionError: too little memory.
            UsageError: a number of sequences or threads that llama.cpp cannot have.
        """
        if not 1 <= n_sequences <= _MOST_SEQUENCES:
            raise UsageError(f"{n_sequences} sequences make no sense", f"Choose from 1 to {_MOST_SEQUENCES}")
        params = self._parameters(model, threads)
        params.n_ctx, params.n_seq_max = n_sequences * sequence_tokens, n_sequences
        params.n_batch = params.n_ubatch = params.n_outputs_max = n_sequences
        params.flash_attn_type = library().LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.kv_unified = False  # each sequence attends to its own cells and skips those of all others
        super().__init__(
            model,
            params,
            np.arange(n_sequences, dtype=np.int32),
            what=f"{n_sequences} x {sequence_tokens} tokens",
            remedy="Use fewer or shorter sequences",
        )
        self.n_sequences = n_sequences
        self.sequence_tokens = sequence_tokens

    def step(
        self,
        tokens: npt.NDArray[np.integer[Any]],
        positions: npt.NDArray[np.integer[Any]],
        wanted: npt.NDArray[np.bool_],
    ) -> bool:
        """Append one token to every sequence.

        Args:
            tokens: ids, (n_sequences,).
            positions: of each in its sequence, (n_sequences,); one after the last, 0 after `forget`.
            wanted: of which sequences `logits` are to be computed, (n_sequences,).

        Returns:
            False if `interrupt` stopped it; all sequences are then undefined.

        Raises:
            SessionError: a sequence is full, or llama.cpp failed.
            UsageError: an id outside of the vocabulary.
        """
        self.model.check_token(int(tokens.min()))
        self.model.check_token(int(tokens.max()))
        if int(positions.min()) < 0 or int(positions.max()) >= self.sequence_tokens:
            raise SessionError(f"position {int(positions.max())} leaves a sequence of {self.sequence_tokens} tokens")
        self._tokens[:], self._positions[:], self._outputs[:] = tokens, positions, wanted
        return self._run(self.n_sequences, int(np.count_nonzero(wanted)))

    def logits(self) -> npt.NDArray[np.float32]:
        """Logits of the wanted sequences in their order, (n_wanted, n_vocab): a view that the next step overwrites."""
        return self._output_rows()

    def forget(self, sequence: int) -> None:
        """Empty one sequence."""
        self.check_open()
        self._lib.llama_memory_seq_rm(self._memory, sequence, -1, -1)
