"""Graphs of bytes: kernels and buffers as ONNX Runtime has them, for what edgeq itself quantizes."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, Protocol

import pytest

from edgeq.converters.onnx.calibration.ranges import Range
from edgeq.converters.onnx.graph import read_onnx
from edgeq.converters.onnx.quantize.graph import open_editor, save_model
from edgeq.converters.onnx.quantize.static import calibration_tensors, quantize_static
from edgeq.profiles.onnx.memory import played_arena_bytes

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

CHILD = """
import sys
import numpy as np
import onnxruntime as ort
from edgeq.profiles.onnx.session import PROVIDERS, onnx_session_options

ort.set_default_logger_severity(1)
options = onnx_session_options(1, dims={"n": 1})
options.optimized_model_filepath = sys.argv[2]
session = ort.InferenceSession(sys.argv[1], options, providers=list(PROVIDERS))
print("loaded", file=sys.stderr, flush=True)
for _ in range(4):
    result = session.run(None, {i.name: np.ones([a if isinstance(a, int) else 1 for a in i.shape], np.float32)
                                for i in session.get_inputs()})
"""


class MakeNetwork(Protocol):
    """The signature of the fixture."""

    def __call__(self, *, name: str = "model", external: bool = False, extra: Any = ()) -> Path:
        """Write the network."""
        ...


def quantized(model: Path, out: Path) -> Path:
    ranges = dict.fromkeys(calibration_tensors(model, "onnxruntime-cpu"), Range(-1.0, 1.0))
    quantize_static(model, out, ranges, backend="onnxruntime-cpu", activations="u8")
    return out


def executed(path: Path, optimized: Path) -> tuple[Counter[str], int]:
    """Kernels of ONNX Runtime's own graph, and bytes by which calls let the arena grow."""
    command = [sys.executable, "-c", CHILD, str(path), str(optimized)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    grown = re.findall(r"Extending BFCArena.*rounded_bytes:(\d+)", done.stderr.split("loaded")[1])
    return Counter(node.op_type for node in onnx.load(optimized).graph.node), sum(int(n) for n in grown)


def test_a_network_of_bytes_has_the_kernels_and_the_arena_of_onnx_runtime(
    make_network: MakeNetwork, tmp_path: Path
) -> None:
    path = quantized(make_network(), tmp_path / "int8.onnx")
    shape = read_onnx(path, {"n": 1}, fixed=True)
    theirs, grown = executed(path, tmp_path / "optimized.onnx")
    ours = Counter(node.op_type for node in shape.nodes)
    assert theirs["QLinearConv"] == ours["QLinearConv"] == 2
    assert theirs["QLinearAdd"] == ours["QLinearAdd"] == 1
    assert ours["DequantizeLinear"] == theirs["DequantizeLinear"]
    assert abs(played_arena_bytes(shape.nodes, shape.values, shape.outputs) - grown) <= 8192


def transformer(path: Path, inner: int = 96) -> Path:
    """A product, a bias, and a product that reads it: what dynamic and static INT8 of transformers is made of."""
    import numpy as np

    rng = np.random.default_rng(0)
    weights = {"w": (64, inner), "b": (inner,), "v": (inner, 64)}
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("MatMul", ["x", "w"], ["a"], name="up"),
            onnx.helper.make_node("Add", ["a", "b"], ["c"], name="bias"),
            onnx.helper.make_node("Relu", ["c"], ["r"], name="relu"),
            onnx.helper.make_node("MatMul", ["r", "v"], ["y"], name="down"),
        ],
        "g",
        [onnx.helper.make_tensor_value_info("x", 1, [1, 8, 64])],
        [onnx.helper.make_tensor_value_info("y", 1, [1, 8, 64])],
        [onnx.numpy_helper.from_array(rng.standard_normal(dims).astype(np.float32), n) for n, dims in weights.items()],
    )
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def test_weights_of_integer_products_in_the_file_are_packed(tmp_path: Path) -> None:
    path = quantized(transformer(tmp_path / "model.onnx"), tmp_path / "int8.onnx")
    shape = read_onnx(path, {})
    assert Counter(node.op_type for node in shape.nodes)["MatMulIntegerToFloat"] == 2
    assert [p.form for p in shape.parameters if p.n_bytes == 64 * 96] == ["packed", "packed"]
    assert shape.flops == 2 * 2 * 8 * 64 * 96


def test_nothing_is_written_that_nobody_reads(tmp_path: Path) -> None:
    graph = onnx.load(quantized(transformer(tmp_path / "model.onnx"), tmp_path / "int8.onnx")).graph
    read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    assert [node.op_type for node in graph.node if not read & set(node.output)] == []


def test_a_reader_that_stands_before_its_maker_goes_with_it(tmp_path: Path) -> None:
    editor = open_editor(transformer(tmp_path / "model.onnx"))
    first = editor.graph[0]
    unread = editor.node("Relu", [first.outputs[0]], "unread", before=None)
    editor.node("Neg", [unread.outputs[0]], "reads it", before=first)
    save_model(editor, tmp_path / "saved.onnx")
    assert [node.op_type for node in onnx.load(tmp_path / "saved.onnx").graph.node] == [
        "MatMul",
        "Add",
        "Relu",
        "MatMul",
    ]


def test_optimizers_that_are_off_fuse_nothing(tmp_path: Path) -> None:
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("Neg", ["x"], ["n"]),
            onnx.helper.make_node("Add", ["x", "n"], ["s"]),
            onnx.helper.make_node("LayerNormalization", ["s", "g"], ["y"]),
        ],
        "g",
        [onnx.helper.make_tensor_value_info("x", 1, [1, 8, 64])],
        [onnx.helper.make_tensor_value_info("y", 1, [1, 8, 64])],
        [onnx.helper.make_tensor("g", 1, [64], [1.0] * 64)],
    )
    path = tmp_path / "norm.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10), path)
    assert "SkipLayerNormalization" in {node.op_type for node in read_onnx(path, {}).nodes}
    apart = read_onnx(path, {}, disabled_optimizers=("SkipLayerNormFusion",))
    assert {node.op_type for node in apart.nodes} == {"Neg", "Add", "LayerNormalization"}
