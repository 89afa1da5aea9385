"""What a picture of bytes against quality shows, on a model of two layers."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import msgspec
import pytest

from edgeq.converters.gguf.recipe import parse_override
from edgeq.converters.gguf.sensitivity.evidence import EvidenceRequest
from edgeq.errors import BudgetError, UsageError
from edgeq.planner.convert import Job, plan_only
from edgeq.planner.front import Front, look_at_front, predicted_kld
from edgeq.planner.plan import Request
from edgeq.planner.problem import Problem, SearchOptions
from edgeq.planner.search import Demand, Goal
from edgeq.types import Budget, Plan

Looked = tuple[Front, Problem, Demand, Plan]


class TinyHf(Protocol):
    """The ``tiny_hf`` fixture."""

    def __call__(self, case: str = ..., *, width: int = ...) -> Path: ...


@pytest.fixture(scope="module")
def model(tiny_hf: TinyHf) -> Path:
    return tiny_hf("llama-untied")


def _look(
    model: Path,
    folder: Path,
    *,
    overrides: tuple[str, ...] = (),
    budget: Budget | None = None,
    goal: Goal | None = None,
    meanwhile: Callable[[Front, Problem, Demand, Plan], None] = lambda *_: None,
) -> Looked:
    """What is seen while the float GGUF is there; ``meanwhile`` is called with it then."""
    evidence = EvidenceRequest(estimator="imatrix", tokens=512)
    job = Job(
        str(model),
        "laptop-cpu",
        budget=budget or Budget(),
        request=Request(overrides=tuple(map(parse_override, overrides))),
        threads=1,
        goal=Goal(max_file_bytes=95_000) if goal is None else goal,
        search=SearchOptions(evidence=evidence, decode_costs="profile"),
    )
    seen: list[Looked] = []

    def look(problem: Problem, demand: Demand, plan: Plan) -> None:
        seen.append((look_at_front(problem, demand, plan, job.request.overrides), problem, demand, plan))
        meanwhile(*seen[0])

    _, _, plan = plan_only(job, folder / "plan", look=look)
    assert seen[0][3] == plan
    return seen[0]


@pytest.fixture(scope="module")
def looked(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Looked:
    return _look(model, tmp_path_factory.mktemp("front"))


def test_mixes_are_undominated_and_reach_from_the_smallest_preset_to_the_largest(looked: Looked) -> None:
    front, _, _, _ = looked
    assert len(front.mixes) > 10
    for smaller, larger in itertools.pairwise(front.mixes):
        assert smaller.predicted.file_bytes < larger.predicted.file_bytes
        assert smaller.predicted_kld > larger.predicted_kld
    sizes = [point.predicted.file_bytes for point in front.presets]
    assert front.mixes[0].predicted.file_bytes <= sizes[0]
    assert sizes[-2] < front.mixes[-1].predicted.file_bytes <= sizes[-1]


def test_no_point_is_better_than_the_mixes(looked: Looked) -> None:
    """A mix that is no larger than a point, and the mix after it, enclose what the point can reach."""
    front, _, _, _ = looked
    for point in (front.chosen, *front.presets):
        larger = [m for m in front.mixes if m.predicted.file_bytes >= point.predicted.file_bytes]
        assert not larger or point.predicted_kld >= min(m.predicted_kld for m in larger) * (1 - 1e-3)
    # The optimum for its size lies on the front itself.
    below = [m for m in front.mixes if m.predicted.file_bytes <= front.chosen.predicted.file_bytes]
    assert front.chosen.predicted_kld <= below[-1].predicted_kld


def test_the_plan_and_the_presets_are_priced_by_one_table(looked: Looked) -> None:
    front, problem, demand, plan = looked
    assert plan.search is not None
    assert front.chosen.predicted_kld == pytest.approx(plan.search.predicted_kld)
    assert front.chosen.predicted == plan.predicted == demand.predict(problem, plan.tensor_types)
    labels = [label for point in front.presets for label in point.labels]
    assert len(labels) == len(set(labels))
    assert not set(labels) & set(front.left_out)
    assert not {"f16", "bf16", "f32"} & {*labels, *front.left_out}
    q8_0 = next(point for point in front.presets if "q8_0" in point.labels)
    uniform = {name: "q8_0" if name in {i.name for i in problem.items} else kind for name, kind in problem.base.items()}
    assert q8_0.predicted_kld == predicted_kld(problem, uniform)
    assert predicted_kld(problem, dict.fromkeys(problem.base, "iq1_s")) is None


def test_overrides_hold_for_the_presets_too(model: Path, tmp_path: Path) -> None:
    front, problem, _, plan = _look(model, tmp_path, overrides=("attn_k=q8_0",))
    assert {kind for name, kind in plan.tensor_types.items() if "attn_k" in name} == {"q8_0"}
    assert {len(item.options) for item in problem.items if "attn_k" in item.name} == {1}
    assert front.presets
    free, _, _, _ = _look(model, tmp_path)
    assert front.presets[0].predicted.file_bytes > free.presets[0].predicted.file_bytes


def test_mixes_keep_the_budget_of_the_device_and_presets_need_not(model: Path, looked: Looked, tmp_path: Path) -> None:
    fastest = looked[0].mixes[0].predicted
    middle = looked[0].mixes[len(looked[0].mixes) // 2].predicted
    limit = (fastest.itl_ms + middle.itl_ms) / 2
    front, _, _, plan = _look(model, tmp_path, budget=Budget(itl_ms=limit))
    assert plan.predicted.itl_ms <= limit
    assert all(point.predicted.itl_ms <= limit * (1 + 1e-6) for point in front.mixes)
    assert any(point.predicted.itl_ms > limit for point in front.presets)


def test_a_plan_that_needs_no_search_has_a_front_too(
    model: Path, looked: Looked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing_fits(*_: object, **__: object) -> None:
        raise BudgetError("no mix", "more")

    def meanwhile(front: Front, problem: Problem, demand: Demand, plan: Plan) -> None:
        unknown = msgspec.structs.replace(plan, tensor_types=dict.fromkeys(problem.base, "iq1_s"))
        with pytest.raises(UsageError, match="not priced"):
            look_at_front(problem, demand, unknown, ())
        monkeypatch.setattr("edgeq.planner.front.front_of", nothing_fits)
        assert look_at_front(problem, demand, plan, ()) == dataclasses.replace(front, mixes=())
        with pytest.raises(BudgetError, match="no mix"):
            look_at_front(problem, demand, msgspec.structs.replace(plan, search=search), ())

    search = looked[3].search
    assert search is not None
    front, problem, _, plan = _look(model, tmp_path, goal=Goal(), meanwhile=meanwhile)
    assert (plan.preset, plan.search) == ("f16", None)
    assert (front.chosen.labels, front.chosen.predicted_kld) == (("f16",), 0)
    assert front.chosen.predicted.file_bytes == plan.predicted.file_bytes
    assert len(front.mixes) > 10
    in_bf16 = {name: "bf16" if kind == "f16" else kind for name, kind in plan.tensor_types.items()}
    assert predicted_kld(problem, in_bf16) == 0


def test_presets_and_recipes_are_not_looked_at(model: Path, tmp_path: Path) -> None:
    job = Job(str(model), "laptop-cpu", request=Request(preset="q8_0"), threads=1)

    def look(problem: Problem, demand: Demand, plan: Plan) -> None:
        pytest.fail("there was no search")

    assert plan_only(job, tmp_path / "plan", look=look)[2].preset == "q8_0"
