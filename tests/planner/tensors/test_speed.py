"""What is shipped is surely no slower than the float model at its best, and fast enough for the goal."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from edgeq.errors import BudgetError
from edgeq.planner.tensors import speed
from edgeq.planner.tensors.candidates import Candidate, Workbench
from edgeq.planner.tensors.speed import Timed, fastest, fastest_float
from edgeq.planner.tensors.timing import Timing, timing_of
from edgeq.tensor_types import OutputQuality, TensorQuality

MakeBench = Callable[..., Workbench]
Clock = Callable[[dict[str, Sequence[float]]], None]


def _quality(cosine: float) -> TensorQuality:
    output = OutputQuality(name="y", mean_cosine=cosine, min_cosine=cosine, sqnr_db=30.0, max_error=0.1)
    return TensorQuality(inputs=1, outputs=(output,), source="made up", sha256="0" * 64)


def _candidate(name: str, cosine: float = 0.999, **fields: Any) -> Candidate:
    return Candidate("int8-static", Path(name), name, quality=_quality(cosine), **fields)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """``clock({"name": milliseconds of its calls, repeated})``: times of models by their files' names."""

    def patch(times: dict[str, Sequence[float]]) -> None:
        def in_turns(models: Sequence[Path], *_: object, rounds: int = 15, **__: object) -> tuple[Timing, ...]:
            found = [[times[path.stem][n % len(times[path.stem])] for n in range(rounds)] for path in models]
            return tuple(timing_of(one, one, first_ms=found[0], first_cpu_ms=found[0]) for one in found)

        monkeypatch.setattr(speed, "time_in_turns", in_turns)

    return patch


def _fastest(bench: Workbench, *ways: Candidate, floats: bool = True, limit: float | None = None) -> Timed:
    passing = [*ways, bench.float_model()] if floats else list(ways)
    return fastest(bench, passing, max_slowdown=1.0, max_latency_ms=limit, asked=not floats)


def test_the_fastest_is_taken_if_it_surely_is_faster(chain: Path, make_bench: MakeBench, clock: Clock) -> None:
    clock({"model": [10.0], "a": [6.0], "b": [5.0]})
    found = _fastest(make_bench(chain), _candidate("a"), _candidate("b"))
    assert (found.chosen.label, found.timing.slowness) == ("b", 0.5)
    assert [entry.option for entry in found.rejected] == ["a", "fp32"]
    assert [entry.reason for entry in found.rejected] == ["1.20 times the time of b", "2.00 times the time of b"]


def test_in_doubt_it_is_timed_for_longer_and_then_floats_are_taken(
    chain: Path, make_bench: MakeBench, clock: Clock
) -> None:
    bench = make_bench(chain)
    clock({"model": [10.0], "a": [9.9, 10.3, 9.9, 9.9, 10.3]})  # three rounds of five are faster, of however many
    found = _fastest(bench, _candidate("a"))
    assert found.chosen.scheme == "fp32"
    assert "not surely faster in 75 rounds" in found.rejected[0].reason
    assert "surely faster" in found.notes[0]
    clock({"model": [10.0], "a": [9.9, 10.3, 9.9, 9.9]})  # of 15 rounds that could be chance, of 75 it is not
    assert _fastest(bench, _candidate("a")).chosen.label == "a"


def test_what_was_asked_for_is_shipped_and_said_to_be_slower(chain: Path, make_bench: MakeBench, clock: Clock) -> None:
    clock({"model": [10.0], "a": [17.0]})
    found = _fastest(make_bench(chain), _candidate("a"), floats=False)
    assert found.chosen.label == "a"
    assert found.notes[0].startswith("slower than the float model: a takes 1.70 times")


def test_what_is_in_doubt_is_not_called_slower(chain: Path, make_bench: MakeBench, clock: Clock) -> None:
    bench = make_bench(chain)
    doubtful = [9.7, 10.3, 9.7, 9.7, 10.3]
    clock({"model": [10.0], "a": doubtful})
    (asked,) = _fastest(bench, _candidate("a"), floats=False).notes
    assert asked.startswith("not surely as fast as the float model: a takes 0.97 times")
    assert asked.endswith("--precision auto would ship the float model")
    (goal,) = _fastest(bench, _candidate("a"), limit=9.8).notes  # the float model is too slow for that
    assert goal.startswith("not surely as fast as the float model: a takes 0.97 times")
    assert "--precision" not in goal


def test_of_two_about_as_fast_the_nearer_one_is_taken(chain: Path, make_bench: MakeBench, clock: Clock) -> None:
    bench, near = make_bench(chain), _candidate("near", 0.9999)
    clock({"model": [10.0], "far": [5.0], "near": [5.2]})
    found = _fastest(bench, _candidate("far"), near)
    assert found.chosen.label == "near"
    far = next(entry for entry in found.rejected if entry.option == "far")
    assert far.reason.startswith("0.96 times the time of near, which is nearer to the float model: within 5%")
    clock({"model": [10.0], "far": [5.0], "near": [5.4]})
    assert _fastest(bench, _candidate("far"), near).chosen.label == "far"


def test_a_variant_must_surely_be_faster_than_what_it_varies(chain: Path, make_bench: MakeBench, clock: Clock) -> None:
    bench, variant = make_bench(chain), _candidate("fast", 0.9999, variant_of="plain")
    clock({"model": [10.0], "plain": [5.0], "fast": [4.9, 4.9, 5.1]})
    found = _fastest(bench, _candidate("plain"), variant)
    assert found.chosen.label == "plain"
    assert any(entry.option == "fast" and "times what plain takes" in entry.reason for entry in found.rejected)
    clock({"model": [10.0], "plain": [5.0], "fast": [4.5]})
    assert _fastest(bench, _candidate("plain"), variant).chosen.label == "fast"


def test_a_goal_of_latency(chain: Path, make_bench: MakeBench, clock: Clock) -> None:
    bench = make_bench(chain)
    clock({"model": [10.0], "a": [6.0], "b": [5.0]})
    found = _fastest(bench, _candidate("a"), _candidate("b"), limit=5.5)
    assert found.chosen.label == "b"
    assert found.rejected[0].reason == "6.00 ms a call, the limit is 5.50 ms"
    with pytest.raises(BudgetError, match=r"b, the fastest .* takes 5\.00 ms a call here, the limit is 4\.00 ms"):
        _fastest(bench, _candidate("a"), _candidate("b"), limit=4.0)


def test_the_fastest_float_model_is_what_others_are_compared_with(
    chain: Path, tmp_path: Path, make_bench: MakeBench, clock: Clock
) -> None:
    exported = tmp_path / "exported.onnx"
    exported.write_bytes(chain.read_bytes())
    bench = make_bench(chain, exported=exported)
    clock({"model": [10.0], "exported": [8.0], "a": [9.0]})
    assert fastest_float(bench).path == exported
    found = _fastest(bench, _candidate("a"))
    assert (found.chosen.path, found.chosen.scheme) == (exported, "fp32")
    assert "takes 1.12 times" in found.rejected[0].reason
    clock({"model": [10.0], "exported": [9.9, 10.1], "a": [9.0]})
    assert fastest_float(bench).path == chain


def test_a_fusion_that_may_be_slow_is_tried_both_ways(chain: Path, tmp_path: Path, make_bench: MakeBench) -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load(chain)
    gain = onnx.helper.make_tensor("gain", 1, [512], [1.0] * 512)
    model.graph.initializer.append(gain)
    model.graph.node.insert(0, onnx.helper.make_node("LayerNormalization", ["x", "gain"], ["n"], name="norm"))
    model.graph.node[1].input[0] = "n"
    onnx.save(model, tmp_path / "norm.onnx")
    plain, normalized = make_bench(chain), make_bench(tmp_path / "norm.onnx")
    assert speed._float_variants(plain) == []
    (fused,) = speed._float_variants(normalized)
    assert fused == dataclasses.replace(normalized.float_model(), label="fp32-fused", disabled_optimizers=())


def test_reasons_are_the_ratios_that_decide(
    chain: Path, make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    # "dynamic" has the least milliseconds, and the most processor time: it flatters itself with threads that wait.
    walls, busy = {"model": 10.0, "dynamic": 3.2, "static": 3.6}, {"model": 10.0, "dynamic": 4.2, "static": 3.5}

    def in_turns(models: Sequence[Path], *_: object, rounds: int = 15, **__: object) -> tuple[Timing, ...]:
        found = [([walls[path.stem]] * rounds, [busy[path.stem]] * rounds) for path in models]
        return tuple(timing_of(*one, first_ms=found[0][0], first_cpu_ms=found[0][1]) for one in found)

    monkeypatch.setattr(speed, "time_in_turns", in_turns)
    found = _fastest(make_bench(chain), _candidate("dynamic"), _candidate("static"))
    assert found.chosen.label == "static"
    told = {entry.option: entry.reason for entry in found.rejected}
    assert told == {"dynamic": "1.17 times the time of static", "fp32": "2.78 times the time of static"}


@pytest.mark.parametrize(
    ("value", "text"), [(0.0213, "0.0213 ms"), (47.44, "47.4 ms"), (99.96, "100 ms"), (5, "5.00 ms")]
)
def test_milliseconds_have_three_digits(value: float, text: str) -> None:
    assert speed._ms(value) == text
