"""Memory and time from a graph and the figures of a machine."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edgeq.profiles.onnx.cost import (
    KernelTime,
    OnnxFigures,
    OnnxShape,
    Parameter,
    ProductTime,
    interpolate,
    predict_onnx,
    predict_onnx_ms,
)
from edgeq.profiles.onnx.memory import GraphNode, GraphValue
from edgeq.strict_yaml import load_yaml
from edgeq.types import from_json, to_json

MIB = 2**20


def figures(**changes: Any) -> OnnxFigures:
    base = OnnxFigures(
        onnxruntime="1.0",
        threads=2,
        loaded_bytes=50 * MIB,
        runtime_bytes=52 * MIB,
        call_overhead_us=10.0,
        node_overhead_us=1.0,
        fp32_flops_per_s=1e11,
        int8_ops_per_s=4e11,
        products=(
            ProductTime(kernel="matmul", kind="fp32", rows=1, ns_per_weight=0.5),
            ProductTime(kernel="matmul", kind="fp32", rows=101, ns_per_weight=2.5),
            ProductTime(kernel="matmul", kind="int8", rows=1, ns_per_weight=0.25),
        ),
        kernels=(KernelTime(op_type="Add", elements=1000, ns_per_element=1.0),),
    )
    return msgspec.structs.replace(base, **changes)


def model(nodes: tuple[GraphNode, ...], parameters: tuple[Parameter, ...] = (), **changes: Any) -> OnnxShape:
    values = {name: GraphValue(4000, 4, (1000,)) for node in nodes for name in node.outputs}
    size = sum(p.n_bytes for p in parameters)
    shape = OnnxShape(
        file_bytes=size + 100,
        parameters=parameters,
        values=values,
        nodes=nodes,
        input_bytes=0,
        outputs=nodes[-1].outputs,
        output_bytes=4000,
        entries=len(nodes) + len(parameters),
    )
    return dataclasses.replace(shape, **changes)


ADD = GraphNode("Add", ("x", "x"), ("y",))


def product(rows: int, kind: Any = "fp32", kernel: Any = "matmul", weights: int = 10**6) -> GraphNode:
    return GraphNode("MatMul", ("x", "w"), ("y",), flops=2 * rows * weights, kind=kind, product=kernel, rows=rows)


def loading_mib(*parameters: Parameter) -> float:
    """What weights add to the peak of a process that loads them."""
    empty, full = model((ADD,)), model((ADD,), parameters, entries=1)
    more = predict_onnx(full, figures()).load_peak_bytes - predict_onnx(empty, figures()).load_peak_bytes
    return more / MIB


def test_weights_count_once_when_serving_and_the_largest_twice_when_loading() -> None:
    small, packed = Parameter("s", "float", 10 * MIB), Parameter("p", "float", 40 * MIB, form="packed")
    none = predict_onnx(model((ADD,)), figures())
    inline = predict_onnx(model((ADD,), (small, packed), entries=1), figures())
    assert inline.weights_bytes == 50 * MIB
    assert inline.serve_peak_bytes - none.serve_peak_bytes == 50 * MIB
    assert inline.peak_memory_bytes == inline.load_peak_bytes
    assert loading_mib(small, packed) == 50 + 40


def test_external_weights_are_mapped_and_packed_one_by_one() -> None:
    packed = [Parameter(f"p{i}", "float", 10 * MIB, form="packed", external=True) for i in range(4)]
    table = Parameter("table", "float", 100 * MIB, external=True)
    assert loading_mib(*packed, table) == 40 + 10
    assert predict_onnx(model((ADD,), (*packed, table)), figures()).weights_bytes == 140 * MIB


def test_weights_of_convolutions_are_held_twice_until_all_are_reordered() -> None:
    inline = [Parameter(f"c{i}", "float", 9 * MIB, form="reordered") for i in range(8)]
    assert loading_mib(*inline) == 72 + 72 + 27
    assert loading_mib(*(dataclasses.replace(p, external=True) for p in inline)) == 72 + 27


def test_weights_that_are_computed_first() -> None:
    raw = [Parameter(f"r{i}", "float", 16 * MIB, kept=False) for i in range(5)]
    made = [Parameter(f"t{i}", "float", 16 * MIB, form="packed", in_file=False) for i in range(5)]
    assert loading_mib(*raw, *made) == 80 + 80 + 16
    assert loading_mib(*(dataclasses.replace(p, external=True) for p in raw), *made) == 80 + 16


def test_weights_that_no_node_reads_are_let_go() -> None:
    folded = (Parameter("raw", "float", 8 * MIB, kept=False), Parameter("made", "float", 8 * MIB, in_file=False))
    shape = model((ADD,), folded)
    assert predict_onnx(shape, figures()).weights_bytes == 8 * MIB
    assert shape.parameter_bytes == 8 * MIB


def test_the_parts_add_up() -> None:
    predicted = predict_onnx(model((ADD,), (Parameter("s", "float", MIB),), input_bytes=3 * MIB), figures())
    assert predicted.input_bytes == 3 * MIB
    parts = (
        predicted.input_bytes,
        predicted.runtime_bytes,
        predicted.weights_bytes,
        predicted.activation_bytes,
        predicted.bookkeeping_bytes,
    )
    assert sum(parts) == predicted.serve_peak_bytes
    assert predicted.activation_bytes == 2 * 4096  # this call's output, and the last one's


def test_operators_whose_buffers_are_not_known_are_named() -> None:
    assert predict_onnx(model((ADD,)), figures()).inexact_ops == ()
    einsum = GraphNode("Einsum", ("y",), ("z",), late_scratch=(8192,))
    predicted = predict_onnx(model((ADD, einsum)), figures())
    assert predicted.inexact_ops == ("Einsum",)
    assert predicted.activation_bytes >= 8192


def call_ms(*kernels_ms: float) -> object:
    """A call of 10 us, and kernels that find their caches a little colder than in the probe."""
    return pytest.approx(0.010 + 1.05 * sum(kernels_ms))


@pytest.mark.parametrize(("rows", "ns"), [(1, 0.5), (51, 1.5), (101, 2.5), (202, 5.0)])
def test_products_take_what_their_rows_took(rows: int, ns: float) -> None:
    assert predict_onnx_ms(model((product(rows),)), figures()) == call_ms(0.001, ns)


def test_products_that_were_not_measured_run_like_those_with_weights() -> None:
    as_matmul = predict_onnx_ms(model((product(1),)), figures())
    assert predict_onnx_ms(model((product(1, kernel="conv"),)), figures()) == as_matmul
    assert predict_onnx_ms(model((product(1, kind="int8"),)), figures()) == call_ms(0.001, 0.25)
    assert predict_onnx_ms(model((product(1, kind="int8", kernel="conv"),)), figures()) == call_ms(0.001, 0.25)


def test_other_kernels_cost_their_elements_and_reshapes_nothing() -> None:
    adds = tuple(GraphNode("Add", (f"v{i}", "z"), (f"v{i + 1}",)) for i in range(5))
    assert predict_onnx_ms(model(adds), figures()) == call_ms(5 * 0.001, 5 * 0.001)
    views = (*adds, GraphNode("Reshape", ("v5", "s"), ("out",)))
    assert predict_onnx_ms(model(views), figures()) == call_ms(6 * 0.001, 5 * 0.001)


def test_kernels_that_were_measured_take_their_own_time() -> None:
    own = figures(
        kernels=(
            KernelTime(op_type="Add", elements=1000, ns_per_element=1.0),
            KernelTime(op_type="Gelu", elements=500, ns_per_element=4.0),
            KernelTime(op_type="Gelu", elements=2000, ns_per_element=7.0),
        )
    )
    gelu = 2000 + (14_000 - 2000) / 3
    for op_type in ("Gelu", "Sigmoid"):
        node = GraphNode(op_type, ("x",), ("y",))
        assert predict_onnx_ms(model((node,)), own) == call_ms(0.001, gelu / 1e6)


@pytest.mark.parametrize(("x", "y"), [(0.5, 10.0), (1, 10.0), (2, 15.0), (3, 20.0), (6, 40.0)])
def test_interpolation(x: float, y: float) -> None:
    assert interpolate([(1.0, 10.0), (3.0, 20.0)], x) == pytest.approx(y)


def test_figures_can_be_written_and_read_back(tmp_path: Path) -> None:
    assert from_json(to_json(figures()), OnnxFigures) == figures()
    plain = load_yaml(to_json(figures()).decode(), "figures")  # JSON is YAML
    assert msgspec.convert(plain, OnnxFigures) == figures()


@pytest.mark.parametrize(
    ("field", "kept"), [("products", ()), ("kernels", ()), ("node_overhead_us", 0.0), ("threads", 0)]
)
def test_figures_that_predict_nothing_are_refused(field: str, kept: object) -> None:
    plain = msgspec.to_builtins(figures()) | {field: kept}
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(plain, OnnxFigures)
