"""Many sequences on one model at once, one token of each a step: reading the weights once serves them all."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeq.errors import SessionError, UsageError
from edgeq.llama_handle import Handle
from edgeq.llama_library import capture_log, check_threads, default_threads, interruptible, library
from edgeq.llama_model import Model

__all__ = ["ParallelContext"]

_DECODE_ABORTED = 2
_MOST_SEQUENCES = 256  # LLAMA_MAX_SEQ in llama.cpp


class ParallelContext(Handle):
    """The state of several sequences that advance together; a context manager, not thread-safe but for `interrupt`.

    Attributes:
        model: what it runs.
        n_sequences: how many there are, numbered from 0.
        sequence_tokens: the most tokens of one.
    """

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
        self._lib = lib = library()
        if not 1 <= n_sequences <= _MOST_SEQUENCES:
            raise UsageError(f"{n_sequences} sequences make no sense", f"Choose from 1 to {_MOST_SEQUENCES}")
        if model.vocab_only:
            raise SessionError("a model loaded with vocab_only has no weights to run", "Load it without vocab_only")
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max = n_sequences * sequence_tokens, n_sequences
        params.n_batch = params.n_ubatch = params.n_outputs_max = n_sequences
        params.n_threads = params.n_threads_batch = check_threads(threads or default_threads())
        params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.kv_unified = False  # each sequence attends to its own cells and skips those of all others
        params.no_perf = True
        # As in `edgeq.llama_context`: libc answers whether to abort, so that no thread has to wait for the GIL.
        self._interrupt_flag = ctypes.create_string_buffer(2)
        params.abort_callback = ctypes.cast(ctypes.CDLL(None).strlen, lib.ggml_abort_callback)
        params.abort_callback_data = ctypes.addressof(self._interrupt_flag)
        with capture_log() as log:
            pointer = interruptible(
                lambda: lib.llama_init_from_model(model.pointer, params),
                undo=lambda made: lib.llama_free(made) if made else None,
            )
        if not pointer:
            raise SessionError(
                f"no context of {n_sequences} x {sequence_tokens} tokens for {model.path.name}: "
                f"{log.cause('llama.cpp gave no reason')}",
                "Use fewer or shorter sequences",
            )
        super().__init__(pointer, lib.llama_free, "context", owner=model)
        self.model = model
        self.n_sequences = n_sequences
        self.sequence_tokens = sequence_tokens
        self._memory = lib.llama_get_memory(pointer)
        self._n_outputs = 0
        self._init_batch()

    def _init_batch(self) -> None:
        room = self.n_sequences
        self._tokens = np.zeros(room, np.int32)
        self._positions = np.zeros(room, np.int32)
        self._outputs = np.zeros(room, np.int8)
        self._n_seq_id = np.ones(room, np.int32)
        self._sequences = np.arange(room, dtype=np.int32)
        addresses = self._sequences.ctypes.data + self._sequences.itemsize * np.arange(room, dtype=np.uintp)
        self._seq_ids = addresses.astype(np.uintp)
        int32_p = ctypes.POINTER(ctypes.c_int32)
        self._batch = self._lib.llama_batch(
            n_tokens=room,
            token=self._tokens.ctypes.data_as(int32_p),
            embd=None,
            pos=self._positions.ctypes.data_as(int32_p),
            n_seq_id=self._n_seq_id.ctypes.data_as(int32_p),
            seq_id=self._seq_ids.ctypes.data_as(ctypes.POINTER(int32_p)),
            logits=self._outputs.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )

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
        self._n_outputs = 0
        code = self._lib.llama_decode(self.pointer, self._batch)
        if code == _DECODE_ABORTED:
            return False
        if code != 0:
            raise SessionError(
                f"decoding {self.n_sequences} sequences failed: llama_decode returned {code}", "Use fewer sequences"
            )
        self._n_outputs = int(np.count_nonzero(wanted))
        return True

    def logits(self) -> npt.NDArray[np.float32]:
        """Logits of the wanted sequences in their order, (n_wanted, n_vocab): a view that the next step overwrites."""
        if not self._n_outputs:
            return np.empty((0, self.model.n_vocab), np.float32)
        pointer = self._lib.llama_get_logits(self.pointer)
        if not pointer:
            raise SessionError("llama.cpp has no logits for the last batch")
        rows: npt.NDArray[np.float32] = np.ctypeslib.as_array(pointer, (self._n_outputs, self.model.n_vocab))
        return rows

    def forget(self, sequence: int) -> None:
        """Empty one sequence."""
        self.check_open()
        self._lib.llama_memory_seq_rm(self._memory, sequence, -1, -1)

    def interrupt(self) -> None:
        """Stop the step that is running, and all later ones. Any thread may call it."""
        self._interrupt_flag[0] = b"\x01"
