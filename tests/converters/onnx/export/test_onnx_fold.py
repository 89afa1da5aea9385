"""Constants that are computed once."""

from __future__ import annotations

import numpy as np
import pytest

from edgeq.converters.onnx.export.fold import fold_constants

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx_ir")

import onnx
import onnx_ir as ir


def _graph(text: str) -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["": 20]> {text}'))


def test_chains_of_constants_become_one_weight() -> None:
    model = _graph("""g (float[2] x) => (float[2] y) <float[2] a = {1.0, 2.0}, float[2] b = {3.0, 4.0}> {
        c = Add(a, b)
        d = Sqrt(c)
        y = Mul(x, d)
    }""")
    assert fold_constants(model) == 2
    assert [node.op_type for node in model.graph] == ["Mul"]
    assert list(model.graph.initializers) == ["d"]
    folded = model.graph.initializers["d"].const_value
    assert folded is not None
    np.testing.assert_allclose(folded.numpy(), [2.0, 6.0**0.5], rtol=1e-6)


def test_what_would_make_the_file_larger_stays() -> None:
    model = _graph("""g (float[4000,100] x) => (float[4000,100] y)
        <float[1] a = {1.0}, int64[2] shape = {4000, 100}> {
        b = Expand(a, shape)
        y = Mul(x, b)
    }""")
    assert fold_constants(model) == 0
    assert [node.op_type for node in model.graph] == ["Expand", "Mul"]


def test_quantized_weights_and_chance_stay() -> None:
    model = _graph("""g (float[2] x) => (float[2] y, float[2] z)
        <int8[2] w = {1, 2}, float s = {0.5}, float[2] a = {1.0, 2.0}> {
        d = DequantizeLinear(w, s)
        y = Mul(x, d)
        r = RandomNormalLike(a)
        z = Mul(x, r)
    }""")
    assert fold_constants(model) == 0


def test_an_output_that_is_constant_stays_an_output() -> None:
    model = _graph("g (float[2] x) => (float[2] y) <float[2] a = {1.0, 2.0}> { y = Sqrt(a) }")
    assert fold_constants(model) == 0
    assert model.graph.outputs[0].name == "y"
