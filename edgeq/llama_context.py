"""One sequence on a model: KV cache, compute buffers, decoding."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from edgeq.errors import SessionError, UsageError
from edgeq.ggml_types import ggml_type
from edgeq.llama_decoder import Decoder
from edgeq.llama_library import library
from edgeq.llama_model import Model

__all__ = ["KV_TYPES", "Context"]

# Types that the attention kernels of llama.cpp read a cache in.
KV_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")


class Context(Decoder):
    """The state of one sequence on a model: KV cache, compute buffers, and the logits of the last batch.

    Not thread-safe, except for `interrupt`. A context manager; the model must stay open for as long.

    Attributes:
        model: what it runs.
        n_ctx: tokens that fit; llama.cpp rounds the request up to a multiple of 256.
        batch_tokens: the most tokens of one `decode`.
        threads: that compute.
        buffer_bytes: ``kv``, ``compute`` and ``output`` as llama.cpp counts them (rounded to 0.01 MiB).
    """

    _REMEDY = "Use a smaller context or free memory"

    def __init__(  # noqa: PLR0913 - the parameters that llama.cpp has
        self,
        model: Model,
        *,
        context_tokens: int,
        batch_tokens: int = 512,
        ubatch_tokens: int = 512,
        threads: int | None = None,
        type_k: str = "f16",
        type_v: str = "f16",
        flash_attention: bool = True,
        max_outputs: int = 1,
        eval_callback: Callable[[int, bool, int | None], bool] | None = None,
    ) -> None:
        """Allocate everything that decoding needs.

        Args:
            model: not loaded with ``vocab_only``.
            context_tokens: of prompt and answer together.
            batch_tokens: the most tokens of one `decode`.
            ubatch_tokens: tokens computed at once; more takes more memory and is faster on GPUs.
            threads: None for `default_threads`.
            type_k: one of `KV_TYPES`.
            type_v: likewise; a quantized one needs ``flash_attention``.
            flash_attention: fused attention.
            max_outputs: rows of logits of one `decode`; each takes a row of the vocabulary in two buffers.
            eval_callback: shown the nodes of the graph while it is computed, which then happens on the CPU alone:
                ``ggml_backend_sched_eval_callback`` of ggml-backend.h with addresses as integers. It must not raise.

        Raises:
            SessionError: too little memory, or types that the model cannot take.
            UsageError: a type that no cache has, or a number of threads that llama.cpp cannot have.
        """
        for name in (type_k, type_v):
            if name not in KV_TYPES:
                raise UsageError(f"{name!r} is no type of a KV cache", f"Choose one of {', '.join(KV_TYPES)}")
        lib, params = library(), self._parameters(model, threads)
        params.n_ctx, params.n_seq_max = context_tokens, 1
        params.n_batch, params.n_ubatch = batch_tokens, min(ubatch_tokens, batch_tokens)
        params.n_outputs_max = max_outputs
        params.type_k, params.type_v = ggml_type(type_k).id, ggml_type(type_v).id
        params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash_attention else 0
        params.swa_full = False  # layers with a sliding window keep the window only, as the cost model predicts
        if eval_callback is not None:
            self._eval_callback = lib.ggml_backend_sched_eval_callback(eval_callback)  # C keeps a bare pointer to it
            params.cb_eval = self._eval_callback
            params.op_offload = params.offload_kqv = False
        super().__init__(
            model,
            params,
            np.zeros(batch_tokens, np.int32),
            what=f"{context_tokens} tokens",
            remedy="Use a smaller context, another KV type, or flash attention",
        )
        self.batch_tokens = batch_tokens
        self.max_outputs = max_outputs
        self.n_ctx = int(lib.llama_n_ctx(self.pointer))
        self._logits_address = 0
        self._logits_view: npt.NDArray[np.float32] = np.empty(0, np.float32)

    def decode(
        self,
        tokens: Sequence[int] | npt.NDArray[np.integer[Any]],
        start: int,
        *,
        logits: Literal["none", "last", "all"],
    ) -> bool:
        """Run tokens through the model and append them to the KV cache.

        Args:
            tokens: at most ``batch_tokens`` ids of the vocabulary.
            start: position of the first; the cache must hold exactly the positions before it (see `keep`).
            logits: the rows to keep for `logits` and `all_logits`; at most ``max_outputs`` of them.

        Returns:
            False if `interrupt` stopped it; the cache is then undefined from ``start`` on.

        Raises:
            SessionError: llama.cpp failed, or the context is full.
        """
        count = len(tokens)
        if not 0 < count <= self.batch_tokens:
            message = f"{count} tokens in a batch of {self.batch_tokens}"
            raise ValueError(message)
        if logits == "all" and count > self.max_outputs:
            message = f"logits of {count} tokens in a context with max_outputs={self.max_outputs}"
            raise ValueError(message)
        if start < 0 or start + count > self.n_ctx:
            raise SessionError(f"positions {start} to {start + count} leave the context of {self.n_ctx} tokens")
        ids = np.asarray(tokens)
        self.model.check_token(int(ids.min()))
        self.model.check_token(int(ids.max()))
        self._tokens[:count] = ids
        self._positions[:count] = np.arange(start, start + count)
        self._outputs[:count] = logits == "all"
        self._outputs[count - 1] = logits != "none"
        return self._run(count, count if logits == "all" else int(logits == "last"))

    def decode_one(self, token: int, position: int) -> bool:
        """`decode` of a single token that `sample` or `logits` gave, with logits, at the least cost."""
        if position >= self.n_ctx:
            raise SessionError(f"position {position} leaves the context of {self.n_ctx} tokens")
        self._tokens[0] = token
        self._positions[0] = position
        self._outputs[0] = 1
        return self._run(1, 1)

    def logits(self, index: int = -1) -> npt.NDArray[np.float32]:
        """One row of logits of the last batch, float32 of (n_vocab,): a view that the next decode overwrites.

        Args:
            index: among the rows that were asked for, in the order of the tokens; negative from the end.
        """
        rows = self._n_outputs
        if not -rows <= index < rows:
            message = f"row {index} of {rows} rows of logits"
            raise IndexError(message)
        pointer = self._lib.llama_get_logits_ith(self.pointer, index if index < 0 else index - rows)
        if not pointer:
            raise SessionError("llama.cpp has no logits for the last batch")
        address = ctypes.addressof(pointer.contents)
        if address != self._logits_address:
            view: npt.NDArray[np.float32] = np.ctypeslib.as_array(pointer, (self.model.n_vocab,))
            self._logits_view = view
            self._logits_address = address
        return self._logits_view

    def all_logits(self, *, copy: bool = True) -> npt.NDArray[np.float32]:
        """Every row of the last batch, float32 of (rows, n_vocab).

        Args:
            copy: off gives a view that the next decode overwrites and that must not outlive the context.
        """
        rows = self._output_rows()
        return rows.copy() if copy else rows

    def keep(self, n_tokens: int) -> bool:
        """Drop everything from position ``n_tokens`` on.

        Returns:
            Whether the first ``n_tokens`` are still there. If not, because a sliding window or a recurrent state has
            moved past them, the cache is empty afterwards.
        """
        self.check_open()
        memory = self._memory
        first = self._lib.llama_memory_seq_pos_min(memory, 0)
        if n_tokens > 0 and first == 0 and self._lib.llama_memory_seq_rm(memory, 0, n_tokens, -1):
            return True
        self._lib.llama_memory_clear(memory, False)
        return n_tokens == 0

    def clear(self) -> None:
        """Empty the cache."""
        self.keep(0)
