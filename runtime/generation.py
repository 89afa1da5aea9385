"""What is asked of a language model and what comes back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from edgeq.errors import UsageError

__all__ = ["FinishReason", "Generation", "Options", "Prompt", "Timings", "Token"]

FinishReason = Literal["stop", "length", "deadline", "cancelled"]
# Raw text, messages for the chat template, or token ids.
Prompt = str | Sequence[Mapping[str, Any]] | Sequence[int]

# llama.cpp takes a seed of 32 bits and reads the largest as "choose one".
_MAX_SEED = 2**32 - 2


@dataclasses.dataclass(frozen=True)
class Token:
    """One step of a stream. The texts of all steps, joined, are the text of the `Generation`.

    Attributes:
        text: new text; empty while a character or a possible stop string is unfinished.
        id: of the token; None for text that was held back until the end.
        gap_ms: time since the token before, without what the caller did in between; None for the first.
    """

    text: str
    id: int | None
    gap_ms: float | None


@dataclasses.dataclass(frozen=True)
class Timings:
    """Where the time of one generation went, in milliseconds.

    Attributes:
        queue_ms: waiting for other requests of the session.
        prompt_ms: computing the prompt and the first token.
        ttft_ms: from the call to the first token, queue included; None if there was none.
        gaps_ms: between consecutive tokens, without the caller's own code (``on_token``, the body of a loop).
        total_ms: from the call to the end.
        tokens_per_s: decode speed, the inverse of the mean gap; None with fewer than two tokens.
        cached_tokens: tokens of the prompt that an earlier request had computed already.
    """

    queue_ms: float
    prompt_ms: float
    ttft_ms: float | None
    gaps_ms: tuple[float, ...]
    total_ms: float
    tokens_per_s: float | None
    cached_tokens: int


@dataclasses.dataclass(frozen=True)
class Generation:
    """A finished answer.

    Attributes:
        text: without the stop string that ended it.
        token_ids: all generated tokens but the one that ends a turn; those of a stop string are among them.
        prompt_tokens: tokens of the prompt.
        finish_reason: ``"stop"`` (the model or a stop string ended it), ``"length"`` (``max_tokens`` or the context),
            ``"deadline"``, or ``"cancelled"``; the text is partial in the last two cases.
        timings: where the time went.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    finish_reason: FinishReason
    timings: Timings


@dataclasses.dataclass(frozen=True)
class Options:
    """How to generate, checked. The meaning of each is told by `edgeq.runtime.llm.LLMSession.generate`."""

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    seed: int | None = None
    stop: tuple[str, ...] = ()
    deadline_ms: float | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        """Raise UsageError for a value that makes no sense."""
        checks = (
            (self.max_tokens >= 1, "max_tokens", self.max_tokens, "1 or more"),
            (0 <= self.temperature < math.inf, "temperature", self.temperature, "0 (greedy) or a positive number"),
            (self.top_k >= 0, "top_k", self.top_k, "0 (all tokens) or more"),
            (0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1"),
            (0 <= self.min_p <= 1, "min_p", self.min_p, "from 0 to 1"),
            (self.seed is None or 0 <= self.seed <= _MAX_SEED, "seed", self.seed, f"from 0 to {_MAX_SEED}"),
            (self.deadline_ms is None or 0 < self.deadline_ms < math.inf, "deadline_ms", self.deadline_ms, "positive"),
            (all(self.stop), "stop", self.stop, "non-empty strings"),
        )
        for valid, name, value, wanted in checks:
            if not valid:
                raise UsageError(f"{name}={value!r} makes no sense", f"Choose {wanted}")
