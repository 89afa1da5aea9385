"""What a picture of bytes against quality shows: the best mixes, the chosen plan, and llama.cpp's presets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from edgeq.converters.gguf.imatrix import Activations, ImportanceMatrix
from edgeq.converters.gguf.presets import PRESETS
from edgeq.converters.gguf.recipe import Override
from edgeq.planner.candidates import Choice, Menu
from edgeq.planner.problem import Problem
from edgeq.planner.search import Demand, front_of
from edgeq.types import Plan, Prediction

__all__ = ["Front", "FrontPoint", "look_at_front", "predicted_kld"]


@dataclasses.dataclass(frozen=True)
class FrontPoint:
    """One set of types.

    Attributes:
        labels: the presets that give it; empty for a mix.
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
        mixes: within the device's budget, none beaten by another in both, from the smallest.
        chosen: the plan.
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
        UsageError: an override that a preset cannot take.
    """
    presets, left_out = _presets(problem, demand, overrides)
    chosen = FrontPoint((), _known(predicted_kld(problem, plan.tensor_types)), plan.predicted)
    largest = max(point.predicted.file_bytes for point in (chosen, *presets))
    mixes = tuple(
        FrontPoint((), kld, predicted) for _, predicted, kld in front_of(problem, demand, max_file_bytes=largest)
    )
    return Front(mixes, chosen, presets, left_out)


def predicted_kld(problem: Problem, types: Mapping[str, str]) -> float | None:
    """Mean KL divergence that the sensitivities of these types add up to, in nats; None if one was not priced."""
    total = 0.0
    for item in problem.items:
        kld = next((option.kld for option in item.options if option.type == types[item.name]), None)
        if kld is None:
            return None
        total += kld
    return total


def _known(kld: float | None) -> float:
    if kld is None:
        message = "a plan of this problem has a type that the problem does not know"
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
