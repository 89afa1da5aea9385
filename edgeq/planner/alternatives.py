"""When nothing fits: which plans come closest, and what they would take."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from edgeq.converters.gguf.presets import LADDER, PRESETS
from edgeq.errors import BudgetError, UsageError
from edgeq.ggml_types import ggml_type
from edgeq.planner.candidates import Candidate, Choice, Menu, Settings, misses
from edgeq.profiles.device import DeviceProfile
from edgeq.profiles.llm.model_memory import file_bytes
from edgeq.types import Budget
from edgeq.units import format_bytes, format_ms

__all__ = ["infeasible"]

_SMALLEST_CONTEXT = 256
_SHOWN = 4
_ALL_PRESETS = tuple(
    name for name, preset in PRESETS.items() if not preset.needs_imatrix
)  # from the largest to the smallest


def infeasible(
    menu: Menu,
    candidates: Sequence[Candidate],
    budget: Budget,
    profile: DeviceProfile,
    prompt_tokens: int,
    max_file_bytes: int | None = None,
) -> BudgetError:
    """The error for a budget that no candidate meets, with the closest alternatives as its details.

    Args:
        menu: of the model.
        candidates: those that were tried, all with the same settings.
        budget: the limits.
        profile: the device.
        prompt_tokens: as for the candidates.
        max_file_bytes: of the GGUF, a limit too.
    """
    nearest = min(candidates, key=lambda c: sum(m.excess for m in misses(c.predicted, budget, max_file_bytes)))
    missed = "; ".join(str(miss) for miss in misses(nearest.predicted, budget, max_file_bytes))
    cause = f"No plan meets the budget on {profile.name}: the closest, {nearest.label}, has {missed}"
    search = _Search(menu, candidates, budget, profile, prompt_tokens, max_file_bytes)
    # First what costs little quality; everything else only if that does not help.
    for presets, kv_types in ((LADDER, ("q8_0",)), (_ALL_PRESETS, ("q8_0", "q4_0"))):
        if fitting := search.run(presets, kv_types):
            details = tuple(_describe(c) for c in fitting)
            return BudgetError(cause, f"Take one of these, or raise the limit: {details[0]}", details=details)
    return BudgetError(
        cause,
        f"Raise the limit, or take a smaller model; no preset down to {_ALL_PRESETS[-1]}, no KV cache down to q4_0 and "
        f"no context down to {_SMALLEST_CONTEXT} tokens helps",
    )


@dataclasses.dataclass(frozen=True)
class _Search:
    """Where alternatives are looked for; the fields are the arguments of `infeasible`."""

    menu: Menu
    candidates: Sequence[Candidate]
    budget: Budget
    profile: DeviceProfile
    prompt_tokens: int
    max_file_bytes: int | None

    def run(self, presets: Sequence[str], kv_types: Sequence[str]) -> list[Candidate]:
        """Plans that fit, those that give up least first."""
        found: list[tuple[int, Candidate]] = []
        for choice, given_up in self._choices(presets):
            for settings, weaker_by in self._settings(kv_types):
                candidate = self.menu.candidate(choice, settings, self.profile, self.prompt_tokens)
                if not misses(candidate.predicted, self.budget, self.max_file_bytes):
                    found.append((given_up + weaker_by, candidate))
        found.sort(key=lambda item: (item[0], -item[1].settings.context_tokens, -item[1].predicted.file_bytes))
        return _undominated([candidate for _, candidate in found])[:_SHOWN]

    def _choices(self, presets: Sequence[str]) -> Iterator[tuple[Choice, int]]:
        """The types that were tried, then smaller presets."""
        tried = {c.choice.name for c in self.candidates}
        largest = max(c.predicted.file_bytes for c in self.candidates)
        for candidate in self.candidates:
            yield candidate.choice, 0
        for name in presets:
            try:
                choice = self.menu.choice(PRESETS[name])
            except UsageError:  # an override that only the asked preset can take
                continue
            if choice.name not in tried and file_bytes(self.menu.shape, choice.types) < largest:
                yield choice, 2

    def _settings(self, kv_types: Sequence[str]) -> Iterator[tuple[Settings, int]]:
        """Settings that ask for less memory, with a count of what is given up."""
        start = self.candidates[0].settings
        bits = ggml_type(start.kv_type).bits_per_weight
        smaller = [
            name for name in kv_types if ggml_type(name).bits_per_weight < bits and self.menu.allows_kv_type(name)
        ]
        contexts = [start.context_tokens]
        while contexts[-1] // 2 >= _SMALLEST_CONTEXT:
            contexts.append(contexts[-1] // 2)
        ubatches = (start.ubatch_tokens, -(-start.ubatch_tokens // 4))
        for kv_cost, kv_type in enumerate([start.kv_type, *smaller]):
            for context_cost, context in enumerate(contexts):
                for ubatch_cost, ubatch in enumerate(ubatches):
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
