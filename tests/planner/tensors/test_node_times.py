"""Kernels attributed to the nodes that they compute, in the graphs that ONNX Runtime truly executes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from edgeq.converters.onnx.quantize.sites import quantizable
from edgeq.planner.tensors.candidates import Workbench
from edgeq.planner.tensors.node_times import attribute, measured, node_costs, probed
from edgeq.planner.tensors.timing import Kernel
from edgeq.profiles.onnx.cost import KernelTime, OnnxFigures, ProductTime

MakeBench = Callable[..., Workbench]


def test_every_executed_kernel_belongs_to_a_node(chain: Path, make_bench: MakeBench) -> None:
    bench = make_bench(chain)
    ways = [
        bench.float_model(),
        bench.static(bench.ranges(("minmax",))["minmax"], {}, "static"),
        bench.dynamic({}),
    ]
    clock = measured(bench.samples.judged, threads=1, disabled_optimizers=())
    for way in ways:
        found = attribute(clock.kernels(way.path), chain, quantizable(chain))
        assert set(found.us) == {"wide", "thin", "last"}
        assert found.rest_us == 0.0
        assert found.total_us == pytest.approx(sum(kernel.us for kernel in clock.kernels(way.path)))


def test_a_product_that_is_slower_in_8_bits_is_seen(chain: Path, make_bench: MakeBench) -> None:
    bench = make_bench(chain)
    clock = measured(bench.samples.judged, threads=1, disabled_optimizers=())
    sites = quantizable(chain)
    floats, integers = (attribute(clock.kernels(path), chain, sites) for path in (chain, bench.dynamic({}).path))
    costs = {cost.name: cost for cost in node_costs(sites, {}, floats, integers)}
    assert costs["wide"].int8_us < costs["wide"].float_us
    assert costs["thin"].int8_us > costs["thin"].float_us


def _kernel(op_type: str, reads: str, makes: str, us: float, *, name: str = "", weights: str = "") -> Kernel:
    return Kernel(name, op_type, tuple(reads.split()), tuple(makes.split()), tuple(weights.split()), us)


def test_conversions_belong_to_what_they_serve_and_the_rest_to_what_comes_before(chain: Path) -> None:
    kernels = (
        _kernel("Gather", "table", "x", 0.5),
        _kernel("Mul", "x", "scaled", 1.0),
        _kernel("QuantizeLinear", "scaled", "x_q", 2.0),
        _kernel("Transpose", "x_q", "x_t", 4.0),
        _kernel("QGemm", "x_t", "a_q", 8.0, name="wide_token_3", weights="w"),
        _kernel("DequantizeLinear", "a_q", "a", 16.0),
        _kernel("QuantizeLinear", "a", "b_q", 32.0),
        _kernel("QLinearMatMul", "b_q", "y_q", 64.0, weights="w3"),  # only its weight says which
        _kernel("Softmax", "y_q", "y", 128.0),
    )
    found = attribute(kernels, chain, quantizable(chain))
    assert found.us == {"wide": 1.0 + 2.0 + 4.0 + 8.0 + 16.0, "last": 32.0 + 64.0 + 128.0}
    assert found.rest_us == 0.5


def test_one_rounding_for_several_products_is_shared(chain: Path) -> None:
    kernels = (
        _kernel("DynamicQuantizeLinear", "x", "q scale zero", 10.0),
        _kernel("MatMulIntegerToFloat", "q", "a_nchwc", 1.0, name="a_nchwc", weights="w"),
        _kernel("MatMulIntegerToFloat", "q", "p", 2.0, name="last_integer", weights="w"),
        _kernel("MatMul", "a_nchwc p", "r", 4.0),  # of two activations: no node of its own
    )
    found = attribute(kernels, chain, quantizable(chain))
    assert found.us == {"wide": 5.0 + 1.0, "last": 5.0 + 2.0 + 4.0}


def test_without_times_work_decides(chain: Path) -> None:
    sites = quantizable(chain)
    costs = {cost.name: cost for cost in node_costs(sites, {"wide": 0.5}, None, None)}
    assert costs["wide"].float_us == 2 * costs["wide"].int8_us == 128 * 512 * 512
    assert (costs["wide"].error, costs["thin"].error) == (0.5, 0.0)


def test_a_probe_foretells_the_same_kernels(chain: Path, make_bench: MakeBench) -> None:
    figures = OnnxFigures(
        onnxruntime="1.31",
        threads=1,
        loaded_bytes=1,
        runtime_bytes=1,
        call_overhead_us=100.0,
        node_overhead_us=1.0,
        fp32_flops_per_s=1e9,
        int8_ops_per_s=4e9,
        products=(
            ProductTime(kernel="matmul", kind="fp32", rows=64, ns_per_weight=1.0),
            ProductTime(kernel="matmul", kind="int8", rows=64, ns_per_weight=0.25),
        ),
        kernels=(
            KernelTime(op_type="Add", elements=1000, ns_per_element=1.0),
            KernelTime(op_type="DynamicQuantizeLinear", elements=1000, ns_per_element=1.0),
        ),
    )
    clock, sites = probed(figures, {}), quantizable(chain)
    floats, integers = (
        attribute(clock.kernels(path), chain, sites) for path in (chain, make_bench(chain).dynamic({}).path)
    )
    assert set(floats.us) == set(integers.us) == {"wide", "thin", "last"}
    costs = {cost.name: cost for cost in node_costs(sites, {}, floats, integers)}
    assert costs["wide"].int8_us < costs["wide"].float_us
    assert costs["thin"].int8_us > costs["thin"].float_us
    assert clock.call_ms(chain) == pytest.approx((100.0 + floats.total_us) / 1e3)
