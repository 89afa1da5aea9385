"""The exact choice of nodes against all choices."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeq.planner.tensors.mixed import NodeCost, choose_float_front, choose_float_nodes, error_of_cosine

COSTS = st.lists(
    st.tuples(st.floats(1e-6, 1e-2), st.floats(1.0, 100.0), st.floats(1.0, 100.0)), min_size=1, max_size=6
).map(lambda rows: [NodeCost(f"n{i}", e, f, q, 400, 100) for i, (e, f, q) in enumerate(rows)])


def _time(costs: list[NodeCost], floats: set[str]) -> float:
    return sum(cost.float_us if cost.name in floats else cost.int8_us for cost in costs)


def _error(costs: list[NodeCost], floats: set[str]) -> float:
    return sum(cost.error for cost in costs if cost.name not in floats)


@settings(max_examples=40, deadline=None)
@given(COSTS, st.floats(1e-6, 3e-2))
def test_no_choice_within_the_error_is_faster(costs: list[NodeCost], max_error: float) -> None:
    chosen = choose_float_nodes(costs, max_error=max_error)
    assert _error(costs, chosen) <= max_error * (1 + 1e-6)
    names = [cost.name for cost in costs]
    for size in range(len(names) + 1):
        for floats in itertools.combinations(names, size):
            if _error(costs, set(floats)) <= max_error:
                assert _time(costs, chosen) <= _time(costs, set(floats)) * (1 + 2e-3)


def test_what_the_user_fixed_stays() -> None:
    costs = [NodeCost("a", 1e-3, 9.0, 1.0, 400, 100), NodeCost("b", 1e-3, 9.0, 1.0, 400, 100)]
    assert choose_float_nodes(costs, max_error=1.0) == set()
    assert choose_float_nodes(costs, max_error=1.0, fixed={"b": "fp32"}) == {"b"}
    assert choose_float_nodes([], max_error=1.0) == set()


@pytest.mark.parametrize("cosine", [0.9, 0.99, 0.9999])
def test_an_independent_error_of_that_size_leaves_that_cosine(cosine: float) -> None:
    error = error_of_cosine(cosine)
    assert 1 / (1 + error) ** 0.5 == pytest.approx(cosine)


@settings(max_examples=40, deadline=None)
@given(COSTS)
def test_no_other_place_to_begin_with_8_bits_is_faster(costs: list[NodeCost]) -> None:
    chosen = choose_float_front(costs)
    fronts = [{cost.name for cost in costs[:count]} for count in range(len(costs) + 1)]
    assert chosen in fronts
    assert _time(costs, chosen) <= min(_time(costs, front) for front in fronts) + 1e-6


def test_a_front_takes_slower_nodes_along_where_that_pays() -> None:
    times = [(5.0, 9.0), (8.0, 7.0), (5.0, 9.0), (9.0, 5.0), (1.0, 2.0)]
    costs = [NodeCost(f"n{i}", 1e-3, floats, integers, 400, 100) for i, (floats, integers) in enumerate(times)]
    assert choose_float_front(costs) == {"n0", "n1", "n2"}
    assert choose_float_front(costs[3:4]) == set()
    assert choose_float_front([]) == set()
