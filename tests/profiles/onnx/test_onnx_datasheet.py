"""Memory and floors of time from a graph and a datasheet, worked out by hand."""

from __future__ import annotations

import msgspec
import pytest

from edgeq.profiles.device import Backend, DeviceProfile, power_mode_of
from edgeq.profiles.loader import load_profile
from edgeq.profiles.onnx.cost import OnnxShape, Parameter
from edgeq.profiles.onnx.datasheet import least_ms, predict_gpu_memory, process_bytes
from edgeq.profiles.onnx.memory import GraphNode, GraphValue

ROWS, WIDTH = 1000, 4096


def product(kind: str, item_bytes: int, dtype: str) -> OnnxShape:
    """ROWS x WIDTH times WIDTH x WIDTH."""
    weights = Parameter("w", dtype, WIDTH * WIDTH * item_bytes)
    node = GraphNode("MatMul", ("x", "w"), ("y",), flops=2 * ROWS * WIDTH * WIDTH, rows=ROWS)
    node = GraphNode("QLinearMatMul", ("x", "w"), ("y",), flops=node.flops, rows=ROWS, kind="int8") if kind else node
    made = ROWS * WIDTH * item_bytes
    return OnnxShape(
        file_bytes=weights.n_bytes,
        parameters=(weights,),
        values={"y": GraphValue(made, item_bytes, (ROWS, WIDTH))},
        nodes=(node,),
        input_bytes=made,
        outputs=("y",),
        output_bytes=made,
        entries=2,
    )


@pytest.fixture(scope="module")
def orin() -> DeviceProfile:
    return load_profile("jetson-orin")


def backend(profile: DeviceProfile, name: str) -> Backend:
    return next(found for found in profile.backends if found.name == name)


@pytest.mark.parametrize(
    ("kind", "item_bytes", "dtype", "share"), [("int8", 1, "int8", 1), ("", 2, "float16", 2), ("", 4, "float", 4)]
)
def test_many_rows_take_what_their_operations_take(
    orin: DeviceProfile, kind: str, item_bytes: int, dtype: str, share: int
) -> None:
    found = least_ms(product(kind, item_bytes, dtype), orin, backend(orin, "tensorrt"))
    assert orin.int8_ops_per_s is not None
    assert found == pytest.approx(1e3 * share * 2 * ROWS * WIDTH**2 / orin.int8_ops_per_s)


def one_row(width: int, layers: int) -> OnnxShape:
    """1 x width times width x width, again and again."""
    nodes = [
        GraphNode("QLinearMatMul", (f"x{i}", f"w{i}"), (f"x{i + 1}",), flops=2 * width**2, kind="int8")
        for i in range(layers)
    ]
    return OnnxShape(
        file_bytes=layers * width**2,
        parameters=tuple(Parameter(f"w{i}", "int8", width**2) for i in range(layers)),
        values={f"x{i + 1}": GraphValue(width, 1, (1, width)) for i in range(layers)},
        nodes=tuple(nodes),
        input_bytes=width,
        outputs=(f"x{layers}",),
        output_bytes=width,
        entries=2 * layers,
    )


@pytest.mark.parametrize(
    ("device", "name", "mib"), [("jetson-orin", "tensorrt", 32), ("laptop-rtx", "tensorrt-rtx", 64)]
)
def test_one_row_takes_what_the_weights_beyond_the_caches_take(device: str, name: str, mib: int) -> None:
    profile = load_profile(device)
    found = least_ms(one_row(WIDTH, layers=10), profile, backend(profile, name))
    assert found == pytest.approx(1e3 * (10 * WIDTH**2 - mib * 2**20) / profile.peak_bandwidth_bytes_per_s)


def test_a_small_network_lives_in_the_caches(orin: DeviceProfile) -> None:
    """Six products of 256 x 256 are computed faster than memory would bring their weights."""
    found = least_ms(one_row(256, layers=6), orin, backend(orin, "tensorrt"))
    assert orin.int8_ops_per_s is not None
    assert found == pytest.approx(1e3 * 6 * 2 * 256**2 / orin.int8_ops_per_s)


def test_slower_modes_take_longer(orin: DeviceProfile) -> None:
    shape, gpu = product("int8", 1, "int8"), backend(orin, "tensorrt")
    fast, slow = least_ms(shape, power_mode_of(orin, "25W"), gpu), least_ms(shape, power_mode_of(orin, "7W"), gpu)
    assert fast is not None
    assert slow is not None
    assert slow > 4 * fast


def test_a_cpu_has_vectors_of_its_features(orin: DeviceProfile) -> None:
    mode = power_mode_of(orin, "25W")
    found = least_ms(product("int8", 1, "int8"), mode, backend(orin, "onnxruntime-cpu"))
    assert found == pytest.approx(1e3 * 2 * ROWS * WIDTH**2 / (64 * 6 * 1.344e9))


def test_without_a_clock_nothing_is_said() -> None:
    laptop = load_profile("laptop-cpu")
    assert least_ms(product("", 4, "float"), laptop, backend(laptop, "onnxruntime-cpu")) is None


def test_fp8_is_as_fast_as_the_profile_says() -> None:
    laptop = load_profile("laptop-rtx")
    times = [
        least_ms(product("int8", 1, kind), laptop, backend(laptop, "tensorrt-rtx")) for kind in ("float8e4m3fn", "int8")
    ]
    assert times[0] == pytest.approx(times[1])


def test_memory_of_an_engine() -> None:
    shape = product("int8", 1, "int8")
    apart, unified = (predict_gpu_memory(shape, unified=found) for found in (False, True))
    assert apart.weights_bytes == apart.load_peak_bytes == WIDTH**2
    assert unified.load_peak_bytes == 2 * WIDTH**2
    assert 2 * ROWS * WIDTH <= apart.activation_bytes <= 2 * ROWS * WIDTH + 1024


def test_the_process_is_that_of_a_backend_on_the_same_processor(orin: DeviceProfile) -> None:
    mib = 2**20
    assert process_bytes(orin, backend(orin, "tensorrt")) == (96 + 300) * mib
    assert process_bytes(orin, backend(orin, "onnxruntime-cpu")) == 54 * mib
    laptop = load_profile("laptop-cpu")
    assert process_bytes(laptop, backend(laptop, "onnxruntime-cpu")) == 64 * mib
    alone = msgspec.structs.replace(orin, backends=(backend(orin, "tensorrt"),))
    assert process_bytes(alone, backend(orin, "tensorrt")) is None
