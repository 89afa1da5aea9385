"""Which mix wins: with llama.cpp's real figures, and with made-up ones where every turn of the search is wanted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from edgeq.converters.calibration.texts import TokenText
from edgeq.converters.gguf.divergence import Divergence, Judge
from edgeq.converters.gguf.header import read_header
from edgeq.converters.gguf.quantize import assert_types
from edgeq.converters.gguf.sensitivity.evidence import Workshop
from edgeq.errors import BudgetError
from edgeq.planner import trials as module
from edgeq.planner.knapsack import Limits, Objective, Solution
from edgeq.planner.problem import Problem
from edgeq.planner.solver import solve
from edgeq.planner.trials import Judged, run_trials, within
from edgeq.profiles.llm.model_memory import file_bytes


def _text(seed: int = 1, n_chunks: int = 4, length: int = 48) -> TokenText:
    rng = np.random.default_rng(seed)
    chunks = tuple(rng.integers(2, 320, length).astype(np.int32) for _ in range(n_chunks))
    return TokenText(chunks, "x" * 64, "builtin", "noise", None, n_chunks * length)


def _middle(problem: Problem, share: float = 0.4) -> Limits:
    least, most = (solve(problem.items, Limits(), q).file_bytes for q in ("file_bytes", "kld"))
    return Limits(file_bytes=round(least + share * (most - least)))


def _run(
    problem: Problem,
    shop: Workshop,
    limits: Limits,
    objective: Objective = "kld",
    *,
    trials: int = 4,
) -> Judged:
    first = within(problem.items, limits, objective, limits.kld)
    return run_trials(
        problem,
        limits,
        objective,
        first,
        text=_text(),
        kv_type="f16",
        trials=trials,
        shop=shop,
    )


def test_the_least_measured_kl_wins_and_its_file_is_what_was_measured(tiny_problem: Problem, shop: Workshop) -> None:
    limits = _middle(tiny_problem)
    found = _run(tiny_problem, shop, limits)
    assert found.trials[0].label == "predicted optimum"
    assert 2 <= len(found.trials) <= 4
    chosen = [trial for trial in found.trials if trial.chosen]
    assert len(chosen) == 1
    assert chosen[0].measured_kld == min(trial.measured_kld for trial in found.trials)
    assert list(shop.folder.iterdir()) == [found.file]
    types = tiny_problem.types(found.best)
    assert_types(found.file, types)
    assert found.file.stat().st_size == file_bytes(tiny_problem.pricing.shape, types) == chosen[0].file_bytes
    with Judge(tiny_problem.evidence.header.path, _text().chunks, threads=1) as judge:
        assert judge.compare([found.file])[0].mean_kld == pytest.approx(chosen[0].measured_kld)
    assert limits.file_bytes is not None
    assert found.best.file_bytes <= limits.file_bytes
    true = {(item.name, option.type): option.kld for item in tiny_problem.items for option in item.options}
    assert chosen[0].predicted_kld == pytest.approx(sum(true[pair] for pair in found.best.types.items()))
    best = min(trial.predicted_kld for trial in found.trials)
    assert best == found.trials[0].predicted_kld, "nothing is predicted to be better than the optimum"
    # The gap is that to the optimum of the problem that was posed, not of a neighbour's.
    assert found.best.gap >= 1 - best / chosen[0].predicted_kld - 1e-9


def test_the_same_again(tiny_problem: Problem, shop: Workshop) -> None:
    limits = _middle(tiny_problem)
    one, two = (_run(tiny_problem, shop, limits, trials=3) for _ in range(2))
    assert (one.trials, one.best) == (two.trials, two.best)


def test_one_trial_measures_the_optimum_only(tiny_problem: Problem, shop: Workshop) -> None:
    found = _run(tiny_problem, shop, _middle(tiny_problem), trials=1)
    assert [(trial.label, trial.chosen) for trial in found.trials] == [("predicted optimum", True)]


def test_a_mix_is_never_measured_twice(tiny_problem: Problem, shop: Workshop) -> None:
    """Without a limit there is one optimum, whatever the sensitivities are, so only the next best is another mix."""
    found = _run(tiny_problem, shop, Limits(), trials=5)
    assert [trial.label for trial in found.trials] == ["predicted optimum", "predicted rank 2"]
    assert set(found.best.types.values()) == {"f16"}


# Made-up figures


class _FakeJudge:
    """Measures what a function makes of the prediction; counts the files that lie there meanwhile."""

    def __init__(self, problem: Problem, shop: Workshop, measured: Callable[[float, dict[str, str]], float]) -> None:
        self.true = {(item.name, option.type): option.kld for item in problem.items for option in item.options}
        self.folder, self.measured = shop.folder, measured
        self.most_files = 0

    def __call__(self, *_args: object, **_options: object) -> _FakeJudge:
        return self

    def __enter__(self) -> _FakeJudge:
        return self

    def __exit__(self, *_raised: object) -> None:
        pass

    def compare(self, files: Sequence[Path], *, kv_type: str) -> list[Divergence]:
        assert kv_type == "f16"
        self.most_files = max(self.most_files, len(list(self.folder.iterdir())))
        types = {name: tensor.type for name, tensor in read_header(files[0]).tensors.items()}
        predicted = sum(self.true.get(pair, 0.0) for pair in types.items())
        kld: npt.NDArray[np.float64] = np.full(8, self.measured(predicted, types))
        flags = np.ones(8, bool)
        return [Divergence(kld, flags, np.zeros(8, np.int32), np.zeros(7), np.zeros(7))]


@pytest.fixture
def fake(tiny_problem: Problem, shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> Callable[..., _FakeJudge]:
    def make(measured: Callable[[float, dict[str, str]], float]) -> _FakeJudge:
        judge = _FakeJudge(tiny_problem, shop, measured)
        monkeypatch.setattr(module, "Judge", judge)
        return judge

    return make


def _at(problem: Problem, kld: float) -> Solution:
    return solve(problem.items, Limits(kld=kld), "file_bytes")


def test_a_neighbour_that_measures_better_is_taken(
    tiny_problem: Problem, shop: Workshop, fake: Callable[..., _FakeJudge]
) -> None:
    """Every mix but the predicted optimum is said to be better, each more than the last."""
    seen: list[float] = []

    def worse_first(predicted: float, _types: dict[str, str]) -> float:
        seen.append(predicted)
        return predicted / len(seen)

    judge = fake(worse_first)
    found = _run(tiny_problem, shop, _middle(tiny_problem, 0.3), trials=30)
    assert len(found.trials) == len(seen) > 2
    assert found.trials[-1].chosen
    assert judge.most_files == 2, "the best so far and the one in work"
    assert list(shop.folder.iterdir()) == [found.file]
    labels = [trial.label for trial in found.trials]
    kinds = [label.rsplit(" ", 1)[0] for label in labels]
    assert list(dict.fromkeys(kinds)) == ["predicted", "predicted rank", "neighbour"]


@pytest.mark.parametrize("factor", [0.3, 0.8, 1.25, 3.0])
def test_a_limit_on_quality_is_met_closely_whatever_predictions_are_off_by(
    factor: float, tiny_problem: Problem, shop: Workshop, fake: Callable[..., _FakeJudge]
) -> None:
    judge = fake(lambda predicted, _types: factor * predicted**0.95)
    limit = 0.02
    found = _run(tiny_problem, shop, Limits(kld=limit), "file_bytes", trials=6)
    chosen = next(trial for trial in found.trials if trial.chosen)
    assert chosen.measured_kld <= limit
    assert chosen.file_bytes == min(t.file_bytes for t in found.trials if t.measured_kld <= limit)
    # With the true relation known, this is what the solver would have found.
    ideal = _at(tiny_problem, (limit / factor) ** (1 / 0.95))
    assert found.best.file_bytes <= 1.05 * ideal.file_bytes
    assert judge.most_files <= 2
    assert list(shop.folder.iterdir()) == [found.file]


def test_few_trials_still_move_towards_the_limit(
    tiny_problem: Problem, shop: Workshop, fake: Callable[..., _FakeJudge]
) -> None:
    fake(lambda predicted, _types: 2 * predicted)
    found = _run(tiny_problem, shop, Limits(kld=0.02), "file_bytes", trials=1)
    assert 2 <= len(found.trials) <= 4
    assert next(t for t in found.trials if t.chosen).measured_kld <= 0.02


def test_a_limit_that_cannot_be_met_names_the_nearest(
    tiny_problem: Problem, shop: Workshop, fake: Callable[..., _FakeJudge]
) -> None:
    fake(lambda predicted, _types: predicted + 0.05)
    with pytest.raises(BudgetError, match=r"No mix within the limits has .* of 0\.02: the nearest has 0\.0\d") as error:
        _run(tiny_problem, shop, Limits(kld=0.02), "file_bytes", trials=5)
    assert "Use --max-kld" in error.value.remedy
    assert list(shop.folder.iterdir()) == []


def test_with_bytes_limited_too_the_closest_of_the_neighbours_must_meet_the_limit(
    tiny_problem: Problem, shop: Workshop, fake: Callable[..., _FakeJudge]
) -> None:
    """Nothing is left to trade for quality, so the neighbours are the only hope."""
    optimum = solve(tiny_problem.items, _middle(tiny_problem), "kld")
    limits = dataclasses.replace(_middle(tiny_problem), kld=1.5 * optimum.kld)
    calls: list[float] = []

    def measured(predicted: float, _types: dict[str, str]) -> float:
        calls.append(predicted)
        return 2 * optimum.kld if len(calls) == 1 else predicted

    fake(measured)
    found = _run(tiny_problem, shop, limits, trials=6)
    assert not found.trials[0].chosen
    assert next(t for t in found.trials if t.chosen).measured_kld <= 1.5 * optimum.kld
    fake(lambda predicted, _types: 2 * predicted)
    with pytest.raises(BudgetError, match="the nearest has"):
        _run(tiny_problem, shop, limits, trials=3)


@pytest.mark.parametrize("objective", ["file_bytes", "ns", "kld"])
def test_a_limit_that_predictions_rule_out_is_measured_all_the_same(
    objective: Objective, tiny_problem: Problem, shop: Workshop, fake: Callable[..., _FakeJudge]
) -> None:
    limits = _middle(tiny_problem)
    least = solve(tiny_problem.items, limits, "kld").kld
    fake(lambda predicted, _types: 0.5 * predicted)
    found = _run(tiny_problem, shop, dataclasses.replace(limits, kld=0.6 * least), objective)
    chosen = next(trial for trial in found.trials if trial.chosen)
    assert chosen.predicted_kld > 0.6 * least >= chosen.measured_kld


def test_the_closest_mix_is_tried_before_a_limit_is_said_to_be_impossible(
    tiny_problem: Problem, shop: Workshop, fake: Callable[..., _FakeJudge]
) -> None:
    """Scaling the limit by one bad ratio asks for less than there is, but the mix with the least KL would do."""
    limits = _middle(tiny_problem)
    least = solve(tiny_problem.items, limits, "kld").kld
    limit = 1.5 * least

    def measured(predicted: float, _types: dict[str, str]) -> float:
        return 2 * predicted if predicted > 1.2 * least else predicted

    fake(measured)
    found = _run(tiny_problem, shop, dataclasses.replace(limits, kld=limit), "file_bytes")
    assert next(trial for trial in found.trials if trial.chosen).measured_kld <= limit


def test_an_interrupt_is_passed_on(tiny_problem: Problem, shop: Workshop, fake: Callable[..., _FakeJudge]) -> None:
    def stop(*_args: Any) -> float:
        raise KeyboardInterrupt

    fake(stop)
    with pytest.raises(KeyboardInterrupt):
        _run(tiny_problem, shop, _middle(tiny_problem))
