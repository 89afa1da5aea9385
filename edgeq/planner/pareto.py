"""The Pareto front of KL divergence against bytes, memory or time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from edgeq.planner.knapsack import BYTES, Choice, Item, Limits, Objective, Solution, Table
from edgeq.planner.solver import solve

__all__ = ["front", "hull"]

_FILL_GAP = 1e-3  # finer than a picture shows


def front(
    items: Sequence[Item], *, limits: Limits | None = None, x: Objective = "file_bytes", points: int = 32
) -> list[Solution]:
    """Choices of which none is beaten by another in both ``x`` and KL, from the smallest ``x`` to the least KL.

    Without further limits they are vertices of the convex hull, which are exactly optimal for their ``x``; where those
    are too few, and with further limits everywhere, choices near the optimum fill in, each with its gap.

    Args:
        items: tensors and their options.
        limits: of the other quantities, and of ``x`` and KL to draw only a part.
        x: the quantity against which KL is drawn.
        points: how many choices at most.

    Raises:
        Infeasible: no choice meets the limits.
        ValueError: ``x`` is KL itself, fewer than two points, or the items make no sense.
    """
    if x == "kld" or points < 2:
        raise ValueError("a front needs a quantity other than KL, and two points")
    given = (limits or Limits()).given()
    smallest = solve(items, Limits.of(given), x)
    best = solve(items, Limits.of(given), "kld")
    best = solve(items, Limits.of({**given, "kld": best.kld}), x)
    found = [smallest, best]
    if set(given) <= {x, "kld"}:
        vertices = [s for s in hull(items, x) if _x(smallest, x) <= _x(s, x) <= _x(best, x)]
        found += _spread(vertices, x, points - 2)
    low, high = _x(smallest, x), _x(best, x)
    for wanted in np.linspace(low, high, points)[1:-1].tolist() if len(found) < points else ():
        if len(found) >= points:
            break
        if min(abs(_x(s, x) - wanted) for s in found) > (high - low) / points / 2:
            within = Limits.of({**given, x: math.floor(wanted) if x in BYTES else wanted})
            found.append(solve(items, within, "kld", gap=_FILL_GAP))
    return _undominated(found, x)


def hull(items: Sequence[Item], x: Objective = "file_bytes") -> list[Solution]:
    """All vertices of the lower convex hull of KL against ``x``, from the smallest ``x`` to the least KL.

    Each is the optimum under its own ``x`` as the only limit: the steps between the options on every item's own hull,
    taken in the order of their steepness (Sinha and Zoltners, Operations Research 27, 1979).
    """
    table = Table(items, prune=True)
    steps: list[tuple[float, int, int]] = []
    choice: Choice = np.zeros(len(table.names), dtype=np.intp)
    for i, options in enumerate(table.options):
        figures = [(float(getattr(option, x)), option.kld, j) for j, option in enumerate(options)]
        corners = _lower_hull(figures)
        choice[i] = corners[0][2]
        slope = -math.inf
        for (x0, y0, _), (x1, y1, j) in itertools.pairwise(corners):
            slope = max(slope, (y1 - y0) / (x1 - x0))  # rounding must not turn the order of an item's own steps
            steps.append((slope, i, j))
    steps.sort(key=lambda step: step[0])
    found = [table.solution(choice, gap=0.0, method="lagrangian")]
    for n, (slope, i, j) in enumerate(steps):
        choice[i] = j
        if n + 1 == len(steps) or steps[n + 1][0] > slope:
            found.append(table.solution(choice, gap=0.0, method="lagrangian"))
    return found


def _lower_hull(figures: list[tuple[float, float, int]]) -> list[tuple[float, float, int]]:
    """The corners of (x, y, index) points from the smallest x down to the least y, with rising slopes."""
    corners: list[tuple[float, float, int]] = []
    for point in sorted(figures):
        if corners and point[1] >= corners[-1][1]:
            continue
        while len(corners) > 1 and _turns_up(corners[-2], corners[-1], point):
            corners.pop()
        corners.append(point)
    return corners


def _turns_up(a: tuple[float, float, int], b: tuple[float, float, int], c: tuple[float, float, int]) -> bool:
    """Whether b lies on or above the line from a to c."""
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])


def _x(solution: Solution, x: Objective) -> float:
    return float(getattr(solution, x))


def _spread(vertices: list[Solution], x: Objective, n: int) -> list[Solution]:
    """At most n of them, nearest to an even spacing in x."""
    if len(vertices) <= n:
        return vertices
    at = np.array([_x(s, x) for s in vertices])
    nearest = {int(np.abs(at - wanted).argmin()) for wanted in np.linspace(at[0], at[-1], n + 2)[1:-1]}
    return [vertices[i] for i in sorted(nearest)]


def _undominated(solutions: list[Solution], x: Objective) -> list[Solution]:
    kept: list[Solution] = []
    for solution in sorted(solutions, key=lambda s: (_x(s, x), s.kld)):
        if not kept or solution.kld < kept[-1].kld:
            kept.append(solution)
    return kept
