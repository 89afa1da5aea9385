"""A bundle is published only if it loads and answers as the float model does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeq.bundle import MANIFEST, Bundle
from edgeq.errors import BundleError, ConversionError, SessionError
from edgeq.planner.tensors.convert import convert_tensor
from edgeq.planner.tensors.job import Calibration, TensorJob
from edgeq.planner.tensors.samples import Samples
from edgeq.planner.tensors.verify import verify_bundle, verify_graph

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

SAMPLES = Samples([], [{"x": np.ones((1, 8), np.float32)}], "ones")


def _model(path: Path, value: float = 1.0, width: int = 4, out: str = "y") -> Path:
    info, node = onnx.helper.make_tensor_value_info, onnx.helper.make_node
    weight = onnx.numpy_helper.from_array(np.full((8, width), value, np.float32), "w")
    nodes = [node("MatMul", ["x", "w"], [out], name="product")]
    graph = onnx.helper.make_graph(nodes, "g", [info("x", 1, [1, 8])], [info(out, 1, [1, width])], [weight])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, path)
    return path


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    model = _model(tmp_path / "model.onnx")
    job = TensorJob(str(model), "laptop-cpu", precision="fp32", threads=1, calibration=Calibration(samples=2, judged=2))
    return convert_tensor(job, tmp_path / "bundle")


def _verify(bundle: Bundle, reference: Path) -> None:
    verify_bundle(bundle.path, "laptop-cpu", reference, SAMPLES, lambda *_: None)


def _change(bundle: Bundle, part: str, **fields: Any) -> None:
    path = bundle.path / MANIFEST
    document = json.loads(path.read_text())
    document[part] |= fields
    path.write_text(json.dumps(document))


def test_a_sound_bundle_passes(bundle: Bundle, tmp_path: Path) -> None:
    _verify(bundle, tmp_path / "model.onnx")


def test_it_is_loaded_by_its_manifest(bundle: Bundle, tmp_path: Path) -> None:
    _change(bundle, "artifact", outputs=[{"name": "z", "dtype": "float32", "shape": [1, 4]}])
    with pytest.raises(BundleError):
        _verify(bundle, tmp_path / "model.onnx")


def test_it_is_run_by_its_plan(bundle: Bundle, tmp_path: Path) -> None:
    _change(bundle, "plan", backend="another")
    with pytest.raises(SessionError, match="made for another"):
        _verify(bundle, tmp_path / "model.onnx")


@pytest.mark.parametrize(("fields", "told"), [({"width": 5}, "y is float32"), ({"out": "z"}, "The outputs y were z")])
def test_outputs_are_those_of_the_float_model(
    bundle: Bundle, tmp_path: Path, fields: dict[str, Any], told: str
) -> None:
    other = _model(tmp_path / "other.onnx", **fields)
    with pytest.raises(ConversionError, match=told):
        _verify(bundle, other)


def test_what_is_no_longer_finite_is_refused(tmp_path: Path) -> None:
    finite, infinite = _model(tmp_path / "a.onnx"), _model(tmp_path / "b.onnx", 3e38)
    verify_graph(finite, finite, SAMPLES, lambda *_: None)
    with pytest.raises(ConversionError, match="y is no longer finite"):
        verify_graph(infinite, finite, SAMPLES, lambda *_: None)
