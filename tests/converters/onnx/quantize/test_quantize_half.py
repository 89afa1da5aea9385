"""Halves: one type for each operator, outputs that are read inside too, and scales that halves cannot hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeq.converters.onnx.quantize.half import to_half

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx_ir")

_FLOAT, _HALF = 1, 10
Arrays = dict[str, NDArray[Any]]


def _saved(
    path: Path, nodes: Sequence[Any], arrays: Arrays, x: Sequence[int], outputs: Sequence[tuple[str, Sequence[int]]]
) -> Path:
    """A model of the input ``x``."""
    info = onnx.helper.make_tensor_value_info
    constants = [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = onnx.helper.make_graph(
        nodes, "g", [info("x", _FLOAT, x)], [info(name, _FLOAT, shape) for name, shape in outputs], constants
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path


def _node(op_type: str, inputs: str, output: str, **attributes: Any) -> Any:
    return onnx.helper.make_node(op_type, inputs.split(), [output], name=output, **attributes)


def _grid(value: str, scale: str, zero: str) -> list[Any]:
    return [
        _node("QuantizeLinear", f"{value} {scale} {zero}", f"{value}_q"),
        _node("DequantizeLinear", f"{value}_q {scale} {zero}", f"{value}_d"),
    ]


def _types(path: Path) -> dict[str, int]:
    """Element type of every value, as onnx infers it strictly."""
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    graph = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True).graph
    values = (*graph.value_info, *graph.input, *graph.output)
    return {v.name: v.type.tensor_type.elem_type for v in values} | {i.name: i.data_type for i in graph.initializer}


def _inputs(path: Path, output: str) -> list[int]:
    """Types that the node of an output reads."""
    types = _types(path)
    node = next(node for node in onnx.load(path).graph.node if output in node.output)
    return [types[name] for name in node.input]


def _run(path: Path, x: NDArray[Any]) -> list[NDArray[Any]]:
    """Outputs, node by node: ONNX Runtime's fusions know no FP8."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [np.asarray(output) for output in session.run(None, {"x": x})]


def _build(path: Path) -> int:
    trt = pytest.importorskip("tensorrt_rtx")
    from edgeq.runtime.tensorrt.builder import build_engine
    from edgeq.runtime.tensorrt.records import EngineSettings

    return build_engine(trt, path, path.with_suffix(".engine"), EngineSettings(compute_capability="8.9")).size_bytes


def test_readers_of_an_output_keep_halves(tmp_path: Path) -> None:
    """DINOv2 and SigLIP pool the hidden states that are an output too: what pools must not read their float32 copy."""
    rng = np.random.default_rng(0)
    arrays: Arrays = {
        "w": rng.standard_normal((8, 8)).astype(np.float32),
        "first": np.array(0, np.int64),
        "s": np.array(0.02, np.float32),
        "z": np.array(0, np.int8),
        "p": rng.integers(-127, 128, (8, 4)).astype(np.int8),
        "ps": np.full(4, 0.01, np.float32),
        "pz": np.zeros(4, np.int8),
    }
    nodes = [
        _node("MatMul", "x w", "hidden"),
        _node("Gather", "hidden first", "pooled", axis=1),
        *_grid("hidden", "s", "z"),
        _node("DequantizeLinear", "p ps pz", "p_d", axis=1),
        _node("MatMul", "hidden_d p_d", "projected"),
        _node("Softmax", "hidden", "likely", axis=-1),
    ]
    sizes: list[tuple[str, Sequence[int]]] = [
        ("hidden", (1, 3, 8)), ("pooled", (1, 8)), ("projected", (1, 3, 4)), ("likely", (1, 3, 8)),
    ]  # fmt: skip
    path = _saved(tmp_path / "m.onnx", nodes, arrays, (1, 3, 8), sizes)
    out = tmp_path / "half.onnx"
    assert to_half(path, out) == ()
    assert _inputs(out, "hidden_q")[:2] == [_HALF, _HALF]
    assert Counter(node.op_type for node in onnx.load(out).graph.node)["Cast"] == 4  # x, and an output each but one
    x = rng.standard_normal((1, 3, 8)).astype(np.float32)
    for found, expected in zip(_run(out, x), _run(path, x), strict=True):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=2e-2, atol=2e-2)
    assert _build(out) > 0


def _tiny_signal(folder: Path, scale: float, *, fp8: bool = False, weight_scale: float = 0.01) -> Path:
    """x -> MatMul of 8 bits -> Relu, both grids explicit."""
    import ml_dtypes

    rng = np.random.default_rng(0)
    kind: Any = ml_dtypes.float8_e4m3fn if fp8 else np.int8
    arrays: Arrays = {
        "s": np.array(scale, np.float32),
        "z": np.zeros((), kind),
        "w": rng.integers(-100, 100, (16, 16)).astype(kind),
        "ws": np.array(weight_scale, np.float32),
        "wz": np.zeros((), kind),
    }
    nodes = [
        *_grid("x", "s", "z"),
        _node("DequantizeLinear", "w ws wz", "w_d"),
        _node("MatMul", "x_d w_d", "product"),
        _node("Relu", "product", "y"),
    ]
    return _saved(folder / "m.onnx", nodes, arrays, (1, 16), [("y", (1, 16))])


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(("scale", "weight_scale"), [(3e-8, 0.01), (2e-5, 0.01), (0.01, 1e-12), (1e6, 0.01)])
def test_grids_that_halves_cannot_hold_stay_floats(
    tmp_path: Path, scale: float, weight_scale: float, fp8: bool
) -> None:
    """Below 6e-8 a scale is nothing in FP16, below 6e-5 it loses digits, above 65,504 it is infinite."""
    path = _tiny_signal(tmp_path, scale, fp8=fp8, weight_scale=weight_scale)
    out = tmp_path / "half.onnx"
    (note,) = to_half(path, out)
    assert "'product'" in note
    types = _types(out)
    assert _inputs(out, "x_q")[:2] == [_FLOAT, _FLOAT]
    assert _inputs(out, "product") == [_FLOAT, _FLOAT]
    assert _inputs(out, "y") == [_HALF]
    assert types["ws"] == _FLOAT
    x = np.random.default_rng(1).uniform(-100, 100, (1, 16)).astype(np.float32) * np.float32(scale)
    (expected,), (found,) = _run(path, x), _run(out, x)
    if 1e-4 < np.abs(expected).max() < 6e4:
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)
    assert _build(out) > 0


def test_ordinary_scales_become_halves(tmp_path: Path) -> None:
    path = _tiny_signal(tmp_path, 0.01)
    assert to_half(path, tmp_path / "half.onnx") == ()
    assert _inputs(tmp_path / "half.onnx", "product") == [_HALF, _HALF]


def test_grids_that_take_no_halves_stay_beside_their_products(tmp_path: Path) -> None:
    """Before opset 19 scales are float32: a cast between a grid and its product would take the product out of INT8."""
    path = _tiny_signal(tmp_path, 0.01)
    model = onnx.load(path)
    model.opset_import[0].version = 18
    onnx.save(model, path)
    (note,) = to_half(path, tmp_path / "half.onnx")
    assert "its grids take scales in float16 from opset 19 on, the model has 18" in note
    graph = onnx.load(tmp_path / "half.onnx").graph
    makers = {name: node.op_type for node in graph.node for name in node.output}
    product = next(node for node in graph.node if node.op_type == "MatMul")
    assert [makers[name] for name in product.input] == ["DequantizeLinear"] * 2


@pytest.mark.parametrize("root", [False, True])
def test_numbers_that_vanish_keep_what_divides_by_them_in_floats(tmp_path: Path, root: bool) -> None:
    """A norm of nothing: in halves the least norm is 0, and the quotient no number."""
    rng = np.random.default_rng(0)
    arrays: Arrays = {
        "w": (rng.standard_normal((8, 8)) * np.float32(1e-3)).astype(np.float32),
        "bias": np.full(8, 1e-6, np.float32),
        "axes": np.array([1], np.int64),
        "least": np.array(1e-12, np.float32),
    }
    nodes = [
        _node("Gemm", "x w bias", "product"),
        _node("ReduceSumSquare", "x axes", "energy"),
        _node("Add", "energy least", "above") if root else _node("Clip", "energy least", "above"),
        *([_node("Sqrt", "above", "norm")] if root else []),
        _node("Div", "product norm" if root else "product above", "y"),
    ]
    path = _saved(tmp_path / "m.onnx", nodes, arrays, (2, 8), [("y", (2, 8))])
    out = tmp_path / "half.onnx"
    (note,) = to_half(path, out)
    assert "2 nodes compute in float32, such as 'above': float16 does not hold 1e-12" in note
    assert _inputs(out, "product") == [_HALF] * 3
    for x in (np.zeros((2, 8), np.float32), rng.standard_normal((2, 8)).astype(np.float32)):
        (expected,), (found,) = _run(path, x), _run(out, x)
        # A bias of 1e-6 keeps some digits of ten.
        np.testing.assert_allclose(found, expected, rtol=0.1, atol=1e-4)


def test_what_shall_stay_floats_keeps_its_grids(tmp_path: Path) -> None:
    """A cast between a grid and its product would make TensorRT compute the product in floats."""
    path = _tiny_signal(tmp_path, 0.01)
    assert to_half(path, tmp_path / "half.onnx", keep_float={"product"}) == ()
    assert _inputs(tmp_path / "half.onnx", "product") == [_FLOAT, _FLOAT]
    makers = {name: node.op_type for node in onnx.load(tmp_path / "half.onnx").graph.node for name in node.output}
    product = next(node for node in onnx.load(tmp_path / "half.onnx").graph.node if node.op_type == "MatMul")
    assert [makers[name] for name in product.input] == ["DequantizeLinear"] * 2
    assert _build(tmp_path / "half.onnx") > 0


def test_other_products_of_the_same_input_stay_with_it(tmp_path: Path) -> None:
    """Queries, keys and values read one grid; one weight that needs float32 takes all three along, others not."""
    rng = np.random.default_rng(0)
    arrays: Arrays = {"s": np.array(0.02, np.float32), "z": np.array(0, np.int8), "small": np.array(1e-9, np.float32)}
    nodes = _grid("x", "s", "z")
    for name in "qkv":
        arrays[f"w{name}"] = rng.integers(-100, 100, (8, 8)).astype(np.int8)
        nodes += [
            _node("DequantizeLinear", f"w{name} {'small' if name == 'v' else 's'} z", f"w{name}_d"),
            _node("MatMul", f"x_d w{name}_d", name),
        ]
    nodes += [
        _node("Add", "q k", "a"),
        _node("Add", "a v", "b"),
        *_grid("b", "s", "z"),
        _node("MatMul", "b_d wq_d", "y"),
    ]
    path = _saved(tmp_path / "m.onnx", nodes, arrays, (1, 8), [("y", (1, 8))])
    to_half(path, tmp_path / "half.onnx")
    assert [_inputs(tmp_path / "half.onnx", name)[0] for name in "qkv"] == [_FLOAT] * 3
    assert _inputs(tmp_path / "half.onnx", "a") == [_HALF, _HALF]
    assert _build(tmp_path / "half.onnx") > 0


def test_dead_channels_beside_live_ones_cost_nothing(tmp_path: Path) -> None:
    """Real convolutions have some: EfficientNet-Lite0 in most of its layers. They compute in halves all the same."""
    rng = np.random.default_rng(0)
    scales = np.array([0.01, 1e-11, 3e-7, 0.02], np.float32)
    arrays: Arrays = {
        "s": np.array(0.02, np.float32), "z": np.array(0, np.int8), "ws": scales, "wz": np.zeros(4, np.int8),
        "w": rng.integers(-127, 128, (4, 3, 3, 3)).astype(np.int8),
    }  # fmt: skip
    nodes = [*_grid("x", "s", "z"), _node("DequantizeLinear", "w ws wz", "w_d", axis=0), _node("Conv", "x_d w_d", "y")]
    path = _saved(tmp_path / "m.onnx", nodes, arrays, (1, 3, 8, 8), [("y", (1, 4, 6, 6))])
    assert to_half(path, tmp_path / "half.onnx") == ()
    assert _inputs(tmp_path / "half.onnx", "y_before") == [_HALF, _HALF]
    x = rng.integers(-100, 100, (1, 3, 8, 8)).astype(np.float32) * np.float32(0.02)
    (found,), (expected,) = _run(tmp_path / "half.onnx", x), _run(path, x)
    np.testing.assert_allclose(found[:, [0, 3]], expected[:, [0, 3]], rtol=1e-2, atol=1e-2)
    np.testing.assert_allclose(found[:, [1, 2]], expected[:, [1, 2]], rtol=1e-2, atol=2e-6)
    assert _build(tmp_path / "half.onnx") > 0


def test_operators_that_take_no_halves_stay_floats(tmp_path: Path) -> None:
    """A window's type is an attribute, which no declared type changes."""
    nodes = [
        _node("HannWindow", "n", "window", output_datatype=_FLOAT),
        _node("Mul", "x window", "y"),
    ]
    path = _saved(tmp_path / "m.onnx", nodes, {"n": np.array(8, np.int64)}, (1, 8), [("y", (1, 8))])
    to_half(path, tmp_path / "half.onnx")
    assert _types(tmp_path / "half.onnx")["window"] == _FLOAT
    x = np.ones((1, 8), np.float32)
    np.testing.assert_allclose(_run(tmp_path / "half.onnx", x)[0], _run(path, x)[0], atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dinov2", "siglip"])
def test_vision_towers_that_pool_their_output(tmp_path: Path, name: str) -> None:
    pytest.importorskip("torch")
    t = pytest.importorskip("transformers")
    from edgeq.converters.onnx.export.export import export_model
    from edgeq.converters.onnx.quantize.clean import clean_for

    sizes: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "image_size": 56}
    model = (
        t.Dinov2Model(t.Dinov2Config(**sizes))
        if name == "dinov2"
        else t.SiglipVisionModel(t.SiglipVisionConfig(**sizes, intermediate_size=64, patch_size=14))
    )
    model.eval().save_pretrained(tmp_path / "model")
    exported = export_model(tmp_path / "model", tmp_path / "float.onnx", shapes={"pixel_values": (1, 3, 56, 56)})
    clean_for(exported.path, tmp_path / "clean.onnx", "tensorrt-rtx")
    to_half(tmp_path / "clean.onnx", tmp_path / "half.onnx")
    _types(tmp_path / "half.onnx")
    ort.InferenceSession(str(tmp_path / "half.onnx"), providers=["CPUExecutionProvider"])
    assert _build(tmp_path / "half.onnx") > 0


def test_group_normalization_has_the_type_of_what_it_reads(tmp_path: Path) -> None:
    arrays = {"w": np.ones((4, 3, 3, 3), np.float32), "one": np.ones(4, np.float32)}
    nodes = [
        _node("Conv", "x w", "a"),
        _node("GroupNormalization", "a one one", "b", num_groups=2),
        _node("Relu", "b", "c"),
        _node("GroupNormalization", "c one one", "y", num_groups=2),
    ]
    info = onnx.helper.make_tensor_value_info
    constants = [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = onnx.helper.make_graph(
        nodes, "g", [info("x", _FLOAT, [1, 3, 8, 8])], [info("y", _FLOAT, [1, 4, 6, 6])], constants
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, tmp_path / "m.onnx")
    to_half(tmp_path / "m.onnx", tmp_path / "h.onnx")
    made = {tensor.name: tensor.data_type for tensor in onnx.load(tmp_path / "h.onnx").graph.initializer}
    assert made["one_half"] == _HALF
    x = np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32)
    found, exact = (
        ort.InferenceSession(tmp_path / name, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
        for name in ("h.onnx", "m.onnx")
    )
    np.testing.assert_allclose(found, exact, atol=1e-2)
