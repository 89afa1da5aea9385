"""Mixed types for every tensor: solved from measured sensitivities, then decided by real measurements."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from edgeq.converters.calibration.overlap import refuse_overlap
from edgeq.converters.calibration.texts import TokenText, builtin_text, file_text
from edgeq.converters.gguf.sensitivity.evidence import Evidence, Workshop
from edgeq.planner.candidates import Settings
from edgeq.planner.knapsack import Item, Objective, Solution
from edgeq.planner.pareto import front
from edgeq.planner.problem import Problem
from edgeq.planner.search_errors import infeasible_mix
from edgeq.planner.search_items import limits_of, with_prompt
from edgeq.planner.solver import Infeasible, Limits, solve
from edgeq.planner.trials import run_trials, within
from edgeq.profiles.llm.model_latency import prompt_chunks
from edgeq.search_record import Calibration, SearchRecord
from edgeq.types import Budget, Prediction

__all__ = ["Demand", "Goal", "Searched", "front_of", "held_out_text", "search", "selection_text"]

_SELECTION_TOKENS = 2048
_SELECTION_CHUNK = 256
# Predicted over allowed KL where a measurement is not worth its time: whole mixes were predicted within a factor of 2.
_HOPELESS = 4.0


@dataclasses.dataclass(frozen=True)
class Goal:
    """What a mix shall achieve beside the device's budget.

    Attributes:
        max_file_bytes: of the GGUF.
        max_kld: mean KL divergence from the unquantized model, in nats.
        min_top1: share of positions with the same most likely token.
        minimize: what is minimised within the limits; None for quality, or for bytes where quality is the only limit.
    """

    max_file_bytes: int | None = None
    max_kld: float | None = None
    min_top1: float | None = None
    minimize: Objective | None = None

    def objective(self, asked: Budget) -> Objective:
        """What to minimise, given the limits that the user set (not those of the profile)."""
        if self.minimize is not None:
            return self.minimize
        limited = self.max_file_bytes is not None or asked != Budget()
        return "file_bytes" if self.max_kld is not None and not limited else "kld"


@dataclasses.dataclass(frozen=True)
class Demand:
    """Everything that a mix has to keep.

    Attributes:
        goal: on bytes and quality.
        budget: of the device, the user's limits included.
        asked: the limits that the user set.
        settings: context, KV cache and prompt chunk.
        prompt_tokens: that the time to first token is for.
    """

    goal: Goal
    budget: Budget
    asked: Budget
    settings: Settings
    prompt_tokens: int

    @property
    def chunks(self) -> dict[int, int]:
        """Of the prompt."""
        return prompt_chunks(min(self.prompt_tokens, self.settings.context_tokens), self.settings.ubatch_tokens)

    def predict(self, problem: Problem, types: dict[str, str]) -> Prediction:
        """What a mix takes on the device."""
        return problem.predict(types, self.settings, self.prompt_tokens)

    def pose(self, problem: Problem) -> Problem:
        """The problem with the prompt's time of every option, if the budget limits it."""
        if self.budget.ttft_ms is None:
            return problem
        return dataclasses.replace(problem, items=with_prompt(problem.items, problem.pricing, self.chunks))


@dataclasses.dataclass(frozen=True)
class Searched:
    """The mix that was found.

    Attributes:
        types: of every tensor.
        predicted: what it takes on the device.
        record: for the plan.
        file: the quantized model if it was made for a trial; the caller may move it.
    """

    types: dict[str, str]
    predicted: Prediction
    record: SearchRecord
    file: Path | None


def solve_for(problem: Problem, demand: Demand, *, measured: bool = False) -> tuple[Solution, Limits, Objective]:
    """The best mix by prediction, with the limits and the objective that it was found for.

    Args:
        problem: the model on its device.
        demand: limits and settings.
        measured: whether mixes will be measured, so that a limit of KL is not decided by its prediction.

    Raises:
        BudgetError: no mix meets the limits; the nearest feasible points are its details.
    """
    problem = demand.pose(problem)
    limits = _limits(problem, demand)
    objective = demand.goal.objective(demand.asked)
    try:
        if measured and limits.kld is not None:
            solution = within(problem.items, limits, objective, limits.kld)
            if solution.kld <= _HOPELESS * limits.kld:
                return solution, limits, objective
        return solve(problem.items, limits, objective), limits, objective
    except Infeasible as error:
        at_base = demand.predict(problem, problem.base)
        raise infeasible_mix(
            error, problem.pricing, problem.base, at_base, problem.items, demand.budget, demand.chunks
        ) from error


def _limits(problem: Problem, demand: Demand) -> Limits:
    return limits_of(
        demand.budget,
        problem.pricing,
        problem.base,
        demand.predict(problem, problem.base),
        names=[item.name for item in problem.items],
        chunks=demand.chunks,
        max_file_bytes=demand.goal.max_file_bytes,
        max_kld=demand.goal.max_kld,
    )


def search(problem: Problem, demand: Demand, *, trials: int, shop: Workshop) -> Searched:
    """Solve, quantize the best few, and take the one that is really closest to the unquantized model.

    Args:
        problem: from `edgeq.planner.problem.pose`.
        demand: limits and settings.
        trials: how many mixes to measure; 0 for none.
        shop: where and how.

    Raises:
        BudgetError: no mix meets the limits, by prediction or when measured.
        UsageError: the calibration text holds the one that mixes are compared on.
    """
    problem = demand.pose(problem)
    solution, limits, objective = solve_for(problem, demand, measured=trials > 0)
    record = SearchRecord(
        estimator="fisher" if problem.evidence.curvatures.estimator == "fisher" else "imatrix",
        objective=objective,
        predicted_kld=solution.kld,
        gap=solution.gap,
        compensated=problem.evidence.compensated,
        calibration=calibration_of(problem.evidence),
        costs=problem.costs_note,
    )
    file = None
    if trials > 0:
        text = selection_text(problem.evidence.header.path)
        refuse_overlap(problem.evidence.text, text)
        judged = run_trials(
            problem,
            limits,
            objective,
            solution,
            text=text,
            kv_type=demand.settings.kv_type,
            trials=trials,
            shop=shop,
        )
        solution, file = judged.best, judged.file
        record = msgspec.structs.replace(
            record,
            predicted_kld=solution.kld,
            gap=solution.gap,
            trials=judged.trials,
            selection=text.name,
            selection_tokens=text.n_tokens,
        )
    types = problem.types(solution)
    return Searched(types, demand.predict(problem, types), record, file)


def calibration_of(evidence: Evidence) -> Calibration:
    """What a plan keeps of the calibration."""
    text = evidence.text
    return Calibration(
        source=text.source,
        name=text.name,
        tokens=text.n_tokens,
        chunks=len(text.chunks),
        seed=text.seed,
        text_sha256=text.text_sha256,
        importance=evidence.importance_source,
    )


def selection_text(reference: Path) -> TokenText:
    """The text that mixes are compared on: neither the calibration's nor the final judgement's."""
    return builtin_text(reference, chunk_tokens=_SELECTION_CHUNK, max_tokens=_SELECTION_TOKENS, split="select")


def held_out_text(reference: Path, path: Path | None, max_tokens: int, part: int = 0) -> TokenText:
    """The text that the finished model is judged by.

    Args:
        reference: whose tokenizer cuts it.
        path: the user's; None for the text inside Python.
        max_tokens: of it.
        part: how many pieces of that length to pass over, so that each judgement has a text of its own; a text that is
            too short for it is read again, and its name says so.
    """
    upto = max_tokens * (part + 1)
    if path is None:
        text = builtin_text(reference, chunk_tokens=_SELECTION_CHUNK, max_tokens=upto, split="judge")
    else:
        least = min(max_tokens, 2 * _SELECTION_CHUNK)
        text = file_text(reference, path, chunk_tokens=_SELECTION_CHUNK, max_tokens=upto, min_tokens=least)
    return _part(text, max_tokens, part)


def _part(text: TokenText, max_tokens: int, part: int) -> TokenText:
    """The chunks that begin in a part of a text, or those of the first part if there are too few."""
    ends = np.cumsum([len(chunk) for chunk in text.chunks])
    starts = ends - [len(chunk) for chunk in text.chunks]
    chosen = starts >= max_tokens * part
    name = text.name if part == 0 else f"{text.name}, part {part + 1}"
    if part and int((ends - starts)[chosen].sum()) < max_tokens // 2:
        chosen, name = starts < max_tokens, f"{text.name}, read {part + 1} times"
    chunks = tuple(chunk for chunk, here in zip(text.chunks, chosen.tolist(), strict=True) if here)
    return dataclasses.replace(text, chunks=chunks, n_tokens=sum(map(len, chunks)), name=name)


def front_of(
    problem: Problem, demand: Demand, *, max_file_bytes: int | None = None, points: int = 24
) -> list[tuple[dict[str, str], Prediction, float]]:
    """Mixes from the smallest to the best, none beaten in both bytes and predicted KL, within the device's budget.

    Args:
        problem: the model on its device.
        demand: its goal is left out of account.
        max_file_bytes: where the largest one may end; None for no limit.
        points: how many mixes at most.

    Returns:
        Types, prediction and predicted mean KL of each.

    Raises:
        BudgetError: no mix meets the device's budget.
    """
    problem = demand.pose(problem)
    free = dataclasses.replace(demand, goal=Goal(max_file_bytes=max_file_bytes))
    limits = _binding(problem.items, _limits(problem, free))
    try:
        solutions = front(problem.items, limits=limits, points=points)
    except Infeasible as error:
        at_base = demand.predict(problem, problem.base)
        raise infeasible_mix(
            error, problem.pricing, problem.base, at_base, problem.items, demand.budget, demand.chunks
        ) from error
    result = []
    for solution in solutions:
        types = problem.types(solution)
        result.append((types, demand.predict(problem, types), solution.kld))
    return result


def _binding(items: Sequence[Item], limits: Limits) -> Limits:
    """Without the limits that no choice exceeds, each of which would cost every point of a front an own search."""
    most = {q: sum(max(float(getattr(o, q)) for o in item.options) for item in items) for q in limits.given()}
    return Limits.of({q: value for q, value in limits.given().items() if value < most[q]})
