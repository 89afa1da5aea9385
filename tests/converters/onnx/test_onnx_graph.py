"""What `read_onnx` says of a model, against torch, against onnx and against ONNX Runtime itself."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from edgeq.converters.onnx.graph import dynamic_axes, read_onnx
from edgeq.converters.onnx.skeleton import read_skeleton
from edgeq.errors import SourceError, UnsupportedModelError, UsageError
from edgeq.profiles.onnx.cost import OnnxShape
from edgeq.profiles.onnx.memory import played_arena_bytes
from edgeq.profiles.onnx.models import OnnxNode, ValueInfo, encode_model

WIDTH, HEADS = 64, 4
Export = Callable[..., Path]

# Runs a model twice and prints what ONNX Runtime's arena says of its growth, and the graph that it made of the model.
CHILD = """
import json, sys
import numpy as np
import onnxruntime as ort
from edgeq.profiles.onnx.session import PROVIDERS, onnx_session_options

path, sizes, fixed, optimized = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3] == "1", sys.argv[4]
ort.set_default_logger_severity(1)
options = onnx_session_options(1, dims=sizes if fixed else None)
options.optimized_model_filepath = optimized
session = ort.InferenceSession(path, options, providers=list(PROVIDERS))
feeds = {}
for value in session.get_inputs():
    shape = [sizes.get(axis, axis) for axis in value.shape]
    kind = {"tensor(int64)": np.int64, "tensor(bool)": np.bool_}.get(value.type, np.float32)
    feeds[value.name] = np.ones(shape, kind)
for _ in range(4):
    result = session.run(None, feeds)
"""


class Block(torch.nn.Module):
    """An encoder layer with an embedding, as perception transformers have it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(50, WIDTH)
        self.qkv = torch.nn.ModuleList(torch.nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.mixed = torch.nn.Linear(WIDTH, WIDTH)
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(WIDTH) for _ in range(2))
        self.up, self.down = torch.nn.Linear(WIDTH, 4 * WIDTH), torch.nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, ids: Any) -> Any:
        hidden = self.table(ids)
        split = [m(hidden).unflatten(-1, (HEADS, -1)).transpose(1, 2) for m in self.qkv]
        scores = split[0] @ split[1].transpose(-1, -2) * (WIDTH // HEADS) ** -0.5
        mixed = (scores.softmax(-1) @ split[2]).transpose(1, 2).flatten(2)
        hidden = self.norms[0](hidden + self.mixed(mixed))
        return self.norms[1](hidden + self.down(torch.nn.functional.gelu(self.up(hidden))))


class Convolutions(torch.nn.Module):
    """Plain, strided, grouped and transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3, stride=2, padding=1),
            torch.nn.BatchNorm2d(8),
            torch.nn.ReLU(),
            torch.nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
            torch.nn.ConvTranspose2d(8, 4, 2, stride=2),
        )

    def forward(self, image: Any) -> Any:
        return self.layers(image)


def export(model: Any, args: tuple[Any, ...], path: Path, names: list[str], axes: Any = None, **options: Any) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model.eval(), args, dynamo=True, dynamic_shapes=axes, input_names=names, verbose=False, **options
        )
    assert program is not None
    program.save(path)
    return path


@pytest.fixture(scope="module")
def block() -> Block:
    torch.manual_seed(0)
    return Block()


@pytest.fixture(scope="module")
def block_onnx(block: Block, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`Block` with axes ``batch`` and ``sequence``."""
    axes = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("sequence", max=512)}
    path = tmp_path_factory.mktemp("block") / "block.onnx"
    return export(block, (torch.zeros((2, 8), dtype=torch.int64),), path, ["ids"], (axes,), opset_version=20)


@pytest.fixture(scope="module")
def block_old(block: Block, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`Block` in opset 18, where GELU is five nodes, with all sizes fixed."""
    path = tmp_path_factory.mktemp("block") / "old.onnx"
    return export(block, (torch.zeros((2, 24), dtype=torch.int64),), path, ["ids"], opset_version=18)


@pytest.fixture(scope="module")
def block_int8(block_onnx: Path) -> Path:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    path = block_onnx.with_name("int8.onnx")
    quantize_dynamic(block_onnx, path, weight_type=QuantType.QInt8)
    return path


def flops_by_torch(model: Any, *args: Any) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*args)
    return int(counter.get_total_flops())


@pytest.mark.parametrize(("batch", "sequence"), [(1, 8), (3, 40)])
def test_operations_of_a_transformer_are_those_that_torch_counts(
    block: Block, block_onnx: Path, batch: int, sequence: int
) -> None:
    shape = read_onnx(block_onnx, {"batch": batch, "sequence": sequence})
    assert shape.flops == flops_by_torch(block, torch.zeros((batch, sequence), dtype=torch.int64))


def test_operations_of_convolutions_are_those_that_torch_counts(tmp_path: Path) -> None:
    model, image = Convolutions().eval(), torch.zeros((2, 3, 16, 20))
    path = export(model, (image,), tmp_path / "conv.onnx", ["image"])
    shape = read_onnx(path, {})
    assert shape.flops == flops_by_torch(model, image)
    assert {node.product for node in shape.nodes if node.flops} == {"conv"}


def test_operations_of_gemm_and_of_vectors(tmp_path: Path) -> None:
    nodes = [
        OnnxNode("Gemm", ("a", "b"), ("ab",), {"transA": 1, "transB": 1}),
        OnnxNode("MatMul", ("ab", "v"), ("y",)),
    ]
    weights = {"b": np.ones((7, 5), np.float32), "v": np.ones(7, np.float32)}
    path = tmp_path / "gemm.onnx"
    path.write_bytes(
        encode_model(nodes, [ValueInfo("a", "float32", (5, 3))], [ValueInfo("y", "float32", (3,))], weights)
    )
    shape = read_onnx(path, {})
    assert {node.op_type: (node.flops, node.rows) for node in shape.nodes} == {
        "Gemm": (2 * 3 * 5 * 7, 3),
        "MatMul": (2 * 3 * 7, 3),
    }


def test_bytes_are_those_of_the_file_and_of_onnx(block: Block, block_onnx: Path, block_int8: Path) -> None:
    for path in (block_onnx, block_int8):
        shape = read_onnx(path, {"batch": 1, "sequence": 8})
        assert shape.file_bytes == path.stat().st_size
        tensors = onnx.load(path).graph.initializer
        assert shape.parameter_bytes == sum(onnx.numpy_helper.to_array(t).nbytes for t in tensors)
    products = 4 * WIDTH * WIDTH + 2 * 4 * WIDTH * WIDTH
    assert (
        sum(p.n_bytes for p in read_onnx(block_onnx, {"batch": 1, "sequence": 8}).parameters if p.form == "packed")
        == 4 * products
    )
    assert sum(p.n_bytes for p in shape.parameters if p.form == "packed") == products


def test_int8_products_are_told_from_fp32(block_onnx: Path, block_int8: Path) -> None:
    dims = {"batch": 2, "sequence": 8}
    kinds = Counter(node.kind for node in read_onnx(block_int8, dims).nodes if node.flops)
    assert kinds == {"int8": 6, "fp32": 2}
    assert read_onnx(block_int8, dims).flops == read_onnx(block_onnx, dims).flops


def test_static_quantization_is_int8(block_onnx: Path, tmp_path: Path) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime is untyped
        def __init__(self) -> None:
            self.left = [{"ids": np.arange(16, dtype=np.int64).reshape(2, 8)}]

        def get_next(self) -> Any:
            return self.left.pop() if self.left else None

    path = tmp_path / "qdq.onnx"
    quantize_static(block_onnx, path, Reader(), quant_format=QuantFormat.QDQ, op_types_to_quantize=["MatMul"])
    nodes = read_onnx(path, {"batch": 2, "sequence": 8}).nodes
    assert Counter(node.kind for node in nodes if node.flops) == {"int8": 8}


# ---- against ONNX Runtime -------------------------------------------------------------------------------------------


def run_in_runtime(path: Path, sizes: Mapping[str, int], *, fixed: bool, optimized: Path) -> int:
    """Bytes by which ONNX Runtime's arena grew, and its own graph in a file."""
    command = [sys.executable, "-c", CHILD, str(path), json.dumps(sizes), str(int(fixed)), str(optimized)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return sum(int(n) for n in re.findall(r"Extending BFCArena.*rounded_bytes:(\d+)", done.stderr))


def arena(shape: OnnxShape) -> int:
    return played_arena_bytes(shape.nodes, shape.values, shape.outputs)


# All that costs something; ONNX Runtime rearranges what computes shapes.
COMPARED = {
    "Add",
    "BiasGelu",
    "DynamicQuantizeLinear",
    "DynamicQuantizeMatMul",
    "FusedMatMul",
    "Gelu",
    "Gemm",
    "LayerNormalization",
    "MatMul",
    "MatMulIntegerToFloat",
    "SkipLayerNormalization",
    "Softmax",
}


@pytest.mark.parametrize(
    ("model", "batch", "sequence", "fixed"),
    [
        ("block_onnx", 1, 8, False),
        ("block_onnx", 3, 40, False),
        ("block_onnx", 2, 128, True),
        ("block_int8", 3, 40, False),
        ("block_int8", 1, 24, True),
        ("block_old", 2, 24, True),
    ],
)
def test_fusions_and_arena_are_those_of_onnx_runtime(
    model: str, batch: int, sequence: int, fixed: bool, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    path: Path = request.getfixturevalue(model)
    sizes = {"batch": batch, "sequence": sequence} if model != "block_old" else {}
    grown = run_in_runtime(path, sizes, fixed=fixed and bool(sizes), optimized=tmp_path / "optimized.onnx")
    shape = read_onnx(path, sizes, fixed=fixed)
    theirs = Counter(n.op_type for n in onnx.load(tmp_path / "optimized.onnx").graph.node if n.op_type in COMPARED)
    ours = Counter(n.op_type for n in shape.nodes if n.op_type in COMPARED)
    assert ours == theirs
    assert 0 < grown <= arena(shape) <= 1.02 * grown + 4096


# ---- what a user can do wrong ----------------------------------------------------------------------------------------


def test_axes_are_named(block_onnx: Path, block_old: Path) -> None:
    assert dynamic_axes(block_onnx) == {"ids": ("batch", "sequence")}
    assert dynamic_axes(block_old) == {"ids": (2, 24)}


@pytest.mark.parametrize(
    ("dims", "said"),
    [
        ({"batch": 1}, "'sequence' is not given"),
        ({"batch": 1, "sequence": 8, "sequnce": 8}, "no dynamic axis 'sequnce'"),
        ({"batch": 0, "sequence": 8}, "cannot have the size 0"),
    ],
)
def test_wrong_axes(block_onnx: Path, dims: dict[str, int], said: str) -> None:
    with pytest.raises(UsageError, match=said) as raised:
        read_onnx(block_onnx, dims)
    assert "sequence" in raised.value.remedy or "size" in raised.value.remedy


def test_an_axis_without_a_name_has_its_place(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[N, 4] x) => (float[N, 4] y) { y = Relu(x) }'
    )
    model.graph.input[0].type.tensor_type.shape.dim[0].ClearField("dim_param")
    path = tmp_path / "nameless.onnx"
    onnx.save(model, path)
    with pytest.raises(UsageError, match="'x:0' is not given"):
        read_onnx(path, {})
    assert read_onnx(path, {"x:0": 3}).output_bytes == 3 * 4 * 4


def test_sizes_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "wrong.onnx"
    nodes = [OnnxNode("MatMul", ("x", "w"), ("y",))]
    outputs = [ValueInfo("y", "float32", ("n", 3))]
    weights = {"w": np.ones((4, 3), np.float32)}
    path.write_bytes(encode_model(nodes, [ValueInfo("x", "float32", ("n", "k"))], outputs, weights))
    with pytest.raises(SourceError, match="shapes at MatMul"):
        read_onnx(path, {"n": 2, "k": 5})
    assert read_onnx(path, {"n": 2, "k": 4}).flops == 2 * 2 * 4 * 3


def test_shapes_that_depend_on_data(tmp_path: Path) -> None:
    path = tmp_path / "nonzero.onnx"
    nodes = [OnnxNode("NonZero", ("x",), ("y",))]
    path.write_bytes(encode_model(nodes, [ValueInfo("x", "float32", (4,))], [ValueInfo("y", "int64", (1, "n"))], {}))
    with pytest.raises(UnsupportedModelError, match=r"shape of 'y'.*NonZero"):
        read_onnx(path, {})


def test_control_flow_and_foreign_operators(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]> g (bool c, float[4] x) => (float[4] y)
        { y = If (c) <then_branch = a () => (float[4] p) { p = Relu(x) },
                      else_branch = b () => (float[4] q) { q = Neg(x) }> }"""
    path = tmp_path / "if.onnx"
    onnx.save(onnx.parser.parse_model(text), path)
    with pytest.raises(UnsupportedModelError, match="control flow"):
        read_onnx(path, {})
    info = [ValueInfo("x", "float32", (4,))]
    path.write_bytes(
        encode_model([OnnxNode("Magic", ("x",), ("y",), domain="acme")], info, [ValueInfo("y", "float32", (4,))], {})
    )
    with pytest.raises(UnsupportedModelError, match=r"acme\.Magic"):
        read_onnx(path, {})


@pytest.mark.parametrize("data", [b"", b"GGUF" * 20, b"{}", b"\x08\x08", b"\xff" * 64])
def test_files_that_are_no_onnx(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    with pytest.raises(SourceError, match=r"model\.onnx"):
        read_onnx(path, {})


def test_a_file_that_was_cut_off(block_onnx: Path, tmp_path: Path) -> None:
    data = block_onnx.read_bytes()
    path = tmp_path / "cut.onnx"
    for share in (0.3, 0.6, 0.99):
        path.write_bytes(data[: int(share * len(data))])
        with pytest.raises(SourceError, match="cut off"):
            read_onnx(path, {"batch": 1, "sequence": 8})


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="cannot be read"):
        read_onnx(tmp_path / "none.onnx", {})


@pytest.fixture
def external(block_onnx: Path, tmp_path: Path) -> Path:
    path = tmp_path / "external.onnx"
    onnx.save(onnx.load(block_onnx), path, save_as_external_data=True, location="weights.bin", size_threshold=1024)
    return path


def test_external_data(block_onnx: Path, external: Path) -> None:
    dims = {"batch": 2, "sequence": 8}
    shape, inline = read_onnx(external, dims), read_onnx(block_onnx, dims)
    assert shape.file_bytes == external.stat().st_size + external.with_name("weights.bin").stat().st_size
    assert (shape.parameter_bytes, shape.flops, arena(shape)) == (inline.parameter_bytes, inline.flops, arena(inline))
    assert any(p.external for p in shape.parameters)


def test_external_data_that_is_missing_or_short(external: Path) -> None:
    weights = external.with_name("weights.bin")
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(SourceError, match=r"weights\.bin ends before"):
        read_onnx(external, {"batch": 1, "sequence": 8})
    weights.unlink()
    with pytest.raises(SourceError, match=r"in weights\.bin, which is not there"):
        read_onnx(external, {"batch": 1, "sequence": 8})


@pytest.mark.parametrize("location", ["../weights.bin", "/etc/hostname", ""])
def test_external_data_elsewhere(external: Path, location: str) -> None:
    model = onnx.load(external, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    external.write_bytes(model.SerializeToString())
    with pytest.raises(SourceError, match="outside its own folder"):
        read_onnx(external, {"batch": 1, "sequence": 8})


def test_weights_are_not_read(block_onnx: Path) -> None:
    skeleton = read_skeleton(block_onnx)
    weights = sum(weight.n_bytes for weight in skeleton.weights)
    assert skeleton.model.ByteSize() < skeleton.file_bytes - 0.9 * weights
