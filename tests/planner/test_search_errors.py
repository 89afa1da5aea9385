"""What an impossible demand is told: both limits, and ways out that really lead out."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable

import msgspec
import pytest

from edgeq.errors import BudgetError
from edgeq.planner.candidates import misses
from edgeq.planner.knapsack import Limits
from edgeq.planner.problem import Problem
from edgeq.planner.search import Demand, Goal, front_of, solve_for
from edgeq.planner.solver import solve
from edgeq.types import Budget, Prediction
from edgeq.units import parse_bytes, parse_ms, parse_rate

MakeDemand = Callable[..., Demand]


def _with(demand: Demand, ways: str) -> Demand:
    """A demand with the limits that a remedy names."""
    for option, value in re.findall(r"(--[a-z0-9-]+) ([^\s,;]*[^\s,;.])", ways):
        goal, changes = demand.goal, {}
        if option == "--max-size":
            goal = dataclasses.replace(goal, max_file_bytes=parse_bytes(value))
        elif option == "--max-kld":
            goal = dataclasses.replace(goal, max_kld=float(value))
        else:
            field, parse = {
                "--max-memory": ("peak_memory_bytes", parse_bytes),
                "--max-itl": ("itl_ms", parse_ms),
                "--max-ttft": ("ttft_ms", parse_ms),
                "--min-tps": ("tokens_per_s", parse_rate),
            }[option]
            changes = {field: parse(value)}
        demand = dataclasses.replace(demand, goal=goal, budget=msgspec.structs.replace(demand.budget, **changes))
    return demand


def _extremes(problem: Problem, demand: Demand) -> tuple[Prediction, Prediction]:
    """Predictions of the smallest mix and of the one without loss."""
    smallest, best = (problem.types(solve(problem.items, Limits(), q)) for q in ("file_bytes", "kld"))
    return demand.predict(problem, smallest), demand.predict(problem, best)


def _refusal(problem: Problem, demand: Demand) -> BudgetError:
    with pytest.raises(BudgetError) as caught:
        solve_for(problem, demand)
    assert "\n" not in str(caught.value)
    return caught.value


def _check_ways_out(problem: Problem, demand: Demand, error: BudgetError) -> None:
    assert error.remedy.startswith("Use --")
    for ways in error.remedy.removeprefix("Use ").split(" or "):
        solution, _, _ = solve_for(problem, _with(demand, ways))
        goal = _with(demand, ways).goal
        assert goal.max_kld is None or solution.kld <= goal.max_kld * (1 + 1e-6)
        predicted = demand.predict(problem, problem.types(solution))
        assert not [
            miss for miss in misses(predicted, _with(demand, ways).budget, goal.max_file_bytes) if miss.excess > 1e-6
        ]


LIMITS = {
    "size": ("file size <=", "--max-size"),
    "memory": ("peak memory <=", "--max-memory"),
    "itl": ("time of a token <=", "--max-itl"),
    "tps": ("decode speed >=", "--min-tps"),
    "ttft": ("time to first token <=", "--max-ttft"),
    "kld": ("mean KL divergence <=", "--max-kld"),
}


def _demand(make_demand: MakeDemand, least: Prediction, names: tuple[str, ...], scale: float) -> Demand:
    """Limits at ``scale`` of the smallest mix's figures."""
    budget = Budget(
        peak_memory_bytes=round(least.peak_memory_bytes * scale) if "memory" in names else None,
        itl_ms=least.itl_ms * scale if "itl" in names else None,
        tokens_per_s=least.tokens_per_s / scale if "tps" in names else None,
        ttft_ms=least.ttft_ms * scale if "ttft" in names else None,
    )
    goal = Goal(
        max_file_bytes=round(least.file_bytes * scale) if "size" in names else None,
        max_kld=1e-9 if "kld" in names else None,
    )
    return make_demand(goal, budget)


@pytest.mark.parametrize("name", [name for name in LIMITS if name != "kld"])
def test_one_limit_below_the_least(name: str, tiny_problem: Problem, make_demand: MakeDemand) -> None:
    least, _ = _extremes(tiny_problem, make_demand())
    demand = _demand(make_demand, least, (name,), 0.9)
    error = _refusal(tiny_problem, demand)
    label, option = LIMITS[name]
    assert re.match(f"No mix of types has {label} .*: the least .* is [0-9.]+[A-Za-z]+$", error.cause)
    assert option in error.remedy
    _check_ways_out(tiny_problem, demand, error)


@pytest.mark.parametrize("name", [name for name in LIMITS if name != "kld"])
def test_two_limits_that_contradict_each_other(name: str, tiny_problem: Problem, make_demand: MakeDemand) -> None:
    """Each can be met alone: next to no loss in next to no bytes cannot."""
    least, _ = _extremes(tiny_problem, make_demand())
    demand = _demand(make_demand, least, (name, "kld"), 1.0001)
    error = _refusal(tiny_problem, demand)
    for label, option in (LIMITS[name], LIMITS["kld"]):
        assert label in error.cause
        assert option in error.remedy
    assert error.cause.endswith("at once")
    assert [d.split()[0] for d in error.details] == ["the", "the", "together"]
    _check_ways_out(tiny_problem, demand, error)


def test_a_way_out_names_all_limits_in_the_way(tiny_problem: Problem, make_demand: MakeDemand) -> None:
    least, _ = _extremes(tiny_problem, make_demand())
    demand = _demand(make_demand, least, ("itl", "tps", "ttft"), 0.9)
    error = _refusal(tiny_problem, demand)
    assert all(LIMITS[name][1] in error.remedy for name in ("itl", "tps", "ttft"))
    _check_ways_out(tiny_problem, demand, error)


def test_limits_that_can_be_met_are_not_blamed(tiny_problem: Problem, make_demand: MakeDemand) -> None:
    least, most = _extremes(tiny_problem, make_demand())
    goal = Goal(max_file_bytes=round(0.9 * least.file_bytes), max_kld=10.0)
    error = _refusal(tiny_problem, make_demand(goal, Budget(itl_ms=2 * most.itl_ms)))
    assert "file size" in error.cause
    assert "KL" not in error.cause
    assert "time" not in error.cause


def test_memory_beyond_the_device_is_no_way_out(tiny_problem: Problem, make_demand: MakeDemand) -> None:
    profile = tiny_problem.pricing.profile
    memory = msgspec.structs.replace(profile.memory, visible_bytes=profile.memory.reserved_bytes + 2**20)
    small = msgspec.structs.replace(profile, memory=memory)
    problem = dataclasses.replace(tiny_problem, pricing=dataclasses.replace(tiny_problem.pricing, profile=small))
    demand = dataclasses.replace(make_demand(), budget=Budget(peak_memory_bytes=small.memory.usable_bytes))
    error = _refusal(problem, demand)
    assert "--max-memory" not in error.remedy
    assert "Use a shorter --context or a smaller --kv-type (1.00 MiB are all there is)" in error.remedy


def test_a_front_within_an_impossible_budget(tiny_problem: Problem, make_demand: MakeDemand) -> None:
    least, _ = _extremes(tiny_problem, make_demand())
    with pytest.raises(BudgetError, match=r"peak memory <= .*Use --max-memory"):
        front_of(tiny_problem, _demand(make_demand, least, ("memory",), 0.9))


def test_every_pair_of_tight_limits_has_ways_out(tiny_problem: Problem, make_demand: MakeDemand) -> None:
    least, _ = _extremes(tiny_problem, make_demand())
    for names in itertools.combinations(LIMITS, 2):
        demand = _demand(make_demand, least, names, 0.97)
        _check_ways_out(tiny_problem, demand, _refusal(tiny_problem, demand))
