"""Times in turns, of models that differ by known factors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgeq.errors import SessionError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from edgeq.planner.tensors.timing import kernel_times, time_in_turns, timing_of  # noqa: E402


def chain(path: Path, products: int, width: int = 256) -> Path:
    """So many products of one input."""
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    nodes, weights, value = [], [], "x"
    for index in range(products):
        weight = rng.standard_normal((width, width)).astype(np.float32) / width
        weights.append(numpy_helper.from_array(weight, f"w{index}"))
        nodes.append(helper.make_node("MatMul", [value, f"w{index}"], [f"y{index}"], name=f"product{index}"))
        value = f"y{index}"
    shape = [64, width]
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(value, TensorProto.FLOAT, shape)],
        weights,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def test_more_work_takes_more_time(tmp_path: Path) -> None:
    calls = [{"x": np.ones((64, 256), np.float32)}]
    models = [chain(tmp_path / "one.onnx", 2), chain(tmp_path / "two.onnx", 16)]
    first, second = time_in_turns(models, calls, threads=1, rounds=9)
    assert (first.ratio, first.rounds) == (1.0, 9)
    assert second.cpu_ratio > 2
    assert second.ms > 0 < second.cpu_ms


def test_the_bound_is_what_chance_does_not_exceed() -> None:
    floats = [10.0] * 15
    close = [9.0, 11.0, *[9.5] * 9, *[10.5] * 4]  # faster in 10 rounds of 15, which chance does in 15 %
    found = timing_of(close, close, first_ms=floats, first_cpu_ms=floats)
    assert found.slowness == 0.95
    assert found.slowness_bound == 1.05
    sure = [9.0, 11.0, *[9.5] * 11, *[10.5] * 2]
    assert timing_of(sure, sure, first_ms=floats, first_cpu_ms=floats).slowness_bound == 0.95
    few = timing_of([1.0] * 4, [1.0] * 4, first_ms=[2.0] * 4, first_cpu_ms=[2.0] * 4)
    assert few.slowness_bound == float("inf")
    busy = timing_of([9.0] * 9, [12.0] * 9, first_ms=[10.0] * 9, first_cpu_ms=[10.0] * 9)
    assert (busy.slowness, busy.slowness_bound) == (1.2, 1.2)


def test_every_executed_node_has_a_time(tmp_path: Path) -> None:
    calls = [{"x": np.ones((64, 256), np.float32)}]
    kernels = kernel_times(chain(tmp_path / "chain.onnx", 3), calls, threads=1, runs=3)
    assert [kernel.outputs for kernel in kernels] == [("y0",), ("y1",), ("y2",)]
    assert all(kernel.us >= 0 for kernel in kernels)


def test_a_broken_model_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"no model")
    with pytest.raises(SessionError, match="cannot load"):
        time_in_turns([tmp_path / "x.onnx"], [{}], threads=1)
