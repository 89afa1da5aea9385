"""When nothing fits: which plans come closest, and what they would take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from edgeq.converters.gguf.presets import LADDER, PRESETS
from edgeq.errors import BudgetError, UsageError
from edgeq.ggml_types import ggml_type
from edgeq.planner.candidates import Candidate, Choice, Menu, Settings, misses
from edgeq.profiles.cost import file_bytes
from edgeq.types import Budget, DeviceProfile
from edgeq.units import format_bytes, format_ms

__all__ = ["infeasible"]

_SMALLEST_CONTEXT = 256
_SHOWN = 4


def infeasible(
    menu: Menu, candidates: Sequence[Candidate], budget: Budget, profile: DeviceProfile, prompt_tokens: int
) -> BudgetError:
    """The error for a budget that no candidate meets, with the closest alternatives as its details.

    Args:
        menu: of the model.
        candidates: those that were tried, all with the same settings.
        budget: the limits.
        profile: the device.
        prompt_tokens: as for the candidates.
    """
    nearest = min(candidates, key=lambda c: sum(m.excess for m in misses(c.predicted, budget)))
    missed = "; ".join(str(miss) for miss in misses(nearest.predicted, budget))
    fitting = _closest(menu, candidates, budget, profile, prompt_tokens)
    cause = f"No plan meets the budget on {profile.name}: the closest, {nearest.label}, has {missed}"
    if fitting:
        details = tuple(_describe(c) for c in fitting)
        return BudgetError(cause, f"Take one of these, or raise the limit: {details[0]}", details=details)
    return BudgetError(cause, "Raise the limit, or take a smaller model; no smaller type, KV cache or context helps")


def _closest(
    menu: Menu, candidates: Sequence[Candidate], budget: Budget, profile: DeviceProfile, prompt_tokens: int
) -> list[Candidate]:
    """Plans that fit, those that give up least first."""
    start = candidates[0].settings
    tried = {c.choice.name for c in candidates}
    found: list[tuple[int, Candidate]] = []
    for choice, is_smaller in _choices(menu, candidates, tried):
        for settings, given_up in _weaker_settings(menu, start):
            candidate = menu.candidate(choice, settings, profile, prompt_tokens)
            if not misses(candidate.predicted, budget):
                found.append((given_up + 2 * is_smaller, candidate))
    found.sort(key=lambda item: (item[0], -item[1].settings.context_tokens, -item[1].predicted.file_bytes))
    return _undominated([candidate for _, candidate in found])[:_SHOWN]


def _choices(menu: Menu, candidates: Sequence[Candidate], tried: set[str]) -> Iterator[tuple[Choice, bool]]:
    """The user's own types first, then smaller presets."""
    largest = max(c.predicted.file_bytes for c in candidates)
    for candidate in candidates:
        yield candidate.choice, False
    if len(candidates) > 1:
        return
    for name in LADDER:
        try:
            choice = menu.choice(PRESETS[name])
        except UsageError:  # an override that only the asked preset can take
            continue
        if choice.name not in tried and file_bytes(menu.shape, choice.types) < largest:
            yield choice, True


def _weaker_settings(menu: Menu, start: Settings) -> Iterator[tuple[Settings, int]]:
    """Settings that ask for less memory, with a count of what is given up."""
    kv_types = [start.kv_type] + (["q8_0"] if start.kv_type != "q8_0" and menu.allows_kv_type("q8_0") else [])
    contexts = [start.context_tokens]
    while contexts[-1] // 2 >= _SMALLEST_CONTEXT:
        contexts.append(contexts[-1] // 2)
    for kv_cost, kv_type in enumerate(kv_types):
        for context_cost, context in enumerate(contexts):
            for ubatch_cost, ubatch in enumerate((start.ubatch_tokens, -(-start.ubatch_tokens // 4))):
                settings = Settings(context, kv_type, min(ubatch, context))
                yield settings, kv_cost + context_cost + ubatch_cost


def _undominated(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that no other beats or equals in everything: bits, context, KV cache and prompt chunk."""

    def worth(candidate: Candidate) -> tuple[int, int, float, int]:
        s = candidate.settings
        bits = ggml_type(s.kv_type).bits_per_weight
        return candidate.predicted.file_bytes, s.context_tokens, bits, s.ubatch_tokens

    chosen: list[Candidate] = []
    for candidate in candidates:
        mine = worth(candidate)
        others = [worth(other) for other in candidates]
        beaten = any(other != mine and all(a >= b for a, b in zip(other, mine, strict=True)) for other in others)
        if not beaten and mine not in [worth(other) for other in chosen]:
            chosen.append(candidate)
    return chosen


def _describe(candidate: Candidate) -> str:
    """``--quant q4_0 --context 2048 --kv-type q8_0 (peak memory 240 MiB, 12.1 ms a token)``."""
    s, p = candidate.settings, candidate.predicted
    options = f"--quant {candidate.choice.preset.name} --context {s.context_tokens} --kv-type {s.kv_type}"
    return (
        f"{options} --ubatch {s.ubatch_tokens} (file {format_bytes(p.file_bytes)}, peak memory "
        f"{format_bytes(p.peak_memory_bytes)}, {format_ms(p.itl_ms)} a token, first token {format_ms(p.ttft_ms)})"
    )
