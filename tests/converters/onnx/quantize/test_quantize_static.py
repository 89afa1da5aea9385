"""Static INT8: numbers against an own fake quantization, and that ONNX Runtime computes on integers."""

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

from edgeq.converters.onnx.calibration.ranges import Range
from edgeq.converters.onnx.quantize.affine import affine_of, fake_quantize, quantize_weight
from edgeq.converters.onnx.quantize.clean import clean_for
from edgeq.converters.onnx.quantize.coverage import coverage, require_coverage, write_executed
from edgeq.converters.onnx.quantize.sites import quantizable
from edgeq.converters.onnx.quantize.static import calibration_tensors, quantize_static
from edgeq.errors import ConversionError

pytest.importorskip("onnxruntime")

_CPU = "onnxruntime-cpu"


def _linear(path: Path, weight: NDArray[Any]) -> Path:
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="linear")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, weight.shape[0]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, weight.shape[1]])],
        [numpy_helper.from_array(weight, "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    return path


@pytest.mark.parametrize(
    ("backend", "activations", "dtype"),
    [(_CPU, "u8", "uint8"), (_CPU, "s8", "int8"), ("tensorrt", "s8", "int8")],
)
def test_a_product_is_that_of_fake_quantization(
    tmp_path: Path, run_model: Callable[..., NDArray[Any]], backend: str, activations: Any, dtype: Any
) -> None:
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((16, 8)).astype(np.float32)
    model = _linear(tmp_path / "m.onnx", weight)
    assert calibration_tensors(model, backend) == ("x",)
    bounds = Range(-1.5, 3.0)
    out = tmp_path / "q.onnx"
    quantize_static(model, out, {"x": bounds}, backend=backend, activations=activations)
    x = rng.uniform(-2, 4, (5, 16)).astype(np.float32)
    integers, scales = quantize_weight(weight, 1)
    grid = affine_of("x", bounds, dtype, symmetric=backend == "tensorrt")
    expected = fake_quantize(x, grid) @ (integers * scales)
    np.testing.assert_allclose(run_model(out, {"x": x}, plain=True), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(run_model(out, {"x": x}), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("resnet", {"QLinearConv", "QLinearAdd", "QLinearGlobalAveragePool", "QGemm", "MaxPool"}),
        ("mobilenet", {"QLinearConv", "QLinearAdd", "QLinearGlobalAveragePool", "QGemm"}),
        ("efficientnet", {"QLinearConv", "QLinearMul", "QLinearSigmoid", "QLinearGlobalAveragePool", "QGemm"}),
        ("bert", {"MatMulIntegerToFloat"}),
        ("vit", {"MatMulIntegerToFloat", "QLinearConv"}),
    ],
)
def test_onnx_runtime_computes_on_integers_from_end_to_end(
    tiny: Callable[[str], Path],
    make_feeds: Callable[..., dict[str, NDArray[Any]]],
    run_model: Callable[..., NDArray[Any]],
    find_ranges: Callable[..., dict[str, Any]],
    cosine: Callable[..., float],
    tmp_path: Path,
    name: str,
    kinds: set[str],
) -> None:
    clean, out, executed = (tmp_path / f"{part}.onnx" for part in ("clean", "int8", "executed"))
    clean_for(tiny(name), clean, _CPU)
    ranges = find_ranges(clean, calibration_tensors(clean, _CPU))
    quantize_static(clean, out, ranges, backend=_CPU, activations="u8")
    onnx.checker.check_model(out, full_check=True)
    write_executed(out, executed)
    found = coverage(out, executed=executed)
    require_coverage(found)
    assert found.weight_share == 1.0
    assert found.mac_share == 1.0
    run = Counter(node.op_type for node in onnx.load(executed).graph.node)
    assert kinds <= run.keys()
    feeds = make_feeds(clean, 2)
    assert cosine(run_model(out, feeds), run_model(clean, feeds)) > 0.95
    if name in ("resnet", "mobilenet", "efficientnet"):
        assert not {"Relu", "Clip", "Sigmoid", "Mul", "Add"} & run.keys()
        # One Q at the input, one DQ at the output, and no float in between.
        assert run["QuantizeLinear"] <= 1
        assert run["DequantizeLinear"] <= 1


def test_signed_activations_are_computed_on_integers_where_a_session_allows_it(
    tiny: Callable[[str], Path], find_ranges: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    clean, out, executed = (tmp_path / f"{part}.onnx" for part in ("clean", "int8", "executed"))
    clean_for(tiny("resnet"), clean, _CPU)
    ranges = find_ranges(clean, calibration_tensors(clean, _CPU))
    quantize_static(clean, out, ranges, backend=_CPU, activations="s8")
    write_executed(out, executed, signed=True)
    assert coverage(out, executed=executed).mac_share == 1.0


def test_nodes_that_stay_floats_have_grids_around_them(
    tiny: Callable[[str], Path],
    make_feeds: Callable[..., dict[str, NDArray[Any]]],
    run_model: Callable[..., NDArray[Any]],
    find_ranges: Callable[..., dict[str, Any]],
    cosine: Callable[..., float],
    tmp_path: Path,
) -> None:
    clean, out, executed = (tmp_path / f"{part}.onnx" for part in ("clean", "int8", "executed"))
    clean_for(tiny("resnet"), clean, _CPU)
    sites = [site.name for site in quantizable(clean)]
    keep = {sites[0], sites[3], sites[-1]}
    ranges = find_ranges(clean, calibration_tensors(clean, _CPU, keep))
    quantize_static(clean, out, ranges, backend=_CPU, activations="u8", keep_float=keep)
    write_executed(out, executed)
    found = coverage(out, executed=executed)
    assert set(found.left) == keep
    feeds = make_feeds(clean, 2)
    assert cosine(run_model(out, feeds), run_model(clean, feeds)) > 0.95


def test_only_one_node_can_be_quantized_alone(
    tiny: Callable[[str], Path], find_ranges: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    clean, out, executed = (tmp_path / f"{part}.onnx" for part in ("clean", "int8", "executed"))
    clean_for(tiny("mobilenet"), clean, _CPU)
    sites = [site.name for site in quantizable(clean)]
    keep = set(sites) - {sites[5]}
    tensors = calibration_tensors(clean, _CPU, keep)
    assert 1 <= len(tensors) <= 2
    quantize_static(clean, out, find_ranges(clean, tensors), backend=_CPU, activations="u8", keep_float=keep)
    write_executed(out, executed)
    kinds = Counter(node.op_type for node in onnx.load(executed).graph.node)
    assert kinds["QLinearConv"] == 1
    with pytest.raises(ConversionError, match="floats stayed in") as caught:
        require_coverage(coverage(out, executed=executed))
    assert set(caught.value.details) == keep


def test_products_of_narrow_weights_fit_into_sixteen_bits(tmp_path: Path) -> None:
    model = _linear(tmp_path / "m.onnx", np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32))
    out = tmp_path / "q.onnx"
    quantize_static(model, out, {"x": Range(0, 1)}, backend=_CPU, activations="u8", narrow_weights=True)
    weights = [numpy_helper.to_array(i) for i in onnx.load(out).graph.initializer if i.name == "w_quantized"]
    pairs = 255 * weights[0].astype(int).reshape(4, 2, -1)
    assert np.maximum(pairs, 0).sum(axis=1).max() <= 32767
    assert np.minimum(pairs, 0).sum(axis=1).min() >= -32768
    assert np.abs(weights[0]).max() > 63


def test_what_cannot_be_quantized_is_refused(tmp_path: Path) -> None:
    model = _linear(tmp_path / "m.onnx", np.ones((8, 4), np.float32))
    out, ranges = tmp_path / "q.onnx", {"x": Range(0, 1)}
    with pytest.raises(ConversionError, match="no range"):
        quantize_static(model, out, {}, backend=_CPU, activations="u8")
    with pytest.raises(ConversionError, match="zero points"):
        quantize_static(model, out, ranges, backend="tensorrt", activations="u8")
    with pytest.raises(ConversionError, match="INT8 kernels"):
        quantize_static(model, out, ranges, backend="onnxruntime-cuda", activations="s8")
    with pytest.raises(ConversionError, match="No node is named 'nobody'"):
        quantize_static(model, out, ranges, backend=_CPU, activations="u8", keep_float={"nobody"})
    with pytest.raises(ConversionError, match="no node that could"):
        quantize_static(model, out, ranges, backend=_CPU, activations="u8", keep_float={"linear"})
    old = onnx.load(model)
    old.opset_import[0].version = 11
    onnx.save(old, model)
    with pytest.raises(ConversionError, match="opset 11"):
        quantize_static(model, out, ranges, backend=_CPU, activations="u8")
    assert not out.exists()


def test_a_pool_with_dilations_stays_float(tmp_path: Path, run_model: Callable[..., NDArray[Any]]) -> None:
    """Opset 19 brought them, and ONNX Runtime's integer kernel does not know them."""
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((4, 4, 3, 3)).astype(np.float32) * np.float32(0.2)
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w"], ["a"], name="first", pads=[1, 1, 1, 1]),
            helper.make_node("AveragePool", ["a"], ["b"], name="pool", kernel_shape=[2, 2], dilations=[2, 2]),
            helper.make_node("Conv", ["b", "w"], ["y"], name="second"),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, 4, 4])],
        [numpy_helper.from_array(kernel, "w")],
    )
    model, out = tmp_path / "m.onnx", tmp_path / "q.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), model)
    ranges = dict.fromkeys(calibration_tensors(model, _CPU), Range(-5.0, 5.0))
    quantize_static(model, out, ranges, backend=_CPU, activations="u8")
    x = rng.uniform(-1, 1, (1, 4, 8, 8)).astype(np.float32)
    np.testing.assert_allclose(run_model(out, {"x": x}), run_model(model, {"x": x}), atol=0.2)
