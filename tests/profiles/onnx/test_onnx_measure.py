"""The probe's models against onnx, the probe itself, and its predictions against a real process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgeq.errors import MissingPackageError, SessionError
from edgeq.profiles.onnx import session
from edgeq.profiles.onnx.cost import OnnxFigures
from edgeq.profiles.onnx.measure import measure_onnx, measure_runtime_bytes
from edgeq.profiles.onnx.models import ONNX_TYPES, Attribute, OnnxNode, ValueInfo, encode_model
from edgeq.profiles.onnx.probe_models import (
    KERNELS,
    ProbeModel,
    baseline_model,
    kernel_model,
    product_model,
    tiny_chain,
)
from edgeq.profiles.onnx.session import onnx_session_options, open_onnx_session
from edgeq.profiles.onnx.wire import WireError, encode_varint, message_field, read_fields

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

MIB = 2**20

# ---- the encoder -----------------------------------------------------------------------------------------------------

NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
INT64 = st.integers(-(2**63), 2**63 - 1)
ATTRIBUTES: st.SearchStrategy[Attribute] = st.one_of(
    INT64, st.floats(width=32, allow_nan=False), NAMES, st.lists(INT64, min_size=1, max_size=4)
)
NODES = st.builds(
    OnnxNode,
    op_type=NAMES,
    inputs=st.lists(NAMES, max_size=3),
    outputs=st.lists(NAMES, min_size=1, max_size=3),
    attributes=st.dictionaries(NAMES, ATTRIBUTES, max_size=3),
    domain=st.sampled_from(["", "com.microsoft"]),
)
INFOS = st.builds(
    ValueInfo,
    name=NAMES,
    dtype=st.sampled_from(sorted(ONNX_TYPES)),
    shape=st.lists(st.integers(0, 2**40) | NAMES, max_size=4),
)
ARRAYS = st.sampled_from(sorted(ONNX_TYPES)).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
)


@given(
    st.lists(NODES, max_size=3),
    st.lists(INFOS, max_size=2),
    st.lists(INFOS, max_size=2),
    st.dictionaries(NAMES, ARRAYS, max_size=2),
)
def test_onnx_reads_what_was_written(
    nodes: list[OnnxNode], inputs: list[ValueInfo], outputs: list[ValueInfo], weights: dict[str, Any]
) -> None:
    graph = onnx.load_from_string(encode_model(nodes, inputs, outputs, weights)).graph
    for read, node in zip(graph.node, nodes, strict=True):
        assert (read.op_type, list(read.input), list(read.output)) == (node.op_type, node.inputs, node.outputs)
        assert read.domain == node.domain
        values = {a.name: onnx.helper.get_attribute_value(a) for a in read.attribute}
        for name, value in node.attributes.items():
            assert values[name] == (value.encode() if isinstance(value, str) else value)
    for given_infos, field in ((inputs, graph.input), (outputs, graph.output)):
        for info, proto in zip(given_infos, field, strict=True):
            tensor = proto.type.tensor_type
            shape = [d.dim_param if d.HasField("dim_param") else d.dim_value for d in tensor.shape.dim]
            assert (proto.name, tensor.elem_type, shape) == (info.name, ONNX_TYPES[info.dtype], list(info.shape))
    for tensor in graph.initializer:
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(tensor), weights[tensor.name])


@given(st.lists(st.tuples(st.integers(1, 2**29 - 1), st.binary(max_size=300))))
def test_fields_are_read_where_they_were_written(fields: list[tuple[int, bytes]]) -> None:
    data = memoryview(b"".join(message_field(number, payload) for number, payload in fields))
    assert [(f.number, bytes(data[f.payload : f.end])) for f in read_fields(data)] == fields


@given(st.binary(max_size=200))
def test_bytes_that_are_no_message_end_in_an_error(data: bytes) -> None:
    try:
        fields = list(read_fields(memoryview(data)))
    except WireError:
        return
    assert b"".join(data[f.start : f.end] for f in fields) == data


@given(INT64)
def test_numbers_survive(value: int) -> None:
    field = next(read_fields(memoryview(b"\x08" + encode_varint(value))))
    assert field.value == value % 2**64


# ---- the models ------------------------------------------------------------------------------------------------------


def probes() -> list[tuple[str, ProbeModel]]:
    products = [("matmul", "fp32"), ("matmul", "int8"), ("activations", "fp32"), ("conv", "fp32")]
    return [
        *((op_type, kernel_model(op_type, 3072)) for op_type in KERNELS),
        *((f"{kernel} {kind}", product_model(kernel, kind, 16)) for kernel, kind in products),
        ("chain", tiny_chain(3)),
    ]


@pytest.mark.parametrize("probe", [pytest.param(probe, id=name) for name, probe in probes()])
def test_models_of_the_probe_are_onnx_and_run(probe: ProbeModel) -> None:
    model = onnx.load_from_string(probe.model)
    if not any(node.domain for node in model.graph.node):
        onnx.checker.check_model(model, full_check=True)
    session = open_onnx_session(probe.model, 1)
    (result,) = session.run([probe.fetch], dict(probe.feeds))
    assert np.isfinite(np.asarray(result, np.float64)).all()


@pytest.mark.parametrize("op_type", ["Add", "Softmax", "LayerNormalization", "Gelu", "Where", "Transpose"])
def test_models_of_the_probe_compute_what_onnx_says(op_type: str) -> None:
    from onnx.reference import ReferenceEvaluator

    probe = kernel_model(op_type, 3072)
    (theirs,) = ReferenceEvaluator(onnx.load_from_string(probe.model)).run([probe.fetch], dict(probe.feeds))
    (ours,) = open_onnx_session(probe.model, 1).run([probe.fetch], dict(probe.feeds))
    np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs, np.float32), rtol=1e-4, atol=1e-5)


def test_the_baseline_has_fp32_and_int8() -> None:
    model = onnx.load_from_string(baseline_model())
    onnx.checker.check_model(model, full_check=True)
    assert {"MatMul", "MatMulInteger", "Conv", "Softmax", "LayerNormalization"} <= {n.op_type for n in model.graph.node}


# ---- sessions --------------------------------------------------------------------------------------------------------


def test_sessions_can_be_told_their_sizes() -> None:
    model = encode_model(
        [OnnxNode("Relu", ("x",), ("y",))],
        [ValueInfo("x", "float32", ("n", 4))],
        [ValueInfo("y", "float32", ("n", 4))],
        {},
    )
    assert open_onnx_session(model, 1).get_inputs()[0].shape == ["n", 4]
    assert open_onnx_session(model, 1, dims={"n": 3}).get_inputs()[0].shape == [3, 4]


def test_a_model_that_cannot_be_loaded(tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"no model")
    with pytest.raises(SessionError, match=r"broken\.onnx"):
        open_onnx_session(path, 1)
    with pytest.raises(SessionError, match="cannot load the model"):
        open_onnx_session(path.read_bytes(), 1)


def test_without_onnxruntime_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for call in (lambda: onnx_session_options(1), lambda: measure_onnx(1), lambda: measure_runtime_bytes(1)):
        with pytest.raises(MissingPackageError, match=r"edgeq\[perception\]"):
            call()


def test_an_arena_that_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        OrtMemoryInfo = OrtArenaCfg = staticmethod(lambda *_: None)
        OrtAllocatorType = OrtMemType = type("Any", (), {"ORT_ARENA_ALLOCATOR": 0, "DEFAULT": 0})

        @staticmethod
        def create_and_register_allocator(*_: object) -> None:
            raise RuntimeError("registered already")

    session._register_arena.cache_clear()
    monkeypatch.setitem(sys.modules, "onnxruntime", Refusing)
    with pytest.raises(SessionError, match="registered already"):
        onnx_session_options(1)
    monkeypatch.undo()
    # One arena a process: it was registered by the tests before, and ONNX Runtime keeps it.
    session._register_arena.cache_clear()


# ---- the probe -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def figures() -> OnnxFigures:
    told: list[str] = []
    measured = measure_onnx(1, seconds=0.5, progress=told.append)
    assert "matmul int8 256" in told
    return measured


def test_every_figure_is_there(figures: OnnxFigures) -> None:
    assert {k.op_type for k in figures.kernels} == set(KERNELS)
    assert {(p.kernel, p.kind) for p in figures.products} >= {("matmul", "fp32"), ("matmul", "int8"), ("conv", "fp32")}
    assert figures.fp32_flops_per_s > 1e8
    assert 30 * MIB < figures.loaded_bytes <= figures.runtime_bytes < 200 * MIB


def test_more_rows_take_longer_and_less_for_each(figures: OnnxFigures) -> None:
    times = {p.rows: p.ns_per_weight for p in figures.products if (p.kernel, p.kind) == ("matmul", "fp32")}
    assert times[1] < times[1024]
    assert times[1] > times[1024] / 1024


def test_the_probe_needs_no_onnx() -> None:
    program = (
        "import sys; sys.modules['onnx'] = None\n"
        "from edgeq.profiles.onnx import measure\n"
        # One size of everything: what is asked is only whether each part of the probe runs.
        "measure._ROWS, measure._ELEMENTS, measure._TOKENS, measure._PIXELS = (256,), (3072,), (16,), (784,)\n"
        "measure._PROCESSES = measure._FEWEST_CALLS = 1\n"
        "print(measure.measure_onnx(1, seconds=0.01).threads)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "1\n"
