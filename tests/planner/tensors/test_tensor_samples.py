"""Inputs to calibrate with and others to judge on never meet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeq.errors import EdgeqError, UsageError
from edgeq.planner.tensors.job import Calibration
from edgeq.planner.tensors.samples import gather_samples
from edgeq.tensor_types import AxisRange, TensorArtifact, TensorSpec

ARTIFACT = TensorArtifact(
    architecture="onnx",
    task="tensor",
    opset=20,
    inputs=(TensorSpec(name="x", dtype="float32", shape=("batch", 4)),),
    outputs=(TensorSpec(name="y", dtype="float32", shape=("batch", 2)),),
)
AXES = {"batch": AxisRange(least=1, usual=1, most=4)}


def saved(folder: Path, count: int) -> Path:
    folder.mkdir()
    for index in range(count):
        np.savez(folder / f"{index:03}.npz", x=np.full((1, 4), index, np.float32))
    return folder


def seen(calls: object) -> set[float]:
    assert isinstance(calls, (list, tuple))
    return {float(call["x"][0, 0]) for call in calls}


def test_without_inputs_they_are_drawn_and_that_is_said(tmp_path: Path) -> None:
    found = gather_samples(ARTIFACT, tmp_path, AXES, Calibration(samples=5, judged=3))
    assert (len(found.calibration), len(found.judged)) == (5, 3)
    assert found.source == "random inputs"
    assert "--calibration" in found.notes[0]
    again = gather_samples(ARTIFACT, tmp_path, AXES, Calibration(samples=5, judged=3))
    assert np.array_equal(again.judged[0]["x"], found.judged[0]["x"])


def test_a_folder_is_shared_out(tmp_path: Path) -> None:
    found = gather_samples(
        ARTIFACT, tmp_path, AXES, Calibration(inputs=saved(tmp_path / "in", 12), samples=64, judged=4)
    )
    assert not seen(found.calibration) & seen(found.judged)
    assert len(found.calibration) + len(found.judged) == 12
    assert 3 <= len(found.judged) <= 4


def test_held_out_inputs_are_judged_on(tmp_path: Path) -> None:
    wanted = Calibration(inputs=saved(tmp_path / "in", 6), held_out=saved(tmp_path / "out", 3), samples=4, judged=3)
    found = gather_samples(ARTIFACT, tmp_path, AXES, wanted)
    assert (len(found.calibration), len(found.judged)) == (4, 3)


def test_too_few_held_out_inputs_are_named(tmp_path: Path) -> None:
    inputs, few = saved(tmp_path / "in", 6), saved(tmp_path / "out", 1)
    with pytest.raises(UsageError, match=r"out \(held_out\) has 1 inputs to judge on"):
        gather_samples(ARTIFACT, tmp_path, AXES, Calibration(inputs=inputs, held_out=few))
    with pytest.raises(UsageError, match=r"out \(inputs\) has 1 inputs to calibrate with"):
        gather_samples(ARTIFACT, tmp_path, AXES, Calibration(inputs=few, held_out=inputs))


def test_calls_in_memory_are_shared_out_too() -> None:
    calls = [{"x": np.full((1, 4), index, np.float32)} for index in range(12)]
    found = gather_samples(ARTIFACT, None, AXES, Calibration(inputs=iter(calls), judged=4))
    assert not seen(found.calibration) & seen(found.judged)
    assert found.source.startswith("calls in memory")
    chosen = gather_samples(ARTIFACT, None, AXES, Calibration(inputs=calls[:6], held_out=calls[6:], samples=4))
    assert (seen(chosen.calibration), seen(chosen.judged)) == ({0.0, 1.0, 2.0, 3.0}, {6.0, 7.0, 8.0, 9.0, 10.0, 11.0})


GOOD = {"x": np.zeros((1, 4), np.float32)}


@pytest.mark.parametrize(
    ("inputs", "match"),
    [
        ([{"y": GOOD["x"]}], "call 0: .*no input 'y'"),
        ([GOOD, {"x": np.full((1, 4), np.nan, np.float32)}], "call 1: .*NaN"),
        ([GOOD["x"]], "call 0 is a ndarray"),
        ([GOOD, GOOD], "calls in memory leaves 1 inputs to calibrate"),
    ],
)
def test_wrong_calls_in_memory_are_one_line(inputs: Any, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        gather_samples(ARTIFACT, None, AXES, Calibration(inputs=inputs))


def test_too_few_and_wrong_inputs_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Give at least 6"):
        gather_samples(ARTIFACT, tmp_path, AXES, Calibration(inputs=saved(tmp_path / "few", 2)))
    folder = tmp_path / "wrong"
    folder.mkdir()
    np.savez(folder / "a.npz", z=np.zeros((1, 4), np.float32))
    with pytest.raises(EdgeqError) as caught:
        gather_samples(ARTIFACT, tmp_path, AXES, Calibration(inputs=folder))
    assert "\n" not in str(caught.value)
