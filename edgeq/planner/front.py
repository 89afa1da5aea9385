"""What a picture of bytes against quality shows: the best mixes, the chosen plan, and llama.cpp's presets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from edgeq.converters.gguf.imatrix import Activations, ImportanceMatrix
from edgeq.converters.gguf.presets import PRESETS
from edgeq.converters.gguf.recipe import Override
from edgeq.errors import BudgetError, UsageError
from edgeq.ggml_types import ggml_type
from edgeq.planner.candidates import Choice, Menu
from edgeq.planner.problem import Problem
from edgeq.planner.search import Demand, front_of
from edgeq.types import Plan, Prediction

__all__ = ["Front", "FrontPoint", "look_at_front", "predicted_kld"]


@dataclasses.dataclass(frozen=True)
class FrontPoint:
    """One set of types.

    Attributes:
        labels: the presets that give it, or were chosen; empty for a mix.
        predicted_kld: mean KL divergence from the unquantized model, in nats.
        predicted: what it takes on the device.
    """

    labels: tuple[str, ...]
    predicted_kld: float
    predicted: Prediction


@dataclasses.dataclass(frozen=True)
class Front:
    """Points of bytes and predicted KL divergence; all are priced by the same table, and none is measured.

    Attributes:
        mixes: within the device's budget, none beaten by another in both, from the smallest; none where a preset was
            chosen and the times of this table allow no mix.
        chosen: the plan; its label is its preset, if it is one.
        presets: the types that llama.cpp's presets give with an importance matrix, rounded as edgeq rounds, whether
            the budget allows them or not; from the smallest.
        left_out: presets with a type that no tensor of the table was priced in.
    """

    mixes: tuple[FrontPoint, ...]
    chosen: FrontPoint
    presets: tuple[FrontPoint, ...]
    left_out: tuple[str, ...]


def look_at_front(problem: Problem, demand: Demand, plan: Plan, overrides: Sequence[Override]) -> Front:
    """The front of a problem with a plan for it and llama.cpp's presets.

    Args:
        problem: the model on its device, its float GGUF still there.
        demand: limits and settings.
        plan: what was chosen.
        overrides: the user's, which hold for the presets too.

    Raises:
        BudgetError: no mix meets the device's budget.
        UsageError: an override that a preset cannot take, or a plan with a type that was not priced.
    """
    presets, left_out = _presets(problem, demand, overrides)
    kld = predicted_kld(problem, plan.tensor_types)
    if kld is None:
        raise UsageError("The plan has types that were not priced, so it cannot be drawn", "Leave out --front")
    labels = () if plan.preset is None else (plan.preset,)
    chosen = FrontPoint(labels, kld, demand.predict(problem, dict(plan.tensor_types)))
    largest = max(point.predicted.file_bytes for point in (chosen, *presets))
    return Front(_mixes(problem, demand, plan, largest), chosen, presets, left_out)


def _mixes(problem: Problem, demand: Demand, plan: Plan, largest_bytes: int) -> tuple[FrontPoint, ...]:
    try:
        found = front_of(problem, demand, max_file_bytes=largest_bytes)
    except BudgetError:
        # A preset is held to the profile's times, the mixes to those of timed kernels, which may be longer.
        if plan.search is None:
            return ()
        raise
    return tuple(FrontPoint((), kld, predicted) for _, predicted, kld in found)


def predicted_kld(problem: Problem, types: Mapping[str, str]) -> float | None:
    """Mean KL divergence that the sensitivities of these types add up to, in nats; None if one was not priced."""
    total = 0.0
    for item in problem.items:
        kld = next((option.kld for option in item.options if _is_same(option.type, types[item.name])), None)
        if kld is None:
            return None
        total += kld
    return total


def _is_same(a: str, b: str) -> bool:
    """Whether two types cost the same: of the float types only that of the float GGUF was priced."""
    return a == b or (ggml_type(a).is_float and ggml_type(b).is_float)


def _known(kld: float | None) -> float:
    if kld is None:
        message = "a preset that was priced has a type that was not"
        raise AssertionError(message)
    return kld


def _presets(
    problem: Problem, demand: Demand, overrides: Sequence[Override]
) -> tuple[tuple[FrontPoint, ...], tuple[str, ...]]:
    menu = Menu(problem.evidence.header.path, overrides, _importance(problem))
    labels: dict[str, list[str]] = {}
    choices: dict[str, Choice] = {}
    left_out = []
    for preset in PRESETS.values():
        if preset.is_float:
            continue
        choice = menu.choice(preset)
        if predicted_kld(problem, choice.types) is None:
            left_out.append(preset.name)
            continue
        twin = next((name for name, other in choices.items() if other.types == choice.types), preset.name)
        choices.setdefault(twin, choice)
        labels.setdefault(twin, []).append(preset.name)
    points = [
        FrontPoint(
            tuple(labels[name]),
            _known(predicted_kld(problem, choice.types)),
            demand.predict(problem, dict(choice.types)),
        )
        for name, choice in choices.items()
    ]
    points.sort(key=lambda point: (point.predicted.file_bytes, point.predicted_kld))
    return tuple(points), tuple(left_out)


def _importance(problem: Problem) -> ImportanceMatrix:
    """The column weights of the quantizer as llama.cpp takes them: with them it allows every preset."""
    entries = {
        name: Activations(weights.reshape(1, -1).astype(np.float32), np.ones(1, np.int64))
        for name, weights in problem.evidence.importance.items()
    }
    return ImportanceMatrix(entries, chunk_count=1, chunk_tokens=0)
