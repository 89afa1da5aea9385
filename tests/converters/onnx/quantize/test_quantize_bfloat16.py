"""BF16: what computes in it, in which opset, and the copy of such a model that a CPU computes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgeq.converters.onnx.quantize.half import to_half
from edgeq.converters.onnx.quantize.half_kinds import BFLOAT16, FLOAT16
from edgeq.converters.onnx.quantize.rounded import write_rounded
from edgeq.errors import ConversionError

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
ml_dtypes = pytest.importorskip("ml_dtypes")
pytest.importorskip("onnx_ir")

_FLOAT, _BFLOAT = 1, 16
Arrays = dict[str, NDArray[Any]]


def _saved(path: Path, nodes: Sequence[Any], arrays: Arrays, x: Sequence[int], opset: int = 20) -> Path:
    """A model from ``x`` to the last node's output."""
    info = onnx.helper.make_tensor_value_info
    constants = [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()]
    out = info(nodes[-1].output[0], _FLOAT, None)
    graph = onnx.helper.make_graph(nodes, "g", [info("x", _FLOAT, x)], [out], constants)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=9)
    onnx.save(model, path)
    return path


def _node(op_type: str, inputs: str, output: str, **attributes: Any) -> Any:
    return onnx.helper.make_node(op_type, inputs.split(), [output], name=output, **attributes)


def _types(path: Path) -> dict[str, int]:
    """Element type of every value, as onnx infers it strictly."""
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    graph = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True).graph
    values = (*graph.value_info, *graph.input, *graph.output)
    return {v.name: v.type.tensor_type.elem_type for v in values} | {i.name: i.data_type for i in graph.initializer}


def _run(path: Path, x: NDArray[Any]) -> NDArray[Any]:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


def _rounded(array: NDArray[Any]) -> NDArray[Any]:
    found: NDArray[Any] = array.astype(ml_dtypes.bfloat16).astype(np.float32)
    return found


def _opset(path: Path) -> int:
    return int(next(entry.version for entry in onnx.load(path).opset_import if entry.domain == ""))


def _network(path: Path) -> Path:
    """A convolution and a product."""
    rng = np.random.default_rng(0)
    arrays = {
        "w": rng.standard_normal((4, 3, 3, 3)).astype(np.float32),
        "flat": np.array([1, -1]),
        "v": rng.standard_normal((4 * 36, 50)).astype(np.float32),
    }
    nodes = [_node("Conv", "x w", "conv"), _node("Reshape", "conv flat", "rows"), _node("MatMul", "rows v", "y")]
    return _saved(path, nodes, arrays, [1, 3, 8, 8])


def test_products_and_convolutions_read_and_make_bfloat16(tmp_path: Path) -> None:
    notes = to_half(_network(tmp_path / "m.onnx"), tmp_path / "b.onnx", kind=BFLOAT16)
    assert notes == ()
    assert _opset(tmp_path / "b.onnx") == 22
    types = _types(tmp_path / "b.onnx")
    assert types["conv"] == types["rows"] == _BFLOAT
    assert (types["x"], types["y"]) == (_FLOAT, _FLOAT)


def test_convolutions_stay_floats_where_the_opset_stays(tmp_path: Path) -> None:
    model = _network(tmp_path / "m.onnx")
    (note,) = to_half(model, tmp_path / "b.onnx", kind=BFLOAT16, newest_opset=20)
    assert note == (
        "1 of 2 products compute in float32, such as 'conv': Conv takes bfloat16 from opset 22 on, and this is 20"
    )
    assert _opset(tmp_path / "b.onnx") == 20
    types = _types(tmp_path / "b.onnx")
    assert (types["conv"], types["rows"]) == (_FLOAT, _BFLOAT)


def test_transposed_convolutions_stay_floats(tmp_path: Path) -> None:
    arrays = {"w": np.ones((3, 4, 2, 2), np.float32), "v": np.ones((4, 4, 1, 1), np.float32)}
    nodes = [_node("ConvTranspose", "x w", "larger", strides=[2, 2]), _node("Conv", "larger v", "y")]
    model = _saved(tmp_path / "m.onnx", nodes, arrays, [1, 3, 8, 8])
    notes = to_half(model, tmp_path / "b.onnx", kind=BFLOAT16)
    types = _types(tmp_path / "b.onnx")
    assert (types["larger"], types["v_half"]) == (_FLOAT, _BFLOAT)
    assert [note for note in notes if "TensorRT-RTX does not build ConvTranspose in bfloat16" in note]


def test_a_model_of_convolutions_alone_is_refused_there(tmp_path: Path) -> None:
    w = np.ones((4, 3, 3, 3), np.float32)
    model = _saved(tmp_path / "m.onnx", [_node("Conv", "x w", "y")], {"w": w}, [1, 3, 8, 8])
    with pytest.raises(ConversionError, match="Nothing would compute in bfloat16: Conv takes bfloat16 from opset 22"):
        to_half(model, tmp_path / "b.onnx", kind=BFLOAT16, newest_opset=20)
    assert not (tmp_path / "b.onnx").exists()


def test_opsets_that_the_writer_skips_change_types_alone() -> None:
    from onnx import defs

    def traits(schema: Any) -> Any:
        attributes = {name: (a.type, a.required, str(a.default_value)) for name, a in schema.attributes.items()}
        return attributes, [(i.name, i.option) for i in schema.inputs], [(o.name, o.option) for o in schema.outputs]

    names = {schema.name for schema in defs.get_all_schemas_with_history() if schema.domain == ""}
    pairs = {name: [defs.get_schema(name, opset, "") for opset in (20, 22)] for name in names if defs.has(name, 20, "")}
    changed = {name for name, (old, new) in pairs.items() if traits(old) != traits(new)}
    # Grids only gained attributes that may be left out; onnx's checker takes no GroupNormalization in opset 20.
    assert pairs["GroupNormalization"][0].deprecated
    assert changed == {"DequantizeLinear", "GroupNormalization", "QuantizeLinear"}
    for name in ("DequantizeLinear", "QuantizeLinear"):
        old, new = pairs[name]
        assert not any(new.attributes[extra].required for extra in new.attributes.keys() - old.attributes.keys())


def test_masks_beyond_bfloat16_stay_finite(tmp_path: Path) -> None:
    least = np.array([np.finfo(np.float32).min], np.float32)
    nodes = [_node("MatMul", "x w", "rows"), _node("Add", "rows least", "y")]
    model = _saved(tmp_path / "m.onnx", nodes, {"w": np.eye(4, dtype=np.float32), "least": least}, [2, 4])
    assert to_half(model, tmp_path / "b.onnx", kind=BFLOAT16) == ()
    write_rounded(tmp_path / "b.onnx", tmp_path / "r.onnx")
    assert np.isfinite(_run(tmp_path / "r.onnx", np.zeros((2, 4), np.float32))).all()


@pytest.mark.parametrize("op_type", ["Mul", "MatMul"])
def test_angles_of_positions_keep_their_digits(tmp_path: Path, op_type: str) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "w": rng.standard_normal((8, 8)).astype(np.float32),
        "speeds": (0.7 ** np.arange(8, dtype=np.float32)).reshape(1, 8),
        "rows": np.array([0, -1]),
    }
    nodes = [
        _node("Reshape", "x rows", "many"),  # keeps the positions from being folded into a constant
        _node("Shape", "many", "size"),
        _node("Gather", "size zero", "count"),
        _node("Range", "zero count one", "steps"),
        _node("Cast", "steps", "floats", to=_FLOAT),
        _node("Unsqueeze", "floats last", "column"),
        _node(op_type, "column speeds", "angles"),
        _node("Cos", "angles", "waves"),
        _node("Mul", "many waves", "turned"),
        _node("MatMul", "turned w", "y"),
    ]
    arrays |= {"zero": np.array(0), "one": np.array(1), "last": np.array([1])}
    model = _saved(tmp_path / "m.onnx", nodes, arrays, [700, 8])
    to_half(model, tmp_path / "b.onnx", kind=BFLOAT16)
    types = _types(tmp_path / "b.onnx")
    assert (types["floats"], types["angles"], types["waves"]) == (_FLOAT, _FLOAT, _FLOAT)
    assert types["turned"] == _BFLOAT
    write_rounded(tmp_path / "b.onnx", tmp_path / "r.onnx")
    x = rng.standard_normal((700, 8)).astype(np.float32)
    exact, found = _run(model, x), _run(tmp_path / "r.onnx", x)
    assert np.linalg.norm(found - exact) < 0.01 * np.linalg.norm(exact)


def test_operators_that_tensorrt_does_not_build_in_it_stay_floats(tmp_path: Path) -> None:
    nodes = [_node("MatMul", "x w", "a"), _node("HardSwish", "a", "b"), _node("MatMul", "b w", "y")]
    model = _saved(tmp_path / "m.onnx", nodes, {"w": np.eye(4, dtype=np.float32)}, [2, 4])
    assert to_half(model, tmp_path / "b.onnx", kind=BFLOAT16) == ()
    types = _types(tmp_path / "b.onnx")
    assert (types["a"], types["b"]) == (_BFLOAT, _FLOAT)


def test_a_network_of_convolutions_with_one_product_is_refused_there(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "w": rng.standard_normal((16, 3, 3, 3)).astype(np.float32),
        "flat": np.array([1, -1]),
        "v": rng.standard_normal((16, 5)).astype(np.float32),
    }
    nodes = [
        _node("Conv", "x w", "conv"),
        _node("GlobalAveragePool", "conv", "mean"),
        _node("Reshape", "mean flat", "rows"),
        _node("MatMul", "rows v", "y"),
    ]
    model = _saved(tmp_path / "m.onnx", nodes, arrays, [1, 3, 16, 16])
    inferred = onnx.shape_inference.infer_shapes(onnx.load(model))
    onnx.save(inferred, model)
    with pytest.raises(ConversionError, match="Only 0% of the multiply-adds would compute in bfloat16: Conv takes"):
        to_half(model, tmp_path / "b.onnx", kind=BFLOAT16, newest_opset=20)
    to_half(model, tmp_path / "b.onnx", kind=BFLOAT16, newest_opset=22)


def test_a_model_in_float16_is_not_called_bfloat16(tmp_path: Path) -> None:
    nodes = [
        _node("Cast", "x", "half", to=10),
        _node("MatMul", "half w", "made"),
        _node("Cast", "made", "y", to=_FLOAT),
    ]
    model = _saved(tmp_path / "m.onnx", nodes, {"w": np.eye(4, dtype=np.float16)}, [2, 4])
    with pytest.raises(ConversionError, match="Nothing would compute in bfloat16: the model has no product"):
        to_half(model, tmp_path / "b.onnx", kind=BFLOAT16)


def test_sequences_are_refused(tmp_path: Path) -> None:
    nodes = [
        _node("SplitToSequence", "x", "parts"),
        _node("ConcatFromSequence", "parts", "again", axis=0),
        _node("MatMul", "again w", "y"),
    ]
    model = _saved(tmp_path / "m.onnx", nodes, {"w": np.eye(4, dtype=np.float32)}, [2, 4])
    with pytest.raises(ConversionError, match="SplitToSequence 'parts' is for other than dense tensors"):
        to_half(model, tmp_path / "b.onnx", kind=BFLOAT16)


def test_numbers_that_vanish_in_float16_need_no_floats(tmp_path: Path) -> None:
    arrays = {"w": np.eye(4, dtype=np.float32), "tiny": np.array([1e-12], np.float32)}
    nodes = [_node("MatMul", "x w", "rows"), _node("Div", "rows tiny", "y")]
    model = _saved(tmp_path / "m.onnx", nodes, arrays, [2, 4])
    assert to_half(model, tmp_path / "b.onnx", kind=BFLOAT16) == ()
    assert any("float16 does not hold 1e-12" in note for note in to_half(model, tmp_path / "h.onnx", kind=FLOAT16))


def test_grids_keep_float32_scales(tmp_path: Path) -> None:
    arrays: Arrays = {
        "s": np.array(0.01234567, np.float32),
        "zero": np.array(0, np.int8),
        "w": np.eye(4, dtype=np.float32),
        "v": np.eye(4, dtype=np.float32),
    }
    nodes = [
        _node("QuantizeLinear", "x s zero", "q"),
        _node("DequantizeLinear", "q s zero", "d"),
        _node("MatMul", "d w", "rows"),
        _node("MatMul", "rows v", "y"),
    ]
    (note,) = to_half(_saved(tmp_path / "m.onnx", nodes, arrays, [2, 4]), tmp_path / "b.onnx", kind=BFLOAT16)
    assert "'rows': bfloat16 has too few digits for scales" in note
    types = _types(tmp_path / "b.onnx")
    assert types["s"] == types["d"] == types["rows"] == _FLOAT
    assert types["v_half"] == _BFLOAT


def test_the_copy_rounds_what_the_model_has_in_bfloat16(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal(size).astype(np.float32) for name, size in (("w", (16, 8)), ("b", (8,)))}
    nodes = [
        _node("MatMul", "x w", "product"),
        _node("Add", "product b", "sum"),
        _node("Relu", "sum", "positive"),
        _node("Softmax", "positive", "shares"),
        _node("Mul", "shares b", "y"),
    ]
    to_half(_saved(tmp_path / "m.onnx", nodes, arrays, [4, 16]), tmp_path / "b.onnx", kind=BFLOAT16)
    write_rounded(tmp_path / "b.onnx", tmp_path / "r.onnx")
    x = rng.standard_normal((4, 16)).astype(np.float32)
    product = _rounded(_rounded(x) @ _rounded(arrays["w"]))
    positive = np.maximum(_rounded(product + _rounded(arrays["b"])), 0)
    raised = np.exp(positive - positive.max(-1, keepdims=True))
    shares = _rounded(raised / raised.sum(-1, keepdims=True))  # Softmax itself is in FP32
    expected = _rounded(shares * _rounded(arrays["b"]))
    found = _run(tmp_path / "r.onnx", x)
    # A sum in another order may round to the neighbour.
    np.testing.assert_allclose(found, expected, rtol=2**-7)
    assert (found == expected).mean() > 0.9
    np.testing.assert_array_equal(found, _rounded(found))
    made = {name for node in onnx.load(tmp_path / "r.onnx").graph.node for name in node.output}
    assert {"product", "sum", "positive", "y"} <= made


def test_torch_in_bfloat16_is_as_far_off(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    sizes = (32, 64, 64, 16)
    weights = [torch.randn(a, b) / a**0.5 for a, b in itertools.pairwise(sizes)]
    nodes: list[Any] = []
    for index in range(len(weights)):
        nodes.append(_node("MatMul", f"{nodes[-1].output[0] if nodes else 'x'} w{index}", f"p{index}"))
        nodes.append(_node("Tanh", f"p{index}", f"t{index}"))
    arrays = {f"w{index}": weight.numpy() for index, weight in enumerate(weights)}
    model = _saved(tmp_path / "m.onnx", nodes, arrays, [64, 32])
    to_half(model, tmp_path / "b.onnx", kind=BFLOAT16)
    write_rounded(tmp_path / "b.onnx", tmp_path / "r.onnx")
    x = torch.randn(64, 32)
    half = x.bfloat16()
    for weight in weights:
        half = torch.tanh(half @ weight.bfloat16())
    exact = _run(model, x.numpy())
    ours = np.linalg.norm(_run(tmp_path / "r.onnx", x.numpy()) - exact)
    theirs = np.linalg.norm(half.float().numpy() - exact)
    assert 0.9 < ours / theirs < 1.1


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_rounding_is_that_of_torch(number: float) -> None:
    torch = pytest.importorskip("torch")
    found = BFLOAT16.rounded(np.array([number], np.float32)).astype(np.float32)
    np.testing.assert_array_equal(found, torch.tensor([number], dtype=torch.float32).bfloat16().float().numpy())


def test_the_largest_numbers_are_those_of_the_types() -> None:
    assert float(ml_dtypes.finfo(ml_dtypes.bfloat16).max) == BFLOAT16.largest
    assert float(np.finfo(np.float16).max) == FLOAT16.largest
