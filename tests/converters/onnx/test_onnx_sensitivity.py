"""Errors of single nodes are those of the grids that are written in the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")

from edgeq.converters.onnx.calibration.ranges import Range  # noqa: E402
from edgeq.converters.onnx.quantize.fp8 import quantize_fp8  # noqa: E402
from edgeq.converters.onnx.quantize.static import quantize_static  # noqa: E402
from edgeq.converters.onnx.sensitivity import Switch, node_errors  # noqa: E402
from edgeq.profiles.onnx.session import open_onnx_session  # noqa: E402

Arrays = dict[str, NDArray[Any]]


@pytest.fixture
def product(tmp_path: Path) -> Path:
    """One product of numbers above 0, with weights of very different sizes."""
    helper, float32 = onnx.helper, onnx.TensorProto.FLOAT
    weight = np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32) ** 5
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")],
        "g",
        [helper.make_tensor_value_info("x", float32, [4, 64])],
        [helper.make_tensor_value_info("y", float32, [4, 8])],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    path = tmp_path / "float.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    return path


def _error(path: Path, reference: Path, call: Arrays) -> float:
    found, exact = (np.asarray(open_onnx_session(p, 1).run(["y"], call)[0]) for p in (path, reference))
    return float(((found - exact) ** 2).sum() / (exact**2).sum())


def test_fp8_is_tried_on_its_own_grid(product: Path, tmp_path: Path) -> None:
    call: Arrays = {"x": np.random.default_rng(1).uniform(0, 5, (4, 64)).astype(np.float32)}
    ranges = {"x": Range(0.0, 5.0)}
    quantize_fp8(product, tmp_path / "fp8.onnx", ranges)
    found = node_errors(product, tmp_path, [Switch("product", ranges["x"])], [call], activations="fp8")
    expected = _error(tmp_path / "fp8.onnx", product, call)
    assert found["product"] == pytest.approx(expected, rel=1e-3)
    assert expected > 1e-5


@pytest.mark.parametrize("backend", ["onnxruntime-cpu", "tensorrt"])
def test_signed_grids_have_a_zero_point_unless_for_tensorrt(product: Path, tmp_path: Path, backend: str) -> None:
    call: Arrays = {"x": np.random.default_rng(1).uniform(0, 5, (4, 64)).astype(np.float32)}
    activation, switch = Range(0.0, 5.0), "product"
    symmetric = backend == "tensorrt"
    ranges = {"x": activation, "y": Range(-1e5, 1e5)}
    found = node_errors(product, tmp_path, [Switch(switch, activation)], [call], activations="s8", symmetric=symmetric)
    quantize_static(product, tmp_path / "q.onnx", ranges, backend=backend, activations="s8")
    grids = {i.name: onnx.numpy_helper.to_array(i) for i in onnx.load(tmp_path / "q.onnx").graph.initializer}
    switched = {
        i.name: onnx.numpy_helper.to_array(i, str(tmp_path))
        for i in onnx.load(tmp_path / "switched.onnx").graph.initializer
    }
    assert switched["edgeq.switch.0.zero"] == (0 if symmetric else -128)
    assert any(
        array.dtype == np.float32 and np.all(array == switched["edgeq.switch.0.scale"]) for array in grids.values()
    )
    assert 0 < found[switch] < 1e-3
