"""What lies in a bundle beside its graph: the layers of a model that was smoothed before it was quantized."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgeq.converters.onnx.layers import LayerError, compare_layers
from edgeq.planner.tensors.convert import convert_tensor
from edgeq.planner.tensors.job import Calibration, Gate, TensorJob
from edgeq.types import from_json

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnx_ir")

WIDTH, ROWS = 64, 32


@pytest.fixture
def loud(tmp_path: Path) -> Path:
    """x -> normalization with two channels a hundred times too loud -> MatMul, which hardly listens to them -> y."""
    rng = np.random.default_rng(0)
    scale = np.ones(WIDTH, np.float32)
    scale[[3, 40]] = 100.0
    weight = (rng.standard_normal((WIDTH, WIDTH)) / WIDTH**0.5).astype(np.float32) / scale[:, None]
    helper = onnx.helper
    nodes = [
        helper.make_node("LayerNormalization", ["x", "scale", "shift"], ["n"], name="norm", axis=-1),
        helper.make_node("MatMul", ["n", "w"], ["y"], name="product"),
    ]
    values = {"scale": scale, "shift": np.zeros(WIDTH, np.float32), "w": weight}
    ends = [[helper.make_tensor_value_info(end, 1, [ROWS, WIDTH])] for end in ("x", "y")]
    given = [onnx.numpy_helper.from_array(value, name) for name, value in values.items()]
    graph = helper.make_graph(nodes, "loud", *ends, given)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(onnx.shape_inference.infer_shapes(model), tmp_path / "loud.onnx")
    return tmp_path / "loud.onnx"


def test_layers_of_a_smoothed_model_are_held_against_the_smoothed_floats(loud: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    calls = [{"x": rng.standard_normal((ROWS, WIDTH)).astype(np.float32)} for _ in range(6)]
    job = TensorJob(
        model=str(loud),
        target="laptop-cpu",
        precision="int8-dynamic",
        calibration=Calibration(inputs=calls, samples=3, judged=3),
        gate=Gate(min_cosine=0.9),
        threads=1,
    )
    bundle = convert_tensor(job, tmp_path / "bundle")
    layers = {layer.name: layer for layer in from_json(bundle.file("layers").read_bytes(), tuple[LayerError, ...])}
    assert [(layer.op_type, layer.quantized) for layer in layers.values()] == [
        ("LayerNormalization", False),
        ("MatMul", True),
    ]
    assert layers["n"].noise < 1e-10  # floats in both
    assert 0 < layers["y"].noise < 1e-3
    # It was smoothed: what its normalization makes is far from what the user's makes.
    other = {layer.name: layer for layer in compare_layers(loud, bundle.file("model"), calls[:1])}
    assert other["n"].noise > 0.1
