"""The front against brute force on small instances, and its promises on a whole model."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeq.planner.knapsack import Infeasible, Item, Limits, Objective, Option, Solution
from edgeq.planner.pareto import front, hull
from edgeq.planner.solver import solve

_FIGURES = st.tuples(st.integers(1, 60), st.integers(1, 60), st.integers(1, 40), st.integers(0, 900))
_ITEMS = st.lists(st.lists(_FIGURES, min_size=1, max_size=5), min_size=1, max_size=4).map(
    lambda items: [
        Item(f"i{i}", tuple(Option(f"t{j}", a, b, c / 7, d / 64) for j, (a, b, c, d) in enumerate(options)))
        for i, options in enumerate(items)
    ]
)
_XS: tuple[Objective, ...] = ("file_bytes", "memory_bytes", "ns")


def mixes(items: list[Item]) -> list[tuple[Option, ...]]:
    return list(itertools.product(*(item.options for item in items)))


def total(options: tuple[Option, ...], q: Objective) -> float:
    return math.fsum(getattr(o, q) for o in options)


def x_of(solution: Solution, x: Objective) -> float:
    return float(getattr(solution, x))


@settings(max_examples=100)
@given(_ITEMS, st.sampled_from(_XS))
def test_the_hull_is_that_of_all_mixes(items: list[Item], x: Objective) -> None:
    points = sorted({(round(total(m, x), 9), round(total(m, "kld"), 9)) for m in mixes(items)})
    vertices = hull(items, x)
    found = [(round(x_of(s, x), 9), round(s.kld, 9)) for s in vertices]
    assert found[0] == points[0]
    assert found[-1] == min(points, key=lambda p: (p[1], p[0]))
    for (x0, y0), (x1, y1) in itertools.pairwise(found):
        assert x0 < x1
        assert y0 > y1
        # No mix lies below the line through two neighbours.
        assert all((y - y0) * (x1 - x0) >= (y1 - y0) * (px - x0) - 1e-6 for px, y in points)
    assert all(s.gap == 0 for s in vertices)


@settings(max_examples=60)
@given(_ITEMS, st.sampled_from(_XS), st.integers(2, 12), st.booleans())
def test_no_point_of_the_front_is_beaten(items: list[Item], x: Objective, points: int, limited: bool) -> None:
    other: Objective = "ns" if x != "ns" else "file_bytes"
    middle = sorted(total(m, other) for m in mixes(items))[len(mixes(items)) // 2]
    limits = Limits.of({other: middle}) if limited else Limits()
    allowed = [m for m in mixes(items) if not limited or total(m, other) <= middle * (1 + 1e-9)]
    found = front(items, limits=limits, x=x, points=points)
    assert 1 <= len(found) <= points
    for a, b in itertools.pairwise(found):
        assert x_of(a, x) < x_of(b, x)
        assert a.kld > b.kld
    assert x_of(found[0], x) == pytest.approx(min(total(m, x) for m in allowed))
    assert found[-1].kld == pytest.approx(min(total(m, "kld") for m in allowed))
    for solution in found:
        best = min(total(m, "kld") for m in allowed if total(m, x) <= x_of(solution, x) * (1 + 1e-9))
        assert solution.kld * (1 - solution.gap) <= best + 1e-9, "further from the optimum than its gap"
        assert not limited or getattr(solution, other) <= middle * (1 + 1e-9)


def _layers(n: int) -> list[Item]:
    types = {"q4_0": 18, "iq4_nl": 18, "q4_1": 20, "q5_0": 22, "q5_1": 24, "q8_0": 34, "f16": 64}
    items = []
    for i in range(n):
        blocks = 1000 if i else 40_000
        options = []
        for j, (kind, size) in enumerate(types.items()):
            kld = (1 + (i * 7919) % 13) * blocks * 2.0 ** (-size / 4) * (1 + 0.1 * ((i + j) % 3))
            options.append(Option(kind, blocks * size, blocks * size, blocks * (size + 5.0 * (j % 2)), kld))
        items.append(Item(f"t{i:03}", tuple(options)))
    return items


def test_the_front_of_a_model_fills_its_points() -> None:
    items = _layers(80)
    for limits in (None, Limits(ns=sum(max(o.ns for o in i.options) for i in items) * 0.6)):
        found = front(items, limits=limits, points=16)
        assert 12 <= len(found) <= 16
        assert all(s.gap <= 1e-3 for s in found)
        widest = max(b.file_bytes - a.file_bytes for a, b in itertools.pairwise(found))
        assert widest <= (found[-1].file_bytes - found[0].file_bytes) / 4
        for solution in found[1:-1:4]:
            best = solve(items, Limits(file_bytes=solution.file_bytes, ns=limits.ns if limits else None), gap=1e-3)
            assert solution.kld <= best.kld * (1 + 2.1e-3)


def test_only_the_part_within_the_limits_is_drawn() -> None:
    items = _layers(20)
    whole = front(items, points=9)
    part = front(items, limits=Limits(file_bytes=whole[4].file_bytes, kld=whole[1].kld), points=9)
    assert all(s.file_bytes <= whole[4].file_bytes for s in part)
    assert all(s.kld <= whole[1].kld * (1 + 1e-9) for s in part)
    with pytest.raises(Infeasible):
        front(items, limits=Limits(file_bytes=whole[0].file_bytes - 1))


@pytest.mark.parametrize(("x", "points"), [("kld", 8), ("file_bytes", 1)])
def test_a_front_that_makes_no_sense_is_refused(x: Objective, points: int) -> None:
    with pytest.raises(ValueError, match="two points"):
        front(_layers(2), x=x, points=points)
