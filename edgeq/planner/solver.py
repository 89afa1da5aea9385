"""The best type for every tensor within several limits at once, with a proven distance from the optimum.

`solve` prices the limits first (`edgeq.planner.lagrangian`), which takes tens of milliseconds and gives a bound and a
good choice, and then proves or improves that choice by a mixed-integer programme (`edgeq.planner.milp`). What cannot
be met is explained by `Infeasible`. All of it is pure: no files, no models.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import math
import time
from collections.abc import Mapping, Sequence
from typing import Literal

from edgeq.planner.branching import near_enough, search
from edgeq.planner.knapsack import (
    BYTES,
    Choice,
    Infeasible,
    Item,
    Knapsack,
    Limits,
    Mask,
    Objective,
    Option,
    Quantity,
    Solution,
    Table,
    upper_limit,
)
from edgeq.planner.milp import branch_and_bound

__all__ = ["Infeasible", "Item", "Limits", "Objective", "Option", "Solution", "k_best", "solve"]

GAP = 1e-4
TIME_GAP = 1e-3  # kernels are timed to a few percent
TIME_LIMIT_S = 2.0
_PRIORITY: tuple[Quantity, ...] = ("memory_bytes", "file_bytes", "ns", "prompt_ns", "kld")


@dataclasses.dataclass(frozen=True)
class _Effort:
    exact: bool
    gap: float
    time_limit_s: float


@dataclasses.dataclass(frozen=True)
class _Outcome:
    """The best choice that was found, if one was, and the bound on all; an infinite one proves that there is none."""

    choice: Choice | None
    value: float
    bound: float
    method: Literal["milp", "lagrangian"]

    @property
    def gap(self) -> float:
        """Relative to the value, or absolute where that is 0."""
        distance = max(self.value - self.bound, 0.0)
        return distance / abs(self.value) if distance and self.value else distance


def solve(
    items: Sequence[Item],
    limits: Limits,
    objective: Objective = "kld",
    *,
    exact: bool = True,
    gap: float | None = None,
    time_limit_s: float = TIME_LIMIT_S,
    forbidden: Sequence[Mapping[str, str]] = (),
    distance: int = 1,
) -> Solution:
    """The choice of types with the least objective within the limits.

    Among choices with an equal objective the one with the lower KL is taken. The order of items and options does not
    matter.

    Args:
        items: tensors and their options; names distinct.
        limits: upper limits of the sums; bytes are kept exactly, floats to a relative 1e-9.
        objective: the quantity whose sum is minimised.
        exact: prove the choice by a mixed-integer programme where the Lagrangian's own gap is larger than ``gap``;
            without scipy, or with far too many options for that, the Lagrangian's choice is given with its gap.
        gap: a relative distance from the optimum that is near enough; 0 for the optimum itself, None for `GAP`, or for
            `TIME_GAP` where time is minimised.
        time_limit_s: for the proof; afterwards the best choice so far is given with its gap.
        forbidden: choices (of all items or of some) from which the solution must differ.
        distance: in how many items at least.

    Raises:
        Infeasible: no choice meets the limits, with what would.
        ValueError: the items, limits or forbidden choices make no sense.
    """
    if gap is None:
        gap = TIME_GAP if objective == "ns" else GAP
    _check(limits, gap, distance)
    effort = _Effort(exact, gap, time_limit_s)
    solution, proven = _choose(items, limits, objective, effort, forbidden, distance)
    if solution is None:
        raise _explain(items, limits, effort, forbidden=bool(forbidden), proven=proven)
    return solution


def k_best(
    items: Sequence[Item],
    limits: Limits,
    objective: Objective = "kld",
    k: int = 4,
    *,
    distance: int | None = None,
    gap: float = GAP,
    time_limit_s: float = TIME_LIMIT_S,
) -> list[Solution]:
    """The best choices that differ from each other, best first; fewer than ``k`` if there are no more.

    Args:
        items: as in `solve`.
        limits: as in `solve`.
        objective: as in `solve`.
        k: how many.
        distance: in how many items any two of them differ at least; None for a twentieth of all.
        gap: as in `solve`, for each.
        time_limit_s: for all of them together.

    Raises:
        Infeasible: not even one choice meets the limits.
    """
    distance = max(1, len(items) // 20) if distance is None else distance
    _check(limits, gap, distance)
    deadline = time.monotonic() + time_limit_s
    found: list[Solution] = []
    while len(found) < k:
        left = max(deadline - time.monotonic(), 0.0) / (k - len(found))
        effort = _Effort(exact=True, gap=gap, time_limit_s=left)
        others = [solution.types for solution in found]
        solution, proven = _choose(items, limits, objective, effort, others, distance)
        if solution is None and not found:
            raise _explain(items, limits, effort, forbidden=False, proven=proven)
        if solution is None:
            break
        found.append(solution)
    return sorted(found, key=lambda solution: float(getattr(solution, objective)))


def _choose(
    items: Sequence[Item],
    limits: Limits,
    objective: Objective,
    effort: _Effort,
    forbidden: Sequence[Mapping[str, str]],
    distance: int,
) -> tuple[Solution | None, bool]:
    """The solution, or None and whether it is proven that there is none."""
    # What is dominated can still be the best choice that is not forbidden.
    table = Table(items, prune=not forbidden)
    cuts = [table.cut(types, distance) for types in forbidden]
    problem = table.knapsack(objective, limits, cuts)
    outcome = _best(problem, effort)
    if outcome.choice is None and math.isfinite(outcome.bound):
        start = _any_within(table, limits, cuts, effort)
        outcome = outcome if start is None else _best(problem, effort, start)
    if outcome.choice is None:
        return None, math.isinf(outcome.bound)
    choice = outcome.choice
    if objective != "kld":
        tied = Limits.of({**limits.given(), objective: outcome.value})
        better = _best(table.knapsack("kld", tied, cuts), effort, choice)
        choice = choice if better.choice is None else better.choice
    return table.solution(choice, gap=outcome.gap, method=outcome.method), False


def _best(problem: Knapsack, effort: _Effort, start: Choice | None = None) -> _Outcome:
    deadline = time.monotonic() + effort.time_limit_s
    searched = search(problem, start, gap=effort.gap, deadline=deadline)
    outcome = _Outcome(searched.choice, searched.value, searched.bound, "lagrangian")
    proven = not searched.open or searched.bound >= near_enough(searched.value, effort.gap)
    if proven or not effort.exact or importlib.util.find_spec("scipy") is None:
        return outcome
    best, value, bound = searched.choice, searched.value, math.inf
    for branch in searched.open:
        if branch.relaxation.bound >= near_enough(value, effort.gap):
            bound = min(bound, branch.relaxation.bound)
            break
        found = branch_and_bound(problem, branch, best, gap=effort.gap, deadline=deadline)
        best, value = found.choice, math.inf if found.choice is None else problem.value(found.choice)
        bound = min(bound, found.bound)
    return _Outcome(best, value, min(bound, value), "milp")


def _any_within(table: Table, limits: Limits, cuts: list[tuple[Mask, int]], effort: _Effort) -> Choice | None:
    """A choice within all limits, sought by minimising one limited quantity under the others."""
    whole = table.knapsack("kld", limits, cuts)
    for q in limits.given():
        others = Limits.of({o: value for o, value in limits.given().items() if o != q})
        choice = _best(table.knapsack(q, others, cuts), effort).choice
        if choice is not None and whole.feasible(choice):
            return choice
    return None


def _explain(items: Sequence[Item], limits: Limits, effort: _Effort, *, forbidden: bool, proven: bool) -> Infeasible:
    """Which limits contradict each other, and what can be had instead."""
    table = Table(items, prune=True)
    given = limits.given()
    effort = dataclasses.replace(effort, gap=0.0)

    def least(q: Quantity, others: Mapping[Quantity, float], start: Choice | None = None) -> _Outcome:
        return _best(table.knapsack(q, Limits.of(others)), effort, start)

    contradiction: tuple[Quantity, ...] = () if forbidden else tuple(given)
    for subset in (c for size in range(1, len(given) + 1) for c in itertools.combinations(given, size)):
        last = subset[-1]
        found = least(last, {q: given[q] for q in subset[:-1]})
        if found.value > upper_limit(last, given[last]):
            contradiction = subset
            proven = proven or found.bound > upper_limit(last, given[last])
            break
    raise_to: dict[Quantity, float | None] = {}
    for q in contradiction:
        value = least(q, {o: v for o, v in given.items() if o != q}).value
        raise_to[q] = _figure(q, value) if math.isfinite(value) else None
    nearest: dict[Quantity, float] = {}
    start: Choice | None = None
    for q in _PRIORITY:
        if q in given:
            found = least(q, nearest, start)
            start = found.choice
            nearest[q] = max(given[q], _figure(q, found.value))
    return Infeasible(
        limits,
        least={q: _figure(q, table.least(q)) for q in given},
        contradiction=contradiction,
        raise_to=raise_to,
        nearest=Limits.of(nearest),
        proven=proven,
    )


def _figure(q: Quantity, value: float) -> float:
    """Sums of bytes as integers."""
    return round(value) if q in BYTES else value


def _check(limits: Limits, gap: float, distance: int) -> None:
    if not all(math.isfinite(value) for value in limits.given().values()):
        raise ValueError("a limit is not a finite number")
    if not 0 <= gap < 1:
        raise ValueError("gap is relative, from 0 to below 1")
    if distance < 1:
        raise ValueError("two choices differ in one item at least")
