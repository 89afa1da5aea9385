"""A search from demand to plan, on a model of two layers."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgeq.converters.gguf.quantize import assert_types
from edgeq.converters.gguf.sensitivity.evidence import Workshop
from edgeq.errors import UsageError
from edgeq.planner import search as module
from edgeq.planner.candidates import misses
from edgeq.planner.knapsack import Limits, Objective
from edgeq.planner.problem import Problem
from edgeq.planner.search import Demand, Goal, front_of, held_out_text, search, selection_text, solve_for
from edgeq.planner.solver import solve
from edgeq.profiles.llm.model_memory import file_bytes
from edgeq.types import Budget

MakeDemand = Callable[..., Demand]


@pytest.fixture(autouse=True)
def _short_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SELECTION_TOKENS", 300)
    monkeypatch.setattr(module, "_SELECTION_CHUNK", 64)


def _size(problem: Problem, share: float) -> int:
    """Bytes of a file between the smallest and the one without loss."""
    least, most = (
        file_bytes(problem.pricing.shape, problem.types(solve(problem.items, Limits(), q)))
        for q in ("file_bytes", "kld")
    )
    return round(least + share * (most - least))


@pytest.mark.parametrize(
    ("goal", "asked", "objective"),
    [
        (Goal(), Budget(), "kld"),
        (Goal(max_kld=0.1), Budget(), "file_bytes"),
        (Goal(max_kld=0.1, max_file_bytes=10**6), Budget(), "kld"),
        (Goal(max_kld=0.1), Budget(itl_ms=5.0), "kld"),
        (Goal(max_kld=0.1, minimize="ns"), Budget(itl_ms=5.0), "ns"),
        (Goal(min_top1=0.9), Budget(), "kld"),
        (Goal(minimize="memory_bytes"), Budget(), "memory_bytes"),
    ],
)
def test_what_is_minimised_follows_from_what_is_limited(goal: Goal, asked: Budget, objective: Objective) -> None:
    assert goal.objective(asked) == objective


def test_a_plan_without_trials_is_the_solvers(tiny_problem: Problem, make_demand: MakeDemand, shop: Workshop) -> None:
    demand = make_demand(Goal(max_file_bytes=_size(tiny_problem, 0.4)))
    found = search(tiny_problem, demand, trials=0, shop=shop)
    solution, _, _ = solve_for(tiny_problem, demand)
    assert found.types == tiny_problem.types(solution)
    assert found.file is None
    assert list(shop.folder.iterdir()) == []
    assert found.predicted == demand.predict(tiny_problem, found.types)
    assert found.predicted.file_bytes <= _size(tiny_problem, 0.4)
    record = found.record
    assert (record.trials, record.selection, record.selection_tokens) == ((), "", 0)
    assert (record.estimator, record.objective, record.compensated) == ("fisher", "kld", True)
    assert (record.predicted_kld, record.gap) == (solution.kld, solution.gap)
    assert record.costs == tiny_problem.costs_note
    text = tiny_problem.evidence.text
    assert (record.calibration.source, record.calibration.tokens) == ("self", text.n_tokens)
    assert (record.calibration.chunks, record.calibration.seed) == (len(text.chunks), 0)
    assert (record.calibration.text_sha256, record.calibration.importance) == (text.text_sha256, "fisher")


def test_trials_are_recorded_and_the_best_is_the_plan(
    tiny_problem: Problem, make_demand: MakeDemand, shop: Workshop
) -> None:
    demand = make_demand(Goal(max_file_bytes=_size(tiny_problem, 0.4)))
    found = search(tiny_problem, demand, trials=4, shop=shop)
    assert found.file is not None
    assert_types(found.file, found.types)
    assert found.file.stat().st_size == found.predicted.file_bytes
    chosen = next(trial for trial in found.record.trials if trial.chosen)
    assert chosen.measured_kld == min(trial.measured_kld for trial in found.record.trials)
    assert chosen.predicted_kld == pytest.approx(found.record.predicted_kld)
    assert 0.5 < chosen.measured_kld / chosen.predicted_kld < 2, "what was predicted is about what is measured"
    assert "half 'select'" in found.record.selection
    assert found.record.selection_tokens == 300


@pytest.mark.parametrize("minimize", ["file_bytes", "memory_bytes", "ns"])
def test_each_objective_is_the_least_that_the_limit_allows(
    minimize: Objective, tiny_problem: Problem, make_demand: MakeDemand, shop: Workshop
) -> None:
    demand = make_demand(Goal(max_kld=0.01, minimize=minimize))
    found = search(tiny_problem, demand, trials=3, shop=shop)
    assert found.record.objective == minimize
    assert next(t for t in found.record.trials if t.chosen).measured_kld <= 0.01
    other = search(tiny_problem, make_demand(Goal(max_kld=0.002, minimize=minimize)), trials=3, shop=shop)
    field = {"file_bytes": "file_bytes", "memory_bytes": "peak_memory_bytes", "ns": "itl_ms"}[minimize]
    assert getattr(found.predicted, field) < getattr(other.predicted, field)


def test_every_limit_of_the_device_is_kept(tiny_problem: Problem, make_demand: MakeDemand, shop: Workshop) -> None:
    free = search(tiny_problem, make_demand(), trials=0, shop=shop).predicted
    least = search(tiny_problem, make_demand(Goal(minimize="ns")), trials=0, shop=shop).predicted
    for name in ("itl_ms", "ttft_ms", "tokens_per_s", "peak_memory_bytes"):
        limit = (getattr(free, name) + getattr(least, name)) / 2
        budget = Budget(**{name: round(limit) if name == "peak_memory_bytes" else limit})
        demand = make_demand(budget=budget)
        found = search(tiny_problem, demand, trials=0, shop=shop).predicted
        assert not [miss for miss in misses(found, demand.budget) if miss.excess > 1e-6]
        assert misses(free, demand.budget)


# Texts


def test_selection_and_judgement_are_of_different_text(tiny_problem: Problem) -> None:
    reference = tiny_problem.evidence.header.path
    select, judge = selection_text(reference), held_out_text(reference, None, 300)
    assert select.n_tokens == judge.n_tokens == 300
    assert select.text_sha256 != judge.text_sha256
    assert {select.name.split("half ")[1], judge.name.split("half ")[1]} == {"'select'", "'judge'"}


def test_a_text_of_the_users_to_judge_by(tiny_problem: Problem, tmp_path: Path) -> None:
    reference, file = tiny_problem.evidence.header.path, tmp_path / "held-out.txt"
    file.write_text("the camera waits for the robot and moves its arm to the shelf " * 30)
    text = held_out_text(reference, file, 200)
    assert (text.source, text.name, text.n_tokens) == ("file", "held-out.txt", 200)
    file.write_text("too short")
    with pytest.raises(UsageError, match=r"held-out\.txt gives \d tokens, and 128 are needed"):
        held_out_text(reference, file, 4096)


# The front


def test_the_front_falls_and_solves_agree_with_it(tiny_problem: Problem, make_demand: MakeDemand) -> None:
    demand = make_demand(Goal(max_kld=0.001))  # the goal is left out
    points = front_of(tiny_problem, demand, points=12)
    assert 5 <= len(points) <= 12
    for (_, a, a_kld), (_, b, b_kld) in itertools.pairwise(points):
        assert a.file_bytes < b.file_bytes
        assert a_kld > b_kld
    assert points[0][1].file_bytes == _size(tiny_problem, 0.0)
    assert points[-1][2] == 0.0
    for types, predicted, kld in points:
        assert predicted == demand.predict(tiny_problem, types)
        solution, _, _ = solve_for(tiny_problem, make_demand(Goal(max_file_bytes=predicted.file_bytes)))
        assert solution.kld <= kld * (1 + 1e-9) + 1e-15
    half = _size(tiny_problem, 0.5)
    assert all(p.file_bytes <= half for _, p, _ in front_of(tiny_problem, demand, max_file_bytes=half))


def test_the_front_stays_within_the_device(tiny_problem: Problem, make_demand: MakeDemand) -> None:
    points: list[Any] = front_of(tiny_problem, make_demand(), points=12)
    itl = points[len(points) // 2][1].itl_ms
    demand = make_demand(budget=Budget(itl_ms=itl))
    within = front_of(tiny_problem, demand, points=8)
    assert all(not [m for m in misses(p, demand.budget) if m.excess > 1e-6] for _, p, _ in within)
    assert within[-1][2] > 0


def test_pinned_tensors_stay_what_they_are(tiny_problem: Problem, make_demand: MakeDemand, shop: Workshop) -> None:
    name = "token_embd.weight"
    items = [
        dataclasses.replace(item, options=tuple(o for o in item.options if o.type == "q8_0" or item.name != name))
        for item in tiny_problem.items
    ]
    pinned = dataclasses.replace(tiny_problem, items=items)
    for trials in (0, 2):
        found = search(pinned, make_demand(Goal(minimize="file_bytes")), trials=trials, shop=shop)
        assert found.types[name] == "q8_0"
        assert set(found.types.values()) <= {"f32", "q8_0", "q4_0", "iq4_nl"}
