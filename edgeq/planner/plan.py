"""Choose a plan that meets the budget, or say which plans come closest.

The seam for better choosers: `choose` takes candidates and returns one. Here it is the largest file that fits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from edgeq.converters.gguf.presets import LADDER, PRESETS, find_preset
from edgeq.converters.gguf.recipe import Override
from edgeq.errors import UsageError
from edgeq.llama import KV_TYPES
from edgeq.planner.alternatives import infeasible
from edgeq.planner.candidates import Candidate, Menu, Settings, effective_budget, misses
from edgeq.types import Budget, DeviceProfile, Plan, Rejection
from edgeq.units import format_bytes

__all__ = ["Chooser", "Request", "largest_that_fits", "make_plan"]

DEFAULT_CONTEXT_TOKENS = 4096
DEFAULT_PROMPT_TOKENS = 128
# Prompt tokens computed at once. A CPU is almost as fast with few, which saves memory and is the grain at which a
# session reuses a cached prefix and looks at its deadline; a GPU wants many.
DEFAULT_UBATCH_TOKENS = {"cpu": 128, "cuda": 512}

Chooser = Callable[[Sequence[Candidate], Budget], Candidate | None]


@dataclasses.dataclass(frozen=True)
class Request:
    """What the user asked for; None leaves it to the planner.

    Attributes:
        preset: a uniform preset's name.
        overrides: types for tensors by regular expression, the first match wins.
        context_tokens: prompt and answer together.
        kv_type: of the KV cache.
        ubatch_tokens: prompt tokens computed at once.
        prompt_tokens: the prompt that the time to first token is predicted for.
        threads: of a session.
    """

    preset: str | None = None
    overrides: tuple[Override, ...] = ()
    context_tokens: int | None = None
    kv_type: str | None = None
    ubatch_tokens: int | None = None
    prompt_tokens: int = DEFAULT_PROMPT_TOKENS
    threads: int | None = None


def largest_that_fits(candidates: Sequence[Candidate], budget: Budget) -> Candidate | None:
    """The largest file among those that meet the budget: more bits are rarely worse."""
    fitting = [c for c in candidates if not misses(c.predicted, budget)]
    return max(fitting, key=lambda c: c.predicted.file_bytes, default=None)


def make_plan(
    gguf: Path,
    profile: DeviceProfile,
    budget: Budget,
    request: Request,
    *,
    notes: Sequence[str] = (),
    choose: Chooser = largest_that_fits,
) -> Plan:
    """Decide everything about a bundle.

    Args:
        gguf: a float GGUF, or a skeleton of one: only its header is read.
        profile: the device.
        budget: limits, the profile's and the user's merged.
        request: what the user asked for.
        notes: what the converter has to say, kept in the plan.
        choose: picks among candidates that differ in their types.

    Raises:
        BudgetError: nothing meets the budget; the closest alternatives are its details.
        UsageError: an override, preset, context or KV type that this model cannot have.
    """
    menu = Menu(gguf, request.overrides)
    limits = effective_budget(budget, profile)
    settings = _settings(menu, request, profile)
    presets = [find_preset(request.preset)] if request.preset else [PRESETS[name] for name in LADDER]
    candidates = [menu.candidate(menu.choice(p), settings, profile, request.prompt_tokens) for p in presets]
    chosen = choose(candidates, limits)
    if chosen is None:
        raise infeasible(menu, candidates, limits, profile, request.prompt_tokens)
    rejected = tuple(
        Rejection(option=c.label, reason=_why_not(c, chosen, limits)) for c in candidates if c is not chosen
    )
    return Plan(
        preset=chosen.choice.preset.name if not request.overrides else None,
        tensor_types=dict(chosen.choice.types),
        fallbacks=chosen.choice.fallbacks,
        context_tokens=settings.context_tokens,
        kv_type_k=settings.kv_type,
        kv_type_v=settings.kv_type,
        ubatch_tokens=settings.ubatch_tokens,
        threads=request.threads or profile.threads,
        gpu_layers=-1 if profile.accelerator.startswith("cuda") else 0,
        predicted=chosen.predicted,
        rejected=rejected,
        notes=tuple(notes),
    )


def _why_not(candidate: Candidate, chosen: Candidate, budget: Budget) -> str:
    missed = misses(candidate.predicted, budget)
    if missed:
        return str(missed[0])
    saved = candidate.predicted.file_bytes - chosen.predicted.file_bytes
    return f"smaller than the chosen one by {format_bytes(-saved)}" if saved <= 0 else "not chosen"


def _settings(menu: Menu, request: Request, profile: DeviceProfile) -> Settings:
    """The user's settings with defaults, checked against the model."""
    trained = menu.header.integer("context_length")
    context = request.context_tokens or min(trained, DEFAULT_CONTEXT_TOKENS)
    if context > trained:
        raise UsageError(
            f"A context of {context} tokens is more than the {trained} that the model was trained for",
            f"Use --context {trained} or less",
        )
    kv_type = (request.kv_type or "f16").lower()
    if kv_type not in KV_TYPES:
        raise UsageError(f"{kv_type!r} is no type of a KV cache", f"Choose one of {', '.join(KV_TYPES)}")
    if not menu.allows_kv_type(kv_type):
        raise UsageError(
            f"Heads of {menu.shape.key_head_width} values cannot be cached as {kv_type}", "Use --kv-type f16"
        )
    ubatch = request.ubatch_tokens or DEFAULT_UBATCH_TOKENS[profile.accelerator.partition(":")[0]]
    return Settings(context, kv_type, min(ubatch, context))
