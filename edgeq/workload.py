"""What a measured run does again and again, and what it met: one record for each kind of bundle."""

from __future__ import annotations

from typing import Literal

import msgspec

from edgeq.record import Count, Record
from edgeq.tensor_types import Scheme, TensorPrediction
from edgeq.types import Prediction

__all__ = [
    "Details",
    "LanguageDetails",
    "LanguageWorkload",
    "Pace",
    "TensorDetails",
    "TensorWorkload",
    "Workload",
]


class Pace(Record, frozen=True, kw_only=True):
    """How often and how long, of every kind of workload.

    Attributes:
        warmup: repetitions that are reported and not counted.
        repetitions: exact number; None for as many as the budget's lines need.
        seconds: take samples for this long instead; None for no such rule.
        max_seconds: no further repetition starts after this long.
        threads: None for the bundle's own.
    """

    warmup: int = 3
    repetitions: int | None = None
    seconds: float | None = None
    max_seconds: float = 120.0
    threads: int | None = None


class LanguageWorkload(Pace, frozen=True, kw_only=True, tag_field="kind", tag="llm"):
    """Answers of a language model; a repetition is one answer.

    Attributes:
        prompt_tokens: length of each prompt; the prompts differ, so that none is found in the cache.
        output_tokens: exact length of each answer.
        context_tokens: None for the bundle's own.
    """

    prompt_tokens: int = 128
    output_tokens: int = 32
    context_tokens: int | None = None


class TensorWorkload(Pace, frozen=True, kw_only=True, tag_field="kind", tag="tensor"):
    """Calls of a model with arrays; a repetition is one call.

    Attributes:
        size: of the dynamic axes, as the plan has them; None for the usual ones.
        axes: sizes of single axes by name, whatever ``size`` says.
    """

    warmup: int = 10
    size: Literal["usual", "largest"] | None = None
    axes: dict[str, int] = msgspec.field(default_factory=dict)


Workload = LanguageWorkload | TensorWorkload


class LanguageDetails(Record, frozen=True, kw_only=True, tag_field="kind", tag="llm"):
    """What only a run of a language model has to tell.

    Attributes:
        context_tokens: what the session had.
        predicted: by the bundle's plan.
    """

    context_tokens: int
    predicted: Prediction


class TensorDetails(Record, frozen=True, kw_only=True, tag_field="kind", tag="tensor"):
    """What only a run of a model that is called with arrays has to tell.

    Attributes:
        backend: that the bundle was made for.
        scheme: what most of its weights compute in.
        providers: what computed, the first for as much as it could.
        inputs: where the arrays come from, for people.
        calls: different ones, which took turns.
        held_bytes: of these arrays, which the measured process held and its peak memory contains.
        shapes: of the inputs by name, one entry for each combination among the calls.
        predicted: by the bundle's plan, memory for the largest sizes and latency for the usual ones.
    """

    backend: str
    scheme: Scheme
    providers: tuple[str, ...]
    inputs: str
    calls: Count
    held_bytes: Count
    shapes: tuple[dict[str, tuple[int, ...]], ...]
    predicted: TensorPrediction


Details = LanguageDetails | TensorDetails
