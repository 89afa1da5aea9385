"""Forms for ONNX Runtime's integer kernels: what is executed, and that results stay the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgeq.converters.onnx.graph import read_onnx
from edgeq.converters.onnx.layers import compare_layers
from edgeq.converters.onnx.quantize import static
from edgeq.converters.onnx.quantize.coverage import coverage, write_executed
from edgeq.converters.onnx.quantize.static import calibration_tensors, quantize_static

pytest.importorskip("onnxruntime")

_CPU = "onnxruntime-cpu"


def _excitation(path: Path, size: int | str = 64, *, batch: int | str = 1, flipped: bool = False) -> Path:
    """A convolution whose channels are multiplied with what a network of their means says."""
    rng = np.random.default_rng(3)
    factors = ["s", "a"] if flipped else ["a", "s"]
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], name="first"),
        helper.make_node("GlobalAveragePool", ["a"], ["m"], name="squeeze"),
        helper.make_node("Conv", ["m", "w2"], ["e"], name="excite"),
        helper.make_node("Sigmoid", ["e"], ["s"], name="gate"),
        helper.make_node("Mul", factors, ["h"], name="scale"),
        helper.make_node("Conv", ["h", "w3"], ["y"], name="last"),
    ]
    weights = {"w1": (8, 4, 1, 1), "w2": (8, 8, 1, 1), "w3": (4, 8, 1, 1)}
    sizes: dict[str, list[int | str]] = {
        "a": [batch, 8, size, size],
        "m": [batch, 8, 1, 1],
        "e": [batch, 8, 1, 1],
        "s": [batch, 8, 1, 1],
        "h": [batch, 8, size, size],
    }
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 4, size, size])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 4, size, size])],
        [numpy_helper.from_array(rng.standard_normal(s).astype(np.float32), n) for n, s in weights.items()],
        value_info=[helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in sizes.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    return path


def _image(batch: int = 1, size: int = 64) -> NDArray[np.float32]:
    return np.random.default_rng(4).standard_normal((batch, 4, size, size)).astype(np.float32)


def _quantize(model: Path, out: Path, find_ranges: Callable[..., dict[str, Any]], backend: str = _CPU) -> Path:
    ranges = find_ranges(model, calibration_tensors(model, backend))
    quantize_static(model, out, ranges, backend=backend, activations="u8" if backend == _CPU else "s8")
    return out


def _written(model: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(model).graph.node)


@pytest.mark.parametrize("flipped", [False, True])
def test_a_factor_for_each_channel_is_repeated_in_bytes(
    tmp_path: Path,
    find_ranges: Callable[..., dict[str, Any]],
    run_model: Callable[..., NDArray[Any]],
    cosine: Callable[..., float],
    monkeypatch: pytest.MonkeyPatch,
    flipped: bool,
) -> None:
    model = _excitation(tmp_path / "m.onnx", flipped=flipped)
    out, executed = _quantize(model, tmp_path / "q.onnx", find_ranges), tmp_path / "executed.onnx"
    onnx.checker.check_model(out, full_check=True)
    write_executed(out, executed)
    run = _written(executed)
    assert run == {
        "QuantizeLinear": 1,
        "QLinearConv": 3,
        "QLinearGlobalAveragePool": 1,
        "QLinearSigmoid": 1,
        "Expand": 1,
        "QLinearMul": 1,
        "DequantizeLinear": 1,
    }
    assert coverage(out, executed=executed).mac_share == 1.0
    foretold = Counter(node.op_type for node in read_onnx(out, {}, fixed=True).nodes)
    assert {kind: foretold[kind] for kind in run} == run  # memory is foretold of the kernels that run
    monkeypatch.setattr(static, "repeat_factors", lambda _: 0)
    plain = _quantize(model, tmp_path / "plain.onnx", find_ranges)
    assert "Expand" not in _written(plain)
    feeds = {"x": _image()}
    np.testing.assert_array_equal(run_model(out, feeds), run_model(plain, feeds))
    assert cosine(run_model(out, feeds), run_model(model, feeds)) > 0.999
    layers, plain_layers = (compare_layers(model, path, [feeds]) for path in (out, plain))
    assert [(layer.name, layer.noise) for layer in layers] == [(layer.name, layer.noise) for layer in plain_layers]


def test_a_factor_is_repeated_for_any_batch(
    tmp_path: Path, find_ranges: Callable[..., dict[str, Any]], run_model: Callable[..., NDArray[Any]]
) -> None:
    ranges = find_ranges(_excitation(tmp_path / "one.onnx"), calibration_tensors(tmp_path / "one.onnx", _CPU))
    model = _excitation(tmp_path / "m.onnx", batch="n")
    out = _quantize(model, tmp_path / "q.onnx", lambda *_: ranges)
    assert _written(out)["Expand"] == 1
    images = _image(3)
    each = [run_model(out, {"x": image[None]}) for image in images]
    np.testing.assert_array_equal(run_model(out, {"x": images}), np.concatenate(each))


@pytest.mark.parametrize("size", [16, "size"])
def test_factors_of_small_or_unknown_images_stay_as_they_are(
    tmp_path: Path, find_ranges: Callable[..., dict[str, Any]], size: int | str
) -> None:
    ranges = find_ranges(_excitation(tmp_path / "fixed.onnx"), calibration_tensors(tmp_path / "fixed.onnx", _CPU))
    out = _quantize(_excitation(tmp_path / "m.onnx", size), tmp_path / "q.onnx", lambda *_: ranges)
    assert "Expand" not in _written(out)


def test_a_product_that_stays_float_keeps_its_factor(
    tmp_path: Path, find_ranges: Callable[..., dict[str, Any]]
) -> None:
    model, out = _excitation(tmp_path / "m.onnx"), tmp_path / "q.onnx"
    keep = {"scale"}
    ranges = find_ranges(model, calibration_tensors(model, _CPU, keep))
    quantize_static(model, out, ranges, backend=_CPU, activations="u8", keep_float=keep)
    assert _written(out)["Mul"] == 1


def test_tensorrt_never_sees_a_repeated_factor(tmp_path: Path, find_ranges: Callable[..., dict[str, Any]]) -> None:
    out = _quantize(_excitation(tmp_path / "m.onnx"), tmp_path / "q.onnx", find_ranges, "tensorrt")
    assert "Expand" not in _written(out)
