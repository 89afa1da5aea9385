"""Attention that multiplies its heads where they lie: the same numbers, and only where that is sure."""

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

from edgeq.converters.onnx.graph import read_onnx
from edgeq.converters.onnx.layers import compare_layers
from edgeq.converters.onnx.quantize.clean import clean_for
from edgeq.converters.onnx.quantize.dynamic import quantize_dynamic
from edgeq.converters.onnx.quantize.graph import infer_shapes, open_editor, save_model
from edgeq.converters.onnx.quantize.heads import read_heads_in_place

ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx_ir")

HEADS, WIDTH, TOKENS = 3, 4, 5
Feeds = dict[str, NDArray[Any]]


def _attention(
    path: Path,
    *,
    batch: int | str = 1,
    mask: Sequence[int | str] | None = None,
    scale: str | None = "Mul",
    axis: int = -1,
    merged: Sequence[int] = (1, -1, HEADS * WIDTH),
    extra_reader: str | None = None,
    mask_first: bool = False,
    dtype: type[np.floating[Any]] = np.float32,
) -> Path:
    """Self-attention on ``x`` of [batch, tokens, heads * width], as exporters write it."""
    size = HEADS * WIDTH
    heads = [-1 if isinstance(batch, str) else batch, TOKENS, HEADS, WIDTH]
    shapes = {"heads": np.array(heads), "merged": np.array(merged)}
    arrays = {**shapes, "half": np.array([0.5], dtype)}
    nodes = []
    for name, perm in (("q", (0, 2, 1, 3)), ("k", (0, 2, 3, 1)), ("v", (0, 2, 1, 3))):
        arrays[f"w{name}"] = np.random.default_rng(ord(name)).standard_normal((size, size)).astype(dtype)
        nodes += [
            helper.make_node("MatMul", ["x", f"w{name}"], [f"{name}0"], name=f"{name}_project"),
            helper.make_node("Reshape", [f"{name}0", "heads"], [f"{name}1"], name=f"{name}_split"),
            helper.make_node("Transpose", [f"{name}1"], [f"{name}2"], name=f"{name}_move", perm=perm),
        ]
    nodes.append(helper.make_node("MatMul", ["q2", "k2"], ["scores"], name="scores"))
    last = "scores"
    if scale is not None:
        nodes.append(helper.make_node(scale, [last, "half"], ["scaled"], name="scale"))
        last = "scaled"
    if mask is not None:
        both = ["mask", last] if mask_first else [last, "mask"]
        nodes.append(helper.make_node("Add", both, ["masked"], name="add"))
        last = "masked"
    nodes += [
        helper.make_node("Softmax", [last], ["shares"], name="softmax", axis=axis),
        helper.make_node("MatMul", ["shares", "v2"], ["mixed"], name="mix"),
        helper.make_node("Transpose", ["mixed"], ["moved"], name="back", perm=(0, 2, 1, 3)),
        helper.make_node("Reshape", ["moved", "merged"], ["joined"], name="join"),
        helper.make_node("MatMul", ["joined", "wq"], ["y"], name="out"),
    ]
    info, kind = helper.make_tensor_value_info, helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    inputs = [info("x", kind, [batch, TOKENS, size])]
    if mask is not None:
        inputs.append(info("mask", kind, list(mask)))
    outputs = [info("y", kind, [batch, TOKENS, size])]
    if extra_reader is not None:
        nodes.append(helper.make_node("Identity", [extra_reader], ["seen"], name="look"))
        outputs.append(info("seen", kind, None))
    constants = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "g", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(onnx.shape_inference.infer_shapes(model), path)
    return path


def _rewritten(model: Path) -> tuple[Path, int]:
    editor, out = open_editor(model), model.with_name("rewritten.onnx")
    infer_shapes(editor)
    count = read_heads_in_place(editor)
    save_model(editor, out)
    return out, count


def _answers(model: Path, feeds: Feeds) -> list[NDArray[Any]]:
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    return [np.asarray(array) for array in session.run(None, feeds)]


def _kinds(model: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(model).graph.node)


@pytest.mark.parametrize(
    ("mask", "scale", "mask_first"),
    [
        (None, "Mul", False),
        (None, "Div", False),
        (None, None, False),
        ((1, 1, 1, TOKENS), "Mul", False),
        ((1, 1, TOKENS, TOKENS), "Mul", True),
        ((1, HEADS, TOKENS, TOKENS), "Div", False),
        ((TOKENS, TOKENS), "Mul", False),
        ((HEADS, 1, TOKENS), None, True),
    ],
)
def test_the_same_numbers_without_moving_heads(
    tmp_path: Path, mask: Sequence[int] | None, scale: str | None, mask_first: bool
) -> None:
    model = _attention(tmp_path / "m.onnx", mask=mask, scale=scale, mask_first=mask_first)
    out, count = _rewritten(model)
    assert count == 1
    assert _kinds(out)["Transpose"] == 1
    rng = np.random.default_rng(0)
    feeds = {"x": rng.standard_normal((1, TOKENS, HEADS * WIDTH)).astype(np.float32)}
    if mask is not None:
        feeds["mask"] = rng.standard_normal(tuple(mask)).astype(np.float32)
    (expected,), (found,) = _answers(model, feeds), _answers(out, feeds)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"batch": 2, "merged": (2, -1, HEADS * WIDTH)},
        {"batch": "batch", "merged": (-1, TOKENS, HEADS * WIDTH)},
        {"mask": ("batch", 1, 1, TOKENS)},
        {"axis": 1},
        {"dtype": np.float64},
        {"merged": (1, 0, HEADS * WIDTH)},
        {"extra_reader": "shares"},
        {"extra_reader": "mixed"},
        {"extra_reader": "scores"},
    ],
)
def test_what_is_not_sure_stays_as_it_is(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert _rewritten(_attention(tmp_path / "m.onnx", **changes))[1] == 0


def test_values_that_others_read_too_are_still_there(tmp_path: Path) -> None:
    model = _attention(tmp_path / "m.onnx", extra_reader="v2")
    out, count = _rewritten(model)
    assert count == 1
    feeds = {"x": np.random.default_rng(0).standard_normal((1, TOKENS, HEADS * WIDTH)).astype(np.float32)}
    for found, expected in zip(_answers(out, feeds), _answers(model, feeds), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_exported_encoders_in_8_bits_have_one_copy_of_heads_for_each_layer(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    clean_for(tiny(name), tmp_path / "clean.onnx", "onnxruntime-cpu")
    quantize_dynamic(tmp_path / "clean.onnx", tmp_path / "int8.onnx")
    kinds, before = _kinds(tmp_path / "int8.onnx"), _kinds(tmp_path / "clean.onnx")
    assert kinds["FusedMatMul"] == 4
    assert before["Transpose"] - kinds["Transpose"] == 6  # queries, keys and values of two layers
    inputs = {value.name: value for value in onnx.load(tmp_path / "clean.onnx").graph.input}
    rng = np.random.default_rng(0)
    feeds: Feeds = {}
    for key, value in inputs.items():
        shape = [axis.dim_value for axis in value.type.tensor_type.shape.dim]
        whole = value.type.tensor_type.elem_type == TensorProto.INT64
        feeds[key] = rng.integers(0, 2, shape) if whole else rng.standard_normal(shape).astype(np.float32)
    exact, found = _answers(tmp_path / "clean.onnx", feeds)[0], _answers(tmp_path / "int8.onnx", feeds)[0]
    assert float((exact * found).sum() / np.linalg.norm(exact) / np.linalg.norm(found)) > 0.99
    monkeypatch.setattr("edgeq.converters.onnx.quantize.dynamic.read_heads_in_place", lambda _editor: 0)
    quantize_dynamic(tmp_path / "clean.onnx", tmp_path / "moved.onnx")
    in_place, moved = (
        {layer.name for layer in compare_layers(tmp_path / "clean.onnx", tmp_path / path, [feeds]) if layer.quantized}
        for path in ("int8.onnx", "moved.onnx")
    )
    # Scores and mixed values have another shape: what goes into them counts for the product behind attention.
    assert moved - in_place == {"matmul", "matmul_1", "matmul_2", "matmul_3"}
    assert in_place < moved
    for one, other in zip(*(_answers(tmp_path / path, feeds) for path in ("int8.onnx", "moved.onnx")), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_its_cost_is_that_of_the_same_products(tmp_path: Path) -> None:
    model = _attention(tmp_path / "m.onnx", mask=(1, 1, 1, TOKENS))
    out, _ = _rewritten(model)
    before, after = read_onnx(model, {}), read_onnx(out, {})
    assert after.flops == before.flops
    assert after.output_bytes == before.output_bytes
    assert after.live_peak_bytes <= before.live_peak_bytes + 4 * TOKENS  # the mask without its first axis
