"""Graphs for TensorRT: halves, FP8 and symmetric INT8, run by ONNX Runtime and built by TensorRT-RTX without a GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgeq.converters.onnx.quantize.clean import clean_for
from edgeq.converters.onnx.quantize.coverage import coverage, require_coverage
from edgeq.converters.onnx.quantize.fp8 import fp8_scale, fp8_tensors, quantize_fp8, round_fp8
from edgeq.converters.onnx.quantize.half import to_half
from edgeq.converters.onnx.quantize.sites import quantizable
from edgeq.converters.onnx.quantize.static import calibration_tensors, quantize_static
from edgeq.errors import ConversionError

pytest.importorskip("onnxruntime")

_TRT = "tensorrt-rtx"


def _build(path: Path, capability: str) -> int:
    """Parse and build an engine without a GPU; its bytes."""
    trt = pytest.importorskip("tensorrt_rtx")
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, trt.Logger(trt.Logger.ERROR))
    assert parser.parse_from_file(str(path)), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, capability), 0)
    engine = builder.build_serialized_network(network, config)
    assert engine is not None
    return int(engine.nbytes)


def _int8(source: Path, folder: Path, find_ranges: Callable[..., dict[str, Any]]) -> tuple[Path, Path]:
    clean, out = folder / "clean.onnx", folder / "int8.onnx"
    clean_for(source, clean, _TRT)
    ranges = find_ranges(clean, calibration_tensors(clean, _TRT))
    quantize_static(clean, out, ranges, backend=_TRT, activations="s8")
    return clean, out


@pytest.mark.parametrize("name", ["resnet", "mobilenet", "efficientnet", "bert", "vit"])
def test_symmetric_graphs_are_covered_and_build(
    tiny: Callable[[str], Path],
    make_feeds: Callable[..., dict[str, NDArray[Any]]],
    run_model: Callable[..., NDArray[Any]],
    find_ranges: Callable[..., dict[str, Any]],
    cosine: Callable[..., float],
    tmp_path: Path,
    name: str,
) -> None:
    clean, out = _int8(tiny(name), tmp_path, find_ranges)
    found = coverage(out, executed=None)
    require_coverage(found)
    assert found.weight_share == 1.0
    model = onnx.load(out)
    arrays = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    grids = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert grids
    assert all(arrays[node.input[2]].dtype == np.int8 and not arrays[node.input[2]].any() for node in grids)
    feeds = make_feeds(clean, 2)
    assert cosine(run_model(out, feeds, plain=True), run_model(clean, feeds)) > 0.95
    assert _build(out, "SM86") > 0


def test_residual_sums_of_convolutions_read_one_grid(
    tiny: Callable[[str], Path], find_ranges: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    _, out = _int8(tiny("resnet"), tmp_path, find_ranges)
    model = onnx.load(out)
    makers = {name: node for node in model.graph.node for name in node.output}
    sums = [node for node in model.graph.node if node.op_type == "Add"]
    assert len(sums) == 4
    for node in sums:
        assert sorted(makers[name].op_type for name in node.input) == ["Conv", "DequantizeLinear"]
    _, plain = _int8(tiny("vit"), tmp_path, find_ranges)
    model = onnx.load(plain)
    makers = {name: node for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        if node.op_type in ("Add", "LayerNormalization", "Softmax"):
            assert all(makers[name].op_type != "DequantizeLinear" for name in node.input if name in makers)


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_int8_in_halves_builds(
    tiny: Callable[[str], Path], find_ranges: Callable[..., dict[str, Any]], tmp_path: Path, name: str
) -> None:
    _, out = _int8(tiny(name), tmp_path, find_ranges)
    half = tmp_path / "half.onnx"
    to_half(out, half)
    assert coverage(half, executed=None).weight_share == 1.0
    assert _build(half, "SM86") > 0


@pytest.mark.parametrize("name", ["bert", "vit", "resnet", "mobilenet"])
def test_fp8_is_covered_and_builds(
    tiny: Callable[[str], Path],
    make_feeds: Callable[..., dict[str, NDArray[Any]]],
    run_model: Callable[..., NDArray[Any]],
    find_ranges: Callable[..., dict[str, Any]],
    cosine: Callable[..., float],
    tmp_path: Path,
    name: str,
) -> None:
    clean, out = tmp_path / "clean.onnx", tmp_path / "fp8.onnx"
    clean_for(tiny(name), clean, _TRT)
    keep = {site.name for site in quantizable(clean) if site.op_type == "Conv"} if name == "vit" else set[str]()
    quantize_fp8(clean, out, find_ranges(clean, fp8_tensors(clean, keep)), keep_float=keep)
    found = coverage(out, executed=None)
    assert {group.precision for group in found.groups} <= {"fp8", "fp32"}
    assert found.weight_share > 0.8
    feeds = make_feeds(clean, 2)
    assert cosine(run_model(out, feeds, plain=True), run_model(clean, feeds)) > (
        0.7 if name == "mobilenet" else 0.99
    )  # few channels, random weights
    assert _build(out, "SM89") > 0


@given(st.integers(0, 2**31), st.floats(1e-6, 1e6))
def test_fp8_numbers_keep_three_bits_of_mantissa(seed: int, peak: float) -> None:
    x = (np.random.default_rng(seed).uniform(-1, 1, 64) * peak).astype(np.float32)
    scale = fp8_scale("x", float(np.abs(x).max()))
    found = round_fp8(x, scale).astype(np.float32) * scale
    # Half a step of 1/8 for normal numbers, half of the least step for those below 2^-6.
    assert (np.abs(found - x) <= np.maximum(np.abs(x) / 16, scale * 2**-10) * 1.001).all()


def test_fp8_refuses_what_it_has_no_range_for(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="no range"):
        quantize_fp8(tiny("vit"), tmp_path / "o.onnx", {})
    with pytest.raises(ConversionError, match="not finite"):
        fp8_scale("x", float("inf"))


@pytest.mark.parametrize("name", ["resnet", "bert", "vit", "efficientnet"])
def test_halves_compute_the_same_with_the_same_inputs_and_outputs(
    tiny: Callable[[str], Path],
    make_feeds: Callable[..., dict[str, NDArray[Any]]],
    run_model: Callable[..., NDArray[Any]],
    cosine: Callable[..., float],
    tmp_path: Path,
    name: str,
) -> None:
    clean, out = tmp_path / "clean.onnx", tmp_path / "half.onnx"
    clean_for(tiny(name), clean, _TRT)
    to_half(clean, out)
    before, after = onnx.load(clean), onnx.load(out)
    assert [v.type.tensor_type.elem_type for v in after.graph.output] == [TensorProto.FLOAT]
    assert [v.name for v in after.graph.output] == [v.name for v in before.graph.output]
    feeds = make_feeds(clean, 2)
    assert cosine(run_model(out, feeds), run_model(clean, feeds)) > 0.999
    weights = Counter(i.data_type for i in after.graph.initializer if np.prod(i.dims) > 64)
    assert weights[TensorProto.FLOAT] <= 1
    kept = [n for n in after.graph.node if n.op_type == "Softmax"]
    kinds = {v.name: v.type.tensor_type.elem_type for v in after.graph.value_info}
    assert all(kinds.get(n.output[0], TensorProto.FLOAT) == TensorProto.FLOAT for n in kept)
    assert _build(out, "SM75") > 0


def test_constants_beyond_halves_are_cut_and_named(tmp_path: Path, run_model: Callable[..., NDArray[Any]]) -> None:
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "mask"], ["a"]), helper.make_node("Softmax", ["a"], ["y"], axis=-1)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3])],
        [numpy_helper.from_array(np.array([0, 0, -3.4e38], np.float32), "mask")],
    )
    model, out = tmp_path / "m.onnx", tmp_path / "h.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), model)
    (note,) = to_half(model, out)
    assert "'mask'" in note
    np.testing.assert_allclose(run_model(out, {"x": np.zeros((1, 3), np.float32)}), [[0.5, 0.5, 0]], atol=1e-3)


def test_half_refuses_unknown_names(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="nobody"):
        to_half(tiny("vit"), tmp_path / "o.onnx", keep_float={"nobody"})
