"""A model and its context, with a memory of which prompt the KV cache holds."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgeq.llama import Context, Model
from edgeq.types import Plan

__all__ = ["Engine", "EngineSettings"]

TokenIds = npt.NDArray[np.int32]


@dataclasses.dataclass(frozen=True)
class EngineSettings:
    """How a model is run; the meaning is that of the same fields of `edgeq.types.Plan`."""

    context_tokens: int
    kv_type_k: str = "f16"
    kv_type_v: str = "f16"
    flash_attention: bool = True
    ubatch_tokens: int = 64
    threads: int | None = None
    gpu_layers: int = 0
    use_mmap: bool = False

    @classmethod
    def from_plan(cls, plan: Plan, *, threads: int | None = None, context_tokens: int | None = None) -> EngineSettings:
        """The settings of a plan, with what the caller overrides."""
        return cls(
            context_tokens=context_tokens or plan.context_tokens,
            kv_type_k=plan.kv_type_k,
            kv_type_v=plan.kv_type_v,
            flash_attention=plan.flash_attention,
            ubatch_tokens=plan.ubatch_tokens,
            threads=threads or plan.threads,
            gpu_layers=plan.gpu_layers,
        )


class Engine:
    """Computes prompts in chunks and continues them token by token. One sequence, not thread-safe.

    Chunks begin at multiples of ``ubatch_tokens``, always. So the cached state of a whole chunk depends on nothing but
    the tokens up to its end, bit by bit, and a later prompt with the same beginning may take it over without changing
    its answer. Generated tokens were computed one at a time, which rounds differently, and are never taken over.

    Args:
        path: the GGUF.
        settings: how to run it.

    Raises:
        SessionError: the file cannot be loaded, or the context does not fit.
    """

    def __init__(self, path: Path, settings: EngineSettings) -> None:
        self.model = Model.load(path, gpu_layers=settings.gpu_layers, use_mmap=settings.use_mmap)
        self._settings = settings
        self._chunk = settings.ubatch_tokens
        self._cached: TokenIds = np.empty(0, np.int32)
        try:
            self.context = self.new_context()
        except BaseException:
            self.model.close()
            raise

    def new_context(self) -> Context:
        """A context with the engine's settings, for its model."""
        settings = self._settings
        return Context(
            self.model,
            context_tokens=settings.context_tokens,
            batch_tokens=self._chunk,
            ubatch_tokens=self._chunk,
            threads=settings.threads,
            type_k=settings.kv_type_k,
            type_v=settings.kv_type_v,
            flash_attention=settings.flash_attention,
        )

    def begin(self, prompt: TokenIds) -> int:
        """Drop from the cache what the prompt does not begin with. Returns the tokens that need not be computed."""
        # The last chunk is always computed again, because its logits are needed.
        room = min(len(prompt) - 1, len(self._cached))
        differing = np.flatnonzero(prompt[:room] != self._cached[:room])
        common = int(differing[0]) if len(differing) else room
        reused = common // self._chunk * self._chunk
        if not self.context.keep(reused):
            reused = 0
        self._cached = prompt[:reused]
        return reused

    def prefill(self, prompt: TokenIds, start: int) -> int | None:
        """Compute the next chunk. Returns the position after it, or None if it was interrupted."""
        end = min(start + self._chunk, len(prompt))
        if not self.context.decode(prompt[start:end], start, logits="last" if end == len(prompt) else "none"):
            return None
        if end - start == self._chunk:
            self._cached = prompt[:end]
        return end

    def close(self) -> None:
        """Free everything."""
        self.model.close()
