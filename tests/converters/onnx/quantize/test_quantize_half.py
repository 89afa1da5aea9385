"""What halves cannot hold is said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgeq.converters.onnx.quantize.half import to_half
from edgeq.errors import ConversionError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnx_ir")


def test_a_scale_that_vanishes_in_halves_is_refused(tmp_path: Path) -> None:
    """It would make every number of its tensor zero, without a word."""
    from onnx import TensorProto, helper, numpy_helper

    constants = [
        numpy_helper.from_array(np.array(1e-12, np.float32), "tiny"),
        numpy_helper.from_array(np.array(0, np.int8), "zero"),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "tiny", "zero"], ["q"], name="round"),
        helper.make_node("DequantizeLinear", ["q", "tiny", "zero"], ["y"], name="back"),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], constants)
    path = tmp_path / "tiny.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    with pytest.raises(ConversionError, match="nothing in FP16"):
        to_half(path, tmp_path / "half.onnx")
    to_half(path, tmp_path / "brain.onnx", dtype="bfloat16")
