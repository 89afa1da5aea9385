"""Every cleaning pass computes the same as before, and finds what it is for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgeq.converters.onnx.quantize.clean import clean_for
from edgeq.errors import ConversionError, SourceError

pytest.importorskip("onnxruntime")

_RNG = np.random.default_rng(0)


def _model(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    shape: Sequence[int | str],
    constants: dict[str, NDArray[Any]],
    *,
    opset: int = 20,
    out: Sequence[int | str | None] | None = None,
) -> Path:
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None if out is None else list(out))],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    onnx.save(onnx.shape_inference.infer_shapes(model), path)
    return path


def _floats(*shape: int) -> NDArray[np.float32]:
    return _RNG.standard_normal(shape).astype(np.float32)


def _kinds(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


@pytest.fixture
def check(tmp_path: Path, run_model: Callable[..., NDArray[Any]]) -> Callable[..., Counter[str]]:
    """A function that cleans a model, compares it with what it was, and gives the operators that are left."""

    def cleaned(path: Path, x: NDArray[Any], *, backend: str = "onnxruntime-cpu", join: bool = False) -> Counter[str]:
        out = tmp_path / "clean.onnx"
        notes = clean_for(path, out, backend, join=join)
        assert notes
        onnx.checker.check_model(out, full_check=True)
        np.testing.assert_allclose(
            run_model(out, {"x": x}, plain=True), run_model(path, {"x": x}, plain=True), rtol=2e-4, atol=2e-5
        )
        return _kinds(out)

    return cleaned


@pytest.mark.parametrize("keepdims", [0, 1])
def test_means_over_pixels_become_global_pools(
    tmp_path: Path, check: Callable[..., Counter[str]], keepdims: int
) -> None:
    node = helper.make_node("ReduceMean", ["x", "axes"], ["y"], keepdims=keepdims)
    path = _model(tmp_path / "m.onnx", [node], [2, 3, 5, 7], {"axes": np.array([-1, 2], np.int64)})
    kinds = check(path, _floats(2, 3, 5, 7))
    assert kinds["GlobalAveragePool"] == 1
    assert not kinds["ReduceMean"]


def test_a_mean_over_channels_stays(tmp_path: Path) -> None:
    node = helper.make_node("ReduceMean", ["x", "axes"], ["y"])
    path = _model(tmp_path / "m.onnx", [node], [2, 3, 5, 7], {"axes": np.array([1, 2], np.int64)})
    assert clean_for(path, tmp_path / "o.onnx", "onnxruntime-cpu") == ()
    assert _kinds(tmp_path / "o.onnx")["ReduceMean"] == 1


@pytest.mark.parametrize(
    "attributes",
    [
        {"kernel_shape": [5, 7]},
        {"kernel_shape": [9, 9], "strides": [9, 9], "ceil_mode": 1, "count_include_pad": 1},
        {"kernel_shape": [9, 9], "strides": [9, 9], "ceil_mode": 1},
    ],
)
def test_a_pool_over_the_whole_image_becomes_global(
    tmp_path: Path, check: Callable[..., Counter[str]], attributes: dict[str, Any]
) -> None:
    node = helper.make_node("AveragePool", ["x"], ["y"], **attributes)
    path = _model(tmp_path / "m.onnx", [node], [2, 3, 5, 7], {})
    assert check(path, _floats(2, 3, 5, 7)) == {"GlobalAveragePool": 1}


@pytest.mark.parametrize("form", ["half last", "half first", "half of sum"])
@pytest.mark.parametrize("inner", ["Div", "Mul"])
def test_gelu_by_the_error_function_is_put_together(
    tmp_path: Path, check: Callable[..., Counter[str]], form: str, inner: str
) -> None:
    root = np.float32(np.sqrt(2.0 if inner == "Div" else 0.5))
    nodes = [
        helper.make_node(inner, ["x", "root"], ["a"]),
        helper.make_node("Erf", ["a"], ["b"]),
        helper.make_node("Add", ["b", "one"], ["c"]),
    ]
    if form == "half last":
        nodes += [helper.make_node("Mul", ["x", "c"], ["d"]), helper.make_node("Mul", ["d", "half"], ["y"])]
    elif form == "half first":
        nodes += [helper.make_node("Mul", ["x", "half"], ["d"]), helper.make_node("Mul", ["d", "c"], ["y"])]
    else:
        nodes += [helper.make_node("Mul", ["c", "half"], ["d"]), helper.make_node("Mul", ["x", "d"], ["y"])]
    constants = {"root": np.array(root), "one": np.array(1, np.float32), "half": np.array(0.5, np.float32)}
    path = _model(tmp_path / "m.onnx", nodes, [2, 6], constants)
    assert check(path, _floats(2, 6)) == {"Gelu": 1}


def test_an_error_function_of_something_else_stays(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Div", ["x", "root"], ["a"]),
        helper.make_node("Erf", ["a"], ["b"]),
        helper.make_node("Add", ["b", "one"], ["c"]),
        helper.make_node("Mul", ["c", "half"], ["y"]),
    ]
    constants = {"root": np.float32(2.0), "one": np.float32(1), "half": np.float32(0.5)}
    path = _model(tmp_path / "m.onnx", nodes, [2, 6], {k: np.array(v) for k, v in constants.items()})
    clean_for(path, tmp_path / "o.onnx", "onnxruntime-cpu")
    assert _kinds(tmp_path / "o.onnx")["Erf"] == 1


def _guarded(tmp_path: Path, mask: float) -> Path:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Add", ["a", "mask"], ["b"]),
        helper.make_node("Softmax", ["b"], ["p"], axis=-1),
        helper.make_node("IsNaN", ["p"], ["n"]),
        helper.make_node("Where", ["n", "zero", "p"], ["q"]),
        helper.make_node("MatMul", ["q", "v"], ["y"]),
    ]
    hidden = np.zeros((4, 4), np.float32)
    hidden[:, 3] = mask
    constants = {"w": _floats(4, 4), "v": _floats(4, 4), "mask": hidden, "zero": np.array(0, np.float32)}
    return _model(tmp_path / "m.onnx", nodes, [4, 4], constants)


def test_guards_behind_softmax_are_dropped_where_masks_are_finite(
    tmp_path: Path, check: Callable[..., Counter[str]]
) -> None:
    kinds = check(_guarded(tmp_path, float(np.finfo(np.float32).min)), _floats(4, 4))
    assert not kinds["IsNaN"]
    assert not kinds["Where"]


def test_guards_behind_softmax_stay_where_masks_are_infinite(tmp_path: Path) -> None:
    clean_for(_guarded(tmp_path, float("-inf")), tmp_path / "o.onnx", "onnxruntime-cpu")
    assert _kinds(tmp_path / "o.onnx")["IsNaN"] == 1


def test_normalizations_factors_and_paddings_go_into_convolutions(
    tmp_path: Path, check: Callable[..., Counter[str]]
) -> None:
    nodes = [
        helper.make_node("Pad", ["x", "pads"], ["a"]),
        helper.make_node("Conv", ["a", "w"], ["b"], strides=[2, 2], pads=[0, 1, 0, 0], group=2),
        helper.make_node("BatchNormalization", ["b", "s", "t", "m", "v"], ["c"], epsilon=1e-3),
        helper.make_node("Mul", ["c", "factor"], ["d"]),
        helper.make_node("Add", ["d", "summand"], ["e"]),
        helper.make_node("Relu", ["e"], ["y"]),
    ]
    constants: dict[str, NDArray[Any]] = {
        "pads": np.array([0, 0, 0, 1, 0, 0, 1, 2], np.int64),
        "w": _floats(6, 2, 3, 3),
        "s": _floats(6),
        "t": _floats(6),
        "m": _floats(6),
        "v": np.abs(_floats(6)) + 0.1,
        "factor": _floats(6, 1, 1),
        "summand": np.array(0.25, np.float32),
    }
    path = _model(tmp_path / "m.onnx", nodes, [2, 4, 8, 9], constants)
    assert check(path, _floats(2, 4, 8, 9)) == {"Conv": 1, "Relu": 1}


def test_sums_with_zeros_and_products_with_ones_are_dropped(tmp_path: Path, check: Callable[..., Counter[str]]) -> None:
    nodes = [
        helper.make_node("Add", ["x", "zeros"], ["a"]),
        helper.make_node("Mul", ["ones", "a"], ["b"]),
        helper.make_node("Add", ["b", "wider"], ["c"]),
        helper.make_node("Div", ["ones", "c"], ["d"]),
        helper.make_node("Relu", ["d"], ["y"]),
    ]
    constants: dict[str, NDArray[Any]] = {
        "zeros": np.zeros((1, 4), np.float32),
        "ones": np.ones((4,), np.float32),
        "wider": np.zeros((2, 3, 4), np.float32),
    }
    path = _model(tmp_path / "m.onnx", nodes, [3, 4], constants)
    assert check(path, _floats(3, 4)) == {"Add": 1, "Div": 1, "Relu": 1}


def test_paddings_with_something_else_stay(tmp_path: Path) -> None:
    nodes = [helper.make_node("Pad", ["x", "pads", "one"], ["a"]), helper.make_node("Conv", ["a", "w"], ["y"])]
    constants: dict[str, NDArray[Any]] = {
        "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64),
        "w": _floats(2, 3, 3, 3),
        "one": np.array(1, np.float32),
    }
    path = _model(tmp_path / "m.onnx", nodes, [1, 3, 8, 8], constants)
    clean_for(path, tmp_path / "o.onnx", "onnxruntime-cpu")
    assert _kinds(tmp_path / "o.onnx")["Pad"] == 1


def test_constants_and_known_shapes_are_computed(tmp_path: Path, check: Callable[..., Counter[str]]) -> None:
    nodes = [
        helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0]),
        helper.make_node("Identity", ["x"], ["i"]),
        helper.make_node("MatMul", ["i", "t"], ["a"]),
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Gather", ["s", "zero"], ["n"]),
        helper.make_node("Concat", ["n", "rest"], ["to"], axis=0),
        helper.make_node("Reshape", ["a", "to"], ["y"]),
    ]
    constants: dict[str, NDArray[Any]] = {
        "w": _floats(6, 4),
        "zero": np.array([0], np.int64),
        "rest": np.array([2, 3], np.int64),
    }
    path = _model(tmp_path / "m.onnx", nodes, [5, 4], constants)
    assert check(path, _floats(5, 4)) == {"MatMul": 1, "Reshape": 1}


@pytest.mark.parametrize("bias", [True, False])
def test_products_of_one_input_are_joined_when_asked(
    tmp_path: Path, check: Callable[..., Counter[str]], bias: bool
) -> None:
    nodes, constants = [], {}
    for name, columns in (("q", 4), ("k", 4), ("v", 6)):
        constants[f"w{name}"] = _floats(8, columns)
        nodes.append(helper.make_node("MatMul", ["x", f"w{name}"], [f"m{name}"]))
        if bias:
            constants[f"b{name}"] = _floats(columns)
            nodes.append(helper.make_node("Add", [f"b{name}", f"m{name}"], [name]))
        else:
            nodes[-1].output[0] = name
    nodes.append(helper.make_node("Concat", ["v", "q", "k"], ["y"], axis=-1))
    path = _model(tmp_path / "m.onnx", nodes, [2, 5, 8], constants)
    x = _floats(2, 5, 8)
    kinds = check(path, x, join=True)
    assert kinds["MatMul"] == 1
    assert kinds["Split"] == 1
    assert kinds["Add"] == int(bias)


@pytest.mark.parametrize("name", ["resnet", "mobilenet", "efficientnet", "bert", "vit"])
def test_exported_models_stay_what_they_are(
    tiny: Callable[[str], Path],
    make_feeds: Callable[..., dict[str, NDArray[Any]]],
    run_model: Callable[..., NDArray[Any]],
    tmp_path: Path,
    name: str,
) -> None:
    source = tiny(name)
    feeds = make_feeds(source)
    out = tmp_path / "clean.onnx"
    clean_for(source, out, "onnxruntime-cpu", join=True)
    onnx.checker.check_model(out, full_check=True)
    np.testing.assert_allclose(run_model(out, feeds), run_model(source, feeds), rtol=1e-3, atol=1e-4)
    before, after = onnx.load(source), onnx.load(out)
    assert [v.name for v in after.graph.output] == [v.name for v in before.graph.output]
    assert [v.name for v in after.graph.input] == [v.name for v in before.graph.input]
    used = {name for node in after.graph.node for name in node.input}
    assert {i.name for i in after.graph.initializer} <= used


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"\x08\x09garbage")
    with pytest.raises(SourceError, match=r"bad\.onnx"):
        clean_for(bad, tmp_path / "o.onnx", "onnxruntime-cpu")
    with pytest.raises(ConversionError, match="backend"):
        clean_for(bad, tmp_path / "o.onnx", "abacus")
    assert not (tmp_path / "o.onnx").exists()
