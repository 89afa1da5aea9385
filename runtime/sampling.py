"""Choosing the next token. Random choice runs in llama.cpp's own sampler chain, which sorts 50,000 candidates in C."""

from __future__ import annotations

import secrets
from typing import Protocol

from edgeq.errors import SessionError
from edgeq.llama import Context, library
from edgeq.llama_handle import Handle
from edgeq.runtime.generation import Options

__all__ = ["ChainSampler", "GreedySampler", "Sampler", "make_sampler"]


class Sampler(Protocol):
    """Chooses a token from the last row of logits of a context."""

    def sample(self, context: Context) -> int:
        """The id of the chosen token."""
        ...

    def close(self) -> None:
        """Free what C holds."""
        ...


class GreedySampler:
    """The most likely token, the first of several equal ones."""

    def sample(self, context: Context) -> int:
        """The id of the chosen token."""
        return int(context.logits().argmax())

    def close(self) -> None:
        """Nothing is held."""


class ChainSampler(Handle):
    """top-k, then top-p, then min-p, then temperature, then a random choice: the order of llama.cpp's own tools."""

    def __init__(self, options: Options) -> None:
        self._lib = lib = library()
        chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        if not chain:
            raise SessionError("llama.cpp could not make a sampler", "Free memory")
        super().__init__(chain, lib.llama_sampler_free, "sampler")
        seed = secrets.randbelow(2**32 - 1) if options.seed is None else options.seed
        steps = [lib.llama_sampler_init_top_k(options.top_k)] if options.top_k > 0 else []
        if options.top_p < 1:
            steps.append(lib.llama_sampler_init_top_p(options.top_p, 1))
        if options.min_p > 0:
            steps.append(lib.llama_sampler_init_min_p(options.min_p, 1))
        steps += [lib.llama_sampler_init_temp(options.temperature), lib.llama_sampler_init_dist(seed)]
        for step in steps:
            lib.llama_sampler_chain_add(chain, step)

    def sample(self, context: Context) -> int:
        """The id of the chosen token."""
        return int(self._lib.llama_sampler_sample(self.pointer, context.pointer, -1))


def make_sampler(options: Options) -> Sampler:
    """Greedy at temperature 0, else a chain with its own random state."""
    return GreedySampler() if options.temperature == 0 else ChainSampler(options)
