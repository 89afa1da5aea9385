"""Choose the largest preset that meets the budget, or say which plans come closest."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

from edgeq.converters.gguf.imatrix import ImportanceMatrix
from edgeq.converters.gguf.presets import LADDER, PRESETS, find_preset
from edgeq.converters.gguf.recipe import Override
from edgeq.errors import BudgetError, UsageError
from edgeq.llama import KV_TYPES
from edgeq.planner.alternatives import infeasible
from edgeq.planner.candidates import Candidate, Choice, Menu, Settings, effective_budget, misses
from edgeq.profiles.device import DeviceProfile
from edgeq.types import Budget, Plan, Rejection
from edgeq.units import format_bytes

__all__ = ["Request", "largest_that_fits", "make_plan", "profile_notes", "settings_for"]

DEFAULT_CONTEXT_TOKENS = 4096
DEFAULT_PROMPT_TOKENS = 128
# Prompt tokens computed at once. A CPU is almost as fast with few, which saves memory and is the grain at which a
# session reuses a cached prefix and looks at its deadline; a GPU wants many.
DEFAULT_UBATCH_TOKENS = {"cpu": 128, "cuda": 512}


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
        from_recipe: the overrides are a whole recipe, so nothing is left to search for.
        max_file_bytes: of the GGUF.
    """

    preset: str | None = None
    overrides: tuple[Override, ...] = ()
    context_tokens: int | None = None
    kv_type: str | None = None
    ubatch_tokens: int | None = None
    prompt_tokens: int = DEFAULT_PROMPT_TOKENS
    threads: int | None = None
    from_recipe: bool = False
    max_file_bytes: int | None = None


def largest_that_fits(
    candidates: Sequence[Candidate], budget: Budget, max_file_bytes: int | None = None
) -> Candidate | None:
    """The largest file among those that meet the budget: more bits are rarely worse."""
    fitting = [c for c in candidates if not misses(c.predicted, budget, max_file_bytes)]
    return max(fitting, key=lambda c: c.predicted.file_bytes, default=None)


def make_plan(
    gguf: Path,
    profile: DeviceProfile,
    budget: Budget,
    request: Request,
    *,
    notes: Sequence[str] = (),
    imatrix: ImportanceMatrix | None = None,
) -> Plan:
    """Decide everything about a bundle.

    Args:
        gguf: a float GGUF, or a skeleton of one: only its header is read.
        profile: the device.
        budget: limits, the profile's and the user's merged.
        request: what the user asked for.
        notes: what the converter has to say, kept in the plan.
        imatrix: what the model will be quantized with, if anything.

    Raises:
        BudgetError: nothing meets the budget; the closest alternatives are its details.
        UsageError: an override, preset, context or KV type that this model cannot have.
    """
    menu = Menu(gguf, request.overrides, imatrix)
    limits = effective_budget(budget, profile)
    settings = settings_for(menu, request, profile)
    given = None if request.preset is None else find_preset(request.preset, imatrix=imatrix is not None)
    presets = [PRESETS[name] for name in LADDER] if given is None else [given]
    candidates = [
        menu.candidate(choice, settings, profile, request.prompt_tokens)
        for choice in _distinct(menu.choice(preset) for preset in presets)
    ]
    chosen = largest_that_fits(candidates, limits, request.max_file_bytes)
    if chosen is None:
        _refuse_file_size(candidates, request.max_file_bytes)
        raise infeasible(menu, candidates, limits, profile, request.prompt_tokens, request.max_file_bytes)
    rejected = tuple(
        Rejection(option=c.label, reason=_why_not(c, chosen, limits, request.max_file_bytes))
        for c in candidates
        if c is not chosen
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
        notes=(*notes, *profile_notes(profile, request.threads)),
    )


def profile_notes(profile: DeviceProfile, threads: int | None) -> tuple[str, ...]:
    """What a user must know of the figures that a plan's predictions stand on.

    Args:
        profile: the device.
        threads: that the user asked for; None for the profile's.
    """
    measured = profile.measured
    if measured is None:
        return ()
    notes = [f"predicted from a probe that doubts itself: {doubt}" for doubt in measured.doubts]
    threads = threads or profile.threads
    if threads is not None and threads != measured.threads:
        notes.append(f"times are predicted for {measured.threads} threads, as {profile.name} was probed, not {threads}")
    return tuple(notes)


def _distinct(choices: Iterable[Choice]) -> list[Choice]:
    """Without those that are another one once more, as all presets are under a recipe that names every tensor."""
    found: list[Choice] = []
    for choice in choices:
        if not any(other.types == choice.types for other in found):
            found.append(choice)
    return found


def _refuse_file_size(candidates: Sequence[Candidate], max_file_bytes: int | None) -> None:
    smallest = min(c.predicted.file_bytes for c in candidates)
    if max_file_bytes is not None and smallest > max_file_bytes:
        raise BudgetError(
            f"No preset that was looked at has a file of {format_bytes(max_file_bytes)} or less: the smallest has "
            f"{format_bytes(smallest)}",
            "Raise --max-size, or let a mix be searched: leave out --quant and --search never",
        )


def _why_not(candidate: Candidate, chosen: Candidate, budget: Budget, max_file_bytes: int | None) -> str:
    missed = misses(candidate.predicted, budget, max_file_bytes)
    if missed:
        return str(missed[0])
    saved = candidate.predicted.file_bytes - chosen.predicted.file_bytes
    return f"smaller than the chosen one by {format_bytes(-saved)}" if saved <= 0 else "not chosen"


def settings_for(menu: Menu, request: Request, profile: DeviceProfile) -> Settings:
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
