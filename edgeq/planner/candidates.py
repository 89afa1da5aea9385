"""Candidates: one way each to store and run a model, with what the device would make of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from edgeq.converters.gguf.header import GgufHeader, read_header
from edgeq.converters.gguf.imatrix import ImportanceMatrix
from edgeq.converters.gguf.presets import Preset
from edgeq.converters.gguf.quantize import preview, quantizable_tensors
from edgeq.converters.gguf.recipe import Override, apply_overrides
from edgeq.converters.gguf.shape import model_shape
from edgeq.ggml_types import ggml_type
from edgeq.profiles.device import DeviceProfile
from edgeq.profiles.llm.cost import predict
from edgeq.profiles.llm.model_shape import ModelShape
from edgeq.types import BUDGET_LINES, Budget, Fallback, Prediction
from edgeq.units import format_quantity

__all__ = ["Candidate", "Choice", "Menu", "Miss", "Settings", "effective_budget", "misses"]


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a model is run, apart from its weights.

    Attributes:
        context_tokens: prompt and answer together.
        kv_type: of keys and values.
        ubatch_tokens: prompt tokens computed at once.
    """

    context_tokens: int
    kv_type: str
    ubatch_tokens: int


@dataclasses.dataclass(frozen=True)
class Choice:
    """How the weights are stored.

    Attributes:
        name: for people: a preset's name, or "recipe".
        preset: the preset that it starts from.
        types: of every tensor.
        fallbacks: where a preset's type did not fit a tensor's rows.
    """

    name: str
    preset: Preset
    types: Mapping[str, str]
    fallbacks: tuple[Fallback, ...]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A choice of weights with settings and what they would take on the device."""

    choice: Choice
    settings: Settings
    predicted: Prediction

    @property
    def label(self) -> str:
        """For people: ``q8_0, context 4096, KV f16``."""
        s = self.settings
        return f"{self.choice.name}, context {s.context_tokens}, KV {s.kv_type}, ubatch {s.ubatch_tokens}"


@dataclasses.dataclass(frozen=True)
class Miss:
    """One budget line that a candidate does not meet.

    Attributes:
        label: of the line.
        needed: predicted, in the line's unit.
        limit: of the budget.
        unit: of both.
    """

    label: str
    needed: float
    limit: float
    unit: str

    @property
    def excess(self) -> float:
        """By how much of the limit it is missed."""
        return abs(self.needed - self.limit) / self.limit if self.limit else math.inf

    def __str__(self) -> str:
        """``peak memory 454 MiB, limit 400 MiB``."""
        return f"{self.label} {format_quantity(self.needed, self.unit)}, limit {format_quantity(self.limit, self.unit)}"


class Menu:
    """What a model's weights can become; llama.cpp is asked once for each preset.

    Args:
        gguf: a float GGUF or a skeleton of one.
        overrides: of the user, applied to every preset.
        imatrix: what the model will be quantized with; some presets need one, some give other types then.
    """

    def __init__(self, gguf: Path, overrides: Sequence[Override], imatrix: ImportanceMatrix | None = None) -> None:
        self._gguf = gguf
        self._overrides = tuple(overrides)
        self._imatrix = imatrix
        self._choices: dict[str, Choice] = {}
        self.header: GgufHeader = read_header(gguf)
        self.shape: ModelShape = model_shape(self.header)

    def choice(self, preset: Preset) -> Choice:
        """The types that a preset and the overrides give."""
        if preset.name not in self._choices:
            self._choices[preset.name] = self._make(preset)
        return self._choices[preset.name]

    def _make(self, preset: Preset) -> Choice:
        base = preview(self._gguf, preset, imatrix=self._imatrix)
        if not self._overrides:
            return Choice(preset.name, preset, base.types, base.fallbacks)
        types = apply_overrides(
            base.types,
            self._overrides,
            quantizable_tensors(self._gguf),
            dict(self.shape.tensors),
            imatrix=self._imatrix is not None,
        )
        kept = tuple(f for f in base.fallbacks if types[f.tensor] == base.types[f.tensor])
        return Choice(f"{preset.name} with overrides", preset, types, kept)

    def candidate(self, choice: Choice, settings: Settings, profile: DeviceProfile, prompt_tokens: int) -> Candidate:
        """A choice with settings, predicted for a device."""
        predicted = predict(
            self.shape,
            choice.types,
            profile,
            context_tokens=settings.context_tokens,
            kv_types=(settings.kv_type, settings.kv_type),
            ubatch_tokens=settings.ubatch_tokens,
            prompt_tokens=min(prompt_tokens, settings.context_tokens),
        )
        return Candidate(choice, settings, predicted)

    def allows_kv_type(self, name: str) -> bool:
        """Whether the heads of this model can be cached in that type."""
        kind = ggml_type(name)
        return kind.fits(self.shape.key_head_width) and kind.fits(self.shape.value_head_width)


def effective_budget(budget: Budget, profile: DeviceProfile) -> Budget:
    """The budget with memory limited to what the device has to give."""
    usable = profile.memory.usable_bytes
    limit = usable if budget.peak_memory_bytes is None else min(usable, budget.peak_memory_bytes)
    return msgspec.structs.replace(budget, peak_memory_bytes=limit)


def misses(predicted: Prediction, budget: Budget, max_file_bytes: int | None = None) -> list[Miss]:
    """The lines that a prediction does not meet; quantities that are not predicted are left to the measurement."""
    found = []
    if max_file_bytes is not None and predicted.file_bytes > max_file_bytes:
        found.append(Miss("file size", predicted.file_bytes, max_file_bytes, "bytes"))
    for line in BUDGET_LINES:
        limit, needed = budget.limit(line), getattr(predicted, line.field, None)
        if limit is None or needed is None:
            continue
        if (needed > limit) if line.at_most else (needed < limit):
            found.append(Miss(line.label.split(" p")[0], needed, limit, line.unit))
    return found
