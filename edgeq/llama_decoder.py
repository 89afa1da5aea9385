"""What contexts of one sequence and of many share: how they are made, run, read and interrupted."""

from __future__ import annotations

import ctypes
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from edgeq.errors import SessionError
from edgeq.llama_handle import Handle, buffer_bytes
from edgeq.llama_library import capture_log, check_threads, default_threads, interruptible, library
from edgeq.llama_model import Model

__all__ = ["Decoder"]

_DECODE_ABORTED = 2
# The return codes of llama_decode, from llama.h.
_DECODE_CAUSES = {1: "the KV cache has no room left", -1: "llama.cpp refused the batch", -2: "out of memory"}


class Decoder(Handle):
    """A context of llama.cpp with the arrays of its batches. Not thread-safe, except for `interrupt`.

    Attributes:
        model: what it runs.
        threads: that compute.
        buffer_bytes: ``kv``, ``compute`` and ``output`` as llama.cpp counts them (rounded to 0.01 MiB).
    """

    # What helps where a decode fails.
    _REMEDY: ClassVar[str]

    def __init__(
        self,
        model: Model,
        params: Any,  # noqa: ANN401 - a ctypes structure
        sequences: npt.NDArray[np.int32],
        *,
        what: str,
        remedy: str,
    ) -> None:
        """Allocate everything that decoding needs.

        Args:
            model: what to run.
            params: of `_parameters`.
            sequences: the sequence of each place in a batch, int32 of (most tokens of a batch,).
            what: what was asked for, as in "no context of 512 tokens".
            remedy: what helps where llama.cpp cannot make it.

        Raises:
            SessionError: too little memory, or parameters that the model cannot take.
        """
        self._lib = lib = library()
        # ggml asks "abort?" before every operation. A Python callback would take the GIL each time, so the question
        # is answered by libc: strlen of a one-character string is 1 (yes) or 0 (no), and Python only writes the byte.
        self._interrupt_flag = ctypes.create_string_buffer(2)
        params.abort_callback = ctypes.cast(ctypes.CDLL(None).strlen, lib.ggml_abort_callback)
        params.abort_callback_data = ctypes.addressof(self._interrupt_flag)
        with capture_log() as log:
            pointer = interruptible(
                lambda: lib.llama_init_from_model(model.pointer, params),
                undo=lambda made: lib.llama_free(made) if made else None,
            )
        if not pointer:
            cause = log.cause("llama.cpp gave no reason")
            raise SessionError(f"no context of {what} for {model.path.name}: {cause}", remedy)
        super().__init__(pointer, lib.llama_free, "context", owner=model)
        self.model = model
        self.threads = int(params.n_threads)
        self.buffer_bytes = buffer_bytes(log)
        self._memory = lib.llama_get_memory(pointer)
        self._n_outputs = 0
        self._make_batch(sequences)

    @staticmethod
    def _parameters(model: Model, threads: int | None) -> Any:  # noqa: ANN401 - a ctypes structure
        """llama.cpp's default parameters with a number of threads, None for `default_threads`.

        Raises:
            SessionError: the model has no weights.
            UsageError: a number of threads that llama.cpp cannot have.
        """
        if model.vocab_only:
            raise SessionError("a model loaded with vocab_only has no weights to run", "Load it without vocab_only")
        params = library().llama_context_default_params()
        params.n_threads = params.n_threads_batch = check_threads(threads or default_threads())
        params.no_perf = True
        return params

    def _make_batch(self, sequences: npt.NDArray[np.int32]) -> None:
        room = len(sequences)
        self._tokens = np.zeros(room, np.int32)
        self._positions = np.zeros(room, np.int32)
        self._outputs = np.zeros(room, np.int8)
        self._n_seq_id = np.ones(room, np.int32)
        self._sequences = np.ascontiguousarray(sequences)
        first, step = self._sequences.ctypes.data, self._sequences.itemsize
        self._seq_ids = first + step * np.arange(room, dtype=np.uintp)  # each place points to its own sequence
        int32_p = ctypes.POINTER(ctypes.c_int32)
        self._batch = self._lib.llama_batch(
            n_tokens=0,
            token=self._tokens.ctypes.data_as(int32_p),
            embd=None,
            pos=self._positions.ctypes.data_as(int32_p),
            n_seq_id=self._n_seq_id.ctypes.data_as(int32_p),
            seq_id=self._seq_ids.ctypes.data_as(ctypes.POINTER(int32_p)),
            logits=self._outputs.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )

    def _run(self, count: int, n_outputs: int) -> bool:
        """Decode what the first places of the arrays hold; False if `interrupt` stopped it."""
        self._batch.n_tokens = count
        code = self._lib.llama_decode(self.pointer, self._batch)
        if code == 0:
            self._n_outputs = n_outputs
            return True
        self._n_outputs = 0
        if code == _DECODE_ABORTED:
            return False
        cause = _DECODE_CAUSES.get(code, f"llama_decode returned {code}")
        raise SessionError(f"decoding {count} tokens failed: {cause}", self._REMEDY)

    def _output_rows(self) -> npt.NDArray[np.float32]:
        """Logits that the last batch was asked for, float32 of (rows, n_vocab): a view that the next overwrites."""
        if not self._n_outputs:
            return np.empty((0, self.model.n_vocab), np.float32)
        pointer = self._lib.llama_get_logits(self.pointer)
        if not pointer:
            raise SessionError("llama.cpp has no logits for the last batch")
        rows: npt.NDArray[np.float32] = np.ctypeslib.as_array(pointer, (self._n_outputs, self.model.n_vocab))
        return rows

    def interrupt(self) -> None:
        """Stop what is being decoded, and all that would be later, until `resume`. Any thread may call it."""
        self._interrupt_flag[0] = b"\x01"

    def resume(self) -> None:
        """Allow decoding again after `interrupt`."""
        self._interrupt_flag[0] = b"\x00"
