"""ONNX files from elsewhere: the opset of the target, and real inputs that the cleaned graph is checked with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgeq.converters.onnx.export.module_source import ModuleSource
from edgeq.errors import SourceError
from edgeq.planner.tensors.job import Calibration, TensorJob
from edgeq.planner.tensors.prepare import Prepared, prepare

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


def _prepared(folder: Path, lowest: float, *, target: str = "laptop-cpu", also_for: tuple[str, ...] = ()) -> Prepared:
    """The logarithm of numbers from ``lowest`` on, of opset 24."""
    info, node = onnx.helper.make_tensor_value_info, onnx.helper.make_node
    weights = [onnx.numpy_helper.from_array(np.ones((8, 4), np.float32), "w")]
    nodes = [node("Log", ["x"], ["h"]), node("MatMul", ["h", "w"], ["y"])]
    graph = onnx.helper.make_graph(nodes, "g", [info("x", 1, ["n", 8])], [info("y", 1, ["n", 4])], weights)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 24)], ir_version=10)
    onnx.save(model, folder / "log.onnx")
    rng = np.random.default_rng(0)
    calls = [{"x": rng.random((1, 8), np.float32) + np.float32(lowest)} for _ in range(9)]
    job = TensorJob(str(folder / "log.onnx"), target, calibration=Calibration(calls), also_for=also_for, threads=1)
    (folder / "work").mkdir()
    return prepare(job, folder / "work", lambda *_: None)


def test_real_inputs_are_checked_where_random_ones_cannot_be(tmp_path: Path) -> None:
    found = _prepared(tmp_path, 0.5).exported
    assert found.checks[0].calls == 3  # those that are judged on
    assert (found.artifact.opset, found.notes) == (24, ())


def test_real_inputs_must_give_numbers(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="The model itself gives NaN or infinity at 'y'"):
        _prepared(tmp_path, -2.0)


@pytest.mark.parametrize(
    ("target", "also_for"), [("jetson-orin-nx-16gb", ()), ("laptop-cpu", ("jetson-orin-nx-16gb",))]
)
def test_the_opset_is_one_that_all_devices_take(tmp_path: Path, target: str, also_for: tuple[str, ...]) -> None:
    found = _prepared(tmp_path, 0.5, target=target, also_for=also_for).exported
    assert found.artifact.opset == 20
    assert any("lowered from 24 to 20" in note for note in found.notes)


def test_a_module_is_compared_with_torch_on_real_inputs(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    source = ModuleSource(torch.nn.Linear(4, 2), inputs={"input": np.zeros((1, 4), np.float32)})
    calls = [{"input": np.full((1, 4), value, np.float32)} for value in range(1, 10)]
    counts = {}
    for name, calibration in (("random", Calibration(samples=4, judged=3)), ("real", Calibration(calls))):
        (tmp_path / name).mkdir()
        found = prepare(TensorJob(source, "laptop-cpu", calibration=calibration, threads=1), tmp_path / name, _silent)
        assert found.exported.reference is None
        counts[name] = found.exported.checks[0].calls
    assert counts["real"] == counts["random"] + 3


def _silent(*_: object) -> None:
    """Nobody listens."""
