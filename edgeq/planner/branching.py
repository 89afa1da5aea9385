"""Branching on the few items that are far larger than the others, such as a tied embedding.

One large item leaves a wide gap between the Lagrangian's bound and the best choice, because the bound may mix two of
its types. With its type fixed, the gap of each branch is as small as that of a problem without large items.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
import time

import numpy as np

from edgeq.planner.knapsack import Choice, Knapsack, Mask
from edgeq.planner.lagrangian import Relaxation, reduced_costs, relax

__all__ = ["Branch", "Searched", "near_enough", "promising", "search"]

_LEVERAGE = 8.0  # an item is large if its swing is so many times that of the median item
_MOST_BRANCHES = 100


@dataclasses.dataclass(frozen=True)
class Branch:
    """A part of the problem that may still hold a better choice.

    Attributes:
        kept: the options that it may use.
        relaxation: of the problem with these options.
    """

    kept: Mask
    relaxation: Relaxation


@dataclasses.dataclass(frozen=True)
class Searched:
    """What the search came to.

    Attributes:
        choice: the best within all limits; None if none was found.
        value: its cost; infinite if there is none.
        bound: no choice within the limits costs less; infinite if there is proven to be none.
        open: branches that may hold a better choice, the most promising first.
    """

    choice: Choice | None
    value: float
    bound: float
    open: tuple[Branch, ...]


def search(problem: Knapsack, start: Choice | None, *, gap: float, deadline: float) -> Searched:
    """The Lagrangian's best choice and bound, with large items branched on.

    Args:
        problem: what to solve.
        start: a choice within the limits that is known already.
        gap: relative distance from the optimum that is near enough.
        deadline: of `time.monotonic`; the root is always solved.
    """
    root = relax(problem, start)
    best, value = root.choice, math.inf if root.choice is None else problem.value(root.choice)
    number = itertools.count()
    waiting = [(root.bound, next(number), Branch(np.isfinite(problem.cost), root))]
    leaves: list[Branch] = []
    while waiting and waiting[0][0] < near_enough(value, gap) and next(number) < _MOST_BRANCHES:
        bound, _, branch = heapq.heappop(waiting)
        kept = promising(problem, branch, value)
        item = _large_item(problem, kept, branch.relaxation)
        if item is None or time.monotonic() > deadline:
            leaves.append(Branch(kept, branch.relaxation))
            continue
        for option in np.flatnonzero(kept[item]):
            fixed = kept.copy()
            fixed[item] = False
            fixed[item, option] = True
            child = relax(dataclasses.replace(problem, cost=np.where(fixed, problem.cost, np.inf)))
            if child.choice is not None and (cost := problem.value(child.choice)) < value:
                best, value = child.choice, cost
            child = dataclasses.replace(child, bound=max(child.bound, bound))
            if child.bound < value:
                heapq.heappush(waiting, (child.bound, next(number), Branch(fixed, child)))
    remaining = sorted([b for _, _, b in waiting] + leaves, key=lambda b: b.relaxation.bound)
    better = tuple(b for b in remaining if b.relaxation.bound < value)
    return Searched(best, value, min((b.relaxation.bound for b in better), default=value), better)


def promising(problem: Knapsack, branch: Branch, value: float) -> Mask:
    """The options of a branch that can be part of a choice that costs less than ``value``, by their reduced costs."""
    if not math.isfinite(value):
        return branch.kept
    relaxation = branch.relaxation
    within = dataclasses.replace(problem, cost=np.where(branch.kept, problem.cost, np.inf))
    margin = 1e-12 * abs(value) + 2 * relaxation.rounding
    kept: Mask = branch.kept & (relaxation.bound + reduced_costs(within, relaxation.prices) <= value + margin)
    return kept


def _large_item(problem: Knapsack, kept: Mask, relaxation: Relaxation) -> int | None:
    """The undecided item whose types differ most in what their use is worth, if it is far larger than the others."""
    worth = np.tensordot(relaxation.prices, problem.use[: problem.priced], axes=1)
    widest = np.where(kept, worth, -np.inf).max(axis=1) - np.where(kept, worth, np.inf).min(axis=1)
    undecided = kept.sum(axis=1) > 1
    if not undecided.any():
        return None
    item = int(np.where(undecided, widest, -1.0).argmax())
    others = np.delete(widest, item)[np.delete(undecided, item)]
    return item if widest[item] > _LEVERAGE * float(np.median(others) if others.size else 0.0) else None


def near_enough(value: float, gap: float) -> float:
    """The bound from which on a branch holds nothing worth looking for, once a choice of that value is known."""
    return value - gap * abs(value) if math.isfinite(value) else math.inf
