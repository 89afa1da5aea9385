"""Models without anything that some scheme could quantize, on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import edgeq
from edgeq.errors import ConversionError, UsageError
from edgeq.planner.tensors.convert import convert_tensor
from edgeq.planner.tensors.job import Calibration, Gate, TensorJob
from edgeq.planner.tensors.plan_only import plan_tensor
from edgeq.tensor_types import TensorManifest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def _saved(path: Path, nodes: Sequence[Any], y: Sequence[int], **weights: npt.NDArray[np.float32]) -> Path:
    info = onnx.helper.make_tensor_value_info
    constants = [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = onnx.helper.make_graph(nodes, "g", [info("x", 1, [1, 4, 16, 16])], [info("y", 1, list(y))], constants)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, path)
    return path


def _weight(out: int, into: int) -> npt.NDArray[np.float32]:
    drawn = np.random.default_rng(out).standard_normal((out, into, 3, 3)) / (9 * into) ** 0.5
    return np.asarray(drawn, np.float32)


@pytest.fixture
def convolutions(tmp_path: Path) -> Path:
    """Two, with a MaxPool between: no matrix product."""
    node = onnx.helper.make_node
    nodes = [
        node("Conv", ["x", "w1"], ["a"], name="conv1", pads=[1, 1, 1, 1]),
        node("MaxPool", ["a"], ["m"], name="pool", kernel_shape=[2, 2], strides=[2, 2]),
        node("Conv", ["m", "w2"], ["y"], name="conv2", pads=[1, 1, 1, 1]),
    ]
    return _saved(tmp_path / "convs.onnx", nodes, (1, 8, 8, 8), w1=_weight(8, 4), w2=_weight(8, 8))


@pytest.fixture
def nothing(tmp_path: Path) -> Path:
    """A Relu."""
    return _saved(tmp_path / "relu.onnx", [onnx.helper.make_node("Relu", ["x"], ["y"], name="r")], (1, 4, 16, 16))


def _job(model: Path, **fields: Any) -> TensorJob:
    known: dict[str, Any] = {"calibration": Calibration(samples=4, judged=3, method="minmax"), "threads": 1}
    return TensorJob(str(model), fields.pop("target", "laptop-cpu"), **{**known, **fields})


def _rejected(manifest: TensorManifest) -> dict[str, str]:
    return {entry.option: entry.reason for entry in manifest.plan.rejected}


def test_what_one_scheme_cannot_do_is_left_to_the_others(convolutions: Path, tmp_path: Path) -> None:
    manifest = convert_tensor(_job(convolutions), tmp_path / "out").tensor
    assert "no matrix product" in _rejected(manifest)["int8-dynamic"]
    with pytest.raises(ConversionError, match="no matrix product") as caught:
        convert_tensor(_job(convolutions, precision="int8-dynamic"), tmp_path / "other")
    assert "\n" not in str(caught.value)


def test_a_model_without_products_is_shipped_in_floats(nothing: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = convert_tensor(_job(nothing), out).tensor
    assert manifest.plan.scheme == "fp32"
    assert _rejected(manifest).keys() == {"int8-static", "int8-dynamic"}
    x = np.random.default_rng(0).standard_normal((1, 4, 16, 16)).astype(np.float32)
    with edgeq.load(out, kind="tensor") as session:
        assert np.array_equal(session.run({"x": x})["y"], np.maximum(x, 0))
    with pytest.raises(ConversionError, match="no node that could be quantized"):
        convert_tensor(_job(nothing, precision="int8-static"), tmp_path / "other")


def test_a_metric_that_fails_is_no_reason_for_floats(convolutions: Path, tmp_path: Path) -> None:
    gate = Gate(metric=lambda *_: float("nan"))
    with pytest.raises(ConversionError, match="gave nan on input 0"):
        convert_tensor(_job(convolutions, gate=gate), tmp_path / "out")


def test_top1_without_classes_is_refused(convolutions: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not known to be classes"):
        convert_tensor(_job(convolutions, gate=Gate(min_top1=0.9)), tmp_path / "out")


def test_a_plan_with_a_pool_behind_what_stays_in_floats(convolutions: Path, tmp_path: Path) -> None:
    wanted = _job(convolutions, precision="int8-static", keep_float=("^conv1$",), gate=Gate(min_coverage=0.1))
    (option,) = [one for one in plan_tensor(wanted, tmp_path, decide=False).options if one.scheme == "int8-static"]
    assert option.reason is None
    assert option.coverage is not None
    assert option.coverage.left == ("conv1",)
