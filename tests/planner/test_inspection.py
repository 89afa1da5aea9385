"""The last word on quality: what is measured, what of it is a limit, and what follows where a limit is missed."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edgeq.converters.gguf.quantize import assert_types, quantizable_tensors, quantize
from edgeq.converters.gguf.sensitivity.evidence import Workshop
from edgeq.errors import BudgetError, UsageError
from edgeq.planner import inspection as module
from edgeq.planner import search as search_module
from edgeq.planner.inspection import Inspector, QualityOptions, judged_plan
from edgeq.planner.plan import Request
from edgeq.planner.problem import Problem, SearchOptions
from edgeq.planner.search import Demand, Goal, held_out_text
from edgeq.quality import Interval, Quality
from edgeq.types import Budget

MakeDemand = Callable[..., Demand]


@pytest.fixture(autouse=True)
def _short_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_module, "_SELECTION_TOKENS", 300)
    monkeypatch.setattr(search_module, "_SELECTION_CHUNK", 64)


def _inspector(problem: Problem, goal: Goal | None = None, *, tokens: int | None = 400, **options: Any) -> Inspector:
    return Inspector(
        problem.evidence.header.path, QualityOptions(tokens=tokens, **options), goal or Goal(), 1, lambda *_: None
    )


@pytest.fixture
def artifact(tiny_problem: Problem, tmp_path: Path) -> Path:
    """The tiny model in Q4_0."""
    header = tiny_problem.evidence.header
    free = quantizable_tensors(header.path)
    types = {name: "q4_0" if name in free else tensor.type for name, tensor in header.tensors.items()}
    quantize(header.path, tmp_path / "q4_0.gguf", types, threads=1)
    return tmp_path / "q4_0.gguf"


def test_the_figures_of_an_artifact(tiny_problem: Problem, artifact: Path) -> None:
    quality = _inspector(tiny_problem).judge(artifact, tiny_problem.evidence)
    assert quality is not None
    assert (quality.tokens, quality.chunk_tokens, quality.reference, quality.overlap) == (400, 64, "f16", 0.0)
    assert quality.mean_kld_interval.low is not None
    assert quality.mean_kld_interval.high is not None
    assert quality.mean_kld_interval.low < quality.mean_kld < quality.mean_kld_interval.high
    assert abs(quality.noise_floor_kld) < 0.1 * quality.mean_kld
    assert "half 'judge'" in quality.text
    again = _inspector(tiny_problem).judge(artifact, None)
    assert again is not None
    assert (again.mean_kld, again.overlap) == (quality.mean_kld, None)
    assert _inspector(tiny_problem, tokens=0).judge(artifact, None) is None


def test_a_preset_is_judged_on_less_than_a_search(
    tiny_problem: Problem, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "USUAL_TOKENS", 256)
    monkeypatch.setattr(module, "_TOKENS_OF_PRESET", 128)
    for goal, evidence, tokens in (
        (Goal(), None, 128),
        (Goal(max_kld=1.0), None, 256),
        (Goal(), tiny_problem.evidence, 256),
    ):
        quality = _inspector(tiny_problem, goal, tokens=None).judge(artifact, evidence)
        assert quality is not None
        assert quality.tokens == tokens


def test_the_calibration_text_is_no_text_to_judge_by(
    tiny_problem: Problem, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "text.txt"
    file.write_text("the camera waits for the robot and moves its arm to the shelf " * 30)
    inspector = _inspector(tiny_problem, text=file)
    text = search_module.held_out_text(tiny_problem.evidence.header.path, file, 400)
    calibrated = dataclasses.replace(tiny_problem.evidence, text=text)
    with pytest.raises(UsageError, match="both the calibration text and the text to judge by"):
        inspector.judge(artifact, calibrated)
    monkeypatch.setattr(module, "Judge", lambda *_a, **_k: pytest.fail("measured first"))
    with pytest.raises(UsageError):
        inspector.judge(artifact, calibrated)


def test_limits_are_judged_by_the_interval_and_named(tiny_problem: Problem, artifact: Path) -> None:
    quality = _inspector(tiny_problem).judge(artifact, None)
    assert quality is not None
    high, low = quality.mean_kld_interval.high, quality.mean_kld_interval.low
    assert high is not None
    assert low is not None

    def missed(max_kld: float | None = None, min_top1: float | None = None) -> list[str]:
        return _inspector(tiny_problem, Goal(max_kld=max_kld, min_top1=min_top1)).missed(quality, None)

    assert missed() == missed(max_kld=high) == missed(min_top1=0.0) == []
    assert "FAIL" in missed(max_kld=0.99 * low)[0]
    between = missed(max_kld=(quality.mean_kld + high) / 2)
    assert "INSUFFICIENT" in between[0]
    assert "more tokens" in between[0]
    assert [line.split(" ")[0] for line in missed(max_kld=0.9 * low, min_top1=1.0)] == ["mean", "same"]
    with pytest.raises(BudgetError, match="misses its quality limit: mean KL divergence") as error:
        _inspector(tiny_problem, Goal(max_kld=0.9 * low, min_top1=1.0)).refuse_missed(quality, 0.1)
    assert len(error.value.details) == 1
    assert _inspector(tiny_problem).missed(None, None) == []
    unmeasured = _inspector(tiny_problem, Goal(max_kld=1.0)).missed(None, None)
    assert unmeasured == ["quality is limited and was not measured"]


def test_each_judgement_has_a_text_of_its_own(tiny_problem: Problem, tmp_path: Path) -> None:
    reference = tiny_problem.evidence.header.path
    parts = [held_out_text(reference, None, 400, part) for part in range(3)]
    assert all(300 < text.n_tokens == sum(map(len, text.chunks)) <= 400 for text in parts)
    for one, other in itertools.combinations(parts, 2):
        assert not {chunk.tobytes() for chunk in one.chunks} & {chunk.tobytes() for chunk in other.chunks}
    # A file that is too short for a second part is read again.
    path = tmp_path / "short.txt"
    path.write_text("the robot moves its arm to the shelf and waits for the camera " * 20)
    first, second = (held_out_text(reference, path, 400, part) for part in (0, 2))
    assert [text.name for text in (*parts[1:], first, second)] == [
        f"{parts[0].name}, part 2",
        f"{parts[0].name}, part 3",
        "short.txt",
        "short.txt, read 3 times",
    ]
    assert [chunk.tolist() for chunk in first.chunks] == [chunk.tolist() for chunk in second.chunks]


# Searching again


def _judged(
    problem: Problem, demand: Demand, shop: Workshop, out: Path, *, trials: int = 3, **inspector: Any
) -> tuple[Any, Quality | None]:
    return judged_plan(
        problem,
        demand,
        Request(),
        SearchOptions(trials=trials),
        shop,
        ("note",),
        _inspector(problem, demand.goal, **inspector),
        out,
    )


def test_a_plan_with_its_file_and_its_quality(
    tiny_problem: Problem, make_demand: MakeDemand, shop: Workshop, tmp_path: Path
) -> None:
    out = tmp_path / "model.gguf"
    found, quality = _judged(tiny_problem, make_demand(Goal(max_file_bytes=120_000)), shop, out, trials=0)
    assert_types(out, found.plan.tensor_types)
    assert out.stat().st_size == found.plan.predicted.file_bytes <= 120_000
    assert list(shop.folder.iterdir()) == []
    assert len(found.plan.search.trials) == 1, "the file has to be made"
    assert found.plan.notes[0] == "note"
    assert (found.plan.context_tokens, found.plan.ubatch_tokens, found.plan.gpu_layers) == (256, 64, 0)
    assert quality is not None
    assert quality.overlap == 0.0
    assert 0.3 < quality.mean_kld / found.plan.search.predicted_kld < 3


class _Judgements:
    """Quality that a function makes of the mean KL on the selection text, as the real inspector would report it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
        self.uppers: list[float] = []
        self.parts: list[int] = []
        real = Inspector.judge

        def judge(inspector: Inspector, artifact: Path, evidence: Any, *, kv_type: str, part: int) -> Quality | None:
            quality = real(inspector, artifact, evidence, kv_type=kv_type, part=part)
            self.parts.append(part)
            assert quality is not None
            mean = factor * quality.mean_kld
            self.uppers.append(1.05 * mean)
            interval = Interval(low=0.95 * mean, high=1.05 * mean)
            return msgspec.structs.replace(quality, mean_kld=mean, mean_kld_interval=interval)

        monkeypatch.setattr(Inspector, "judge", judge)


def test_a_limit_missed_on_the_held_out_text_is_searched_for_again(
    tiny_problem: Problem, make_demand: MakeDemand, shop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judgements = _Judgements(monkeypatch, 1.3)
    demand = make_demand(Goal(max_kld=0.01))
    found, quality = _judged(tiny_problem, demand, shop, tmp_path / "model.gguf")
    assert 2 <= len(judgements.uppers) <= 3
    assert judgements.uppers[0] > 0.01 >= judgements.uppers[-1]
    assert judgements.parts == list(range(len(judgements.uppers))), "each on a text of its own"
    assert quality is not None
    assert quality.mean_kld <= 0.01
    assert_types(tmp_path / "model.gguf", found.plan.tensor_types)


def test_with_bytes_limited_there_is_nothing_closer_to_search_for(
    tiny_problem: Problem, make_demand: MakeDemand, shop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judgements = _Judgements(monkeypatch, 20.0)
    demand = make_demand(Goal(max_kld=0.02, max_file_bytes=120_000))
    with pytest.raises(BudgetError, match=r"misses its quality limit: mean KL divergence .*limit 0\.02: FAIL"):
        _judged(tiny_problem, demand, shop, tmp_path / "model.gguf")
    assert len(judgements.uppers) == 1


def test_what_cannot_be_reached_names_the_users_limit_and_not_an_inner_one(
    tiny_problem: Problem, make_demand: MakeDemand, shop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _Judgements(monkeypatch, 1e6)
    demand = make_demand(Goal(max_kld=0.03, minimize="file_bytes"), Budget(itl_ms=0.5105))
    with pytest.raises(BudgetError, match=r"misses its quality limit: .*limit 0\.03"):
        _judged(tiny_problem, demand, shop, tmp_path / "model.gguf")


def test_a_gate_on_the_most_likely_token(
    tiny_problem: Problem, make_demand: MakeDemand, shop: Workshop, tmp_path: Path
) -> None:
    strict, loose = (make_demand(Goal(min_top1=share, max_file_bytes=75_000)) for share in (0.999, 0.3))
    with pytest.raises(BudgetError, match="same top token"):
        _judged(tiny_problem, strict, shop, tmp_path / "a.gguf")
    _, quality = _judged(tiny_problem, loose, shop, tmp_path / "b.gguf")
    assert quality is not None
    assert quality.top1 > 0.3


def test_a_limit_that_is_not_measured_is_missed(
    tiny_problem: Problem, make_demand: MakeDemand, shop: Workshop, tmp_path: Path
) -> None:
    with pytest.raises(BudgetError, match="was not measured"):
        _judged(tiny_problem, make_demand(Goal(max_kld=0.5)), shop, tmp_path / "model.gguf", tokens=0)
