"""What an engine is built for, and what follows from the device's memory."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from edgeq.errors import ProfileError, SessionError, UnsupportedModelError, UsageError
from edgeq.profiles.loader import load_profile
from edgeq.runtime.tensorrt import targets
from edgeq.runtime.tensorrt.driver import CudaDriver, Gpu, find_gpu
from edgeq.runtime.tensorrt.targets import EngineTarget, parse_target, settings_for, target_here, this_machine
from edgeq.tensor_types import AxisRange, Scheme, TensorPlan, TensorPrediction
from edgeq.types import Budget

MIB = 1 << 20


def _plan(scheme: Scheme = "int8-static") -> TensorPlan:
    predicted = TensorPrediction(
        file_bytes=0, weights_bytes=100 * MIB, activation_bytes=20 * MIB, runtime_bytes=80 * MIB, peak_memory_bytes=0
    )
    return TensorPlan(
        backend="tensorrt", scheme=scheme, axes={"batch": AxisRange(least=1, usual=1, most=2)}, predicted=predicted
    )


@pytest.mark.parametrize(
    ("text", "capability"), [("sm_75", "7.5"), ("SM_120", "12.0"), ("sm87", "8.7"), ("8.9", "8.9"), ("12.0", "12.0")]
)
def test_a_compute_capability_is_a_target(text: str, capability: str) -> None:
    assert parse_target(text).compute_capability == capability


def test_a_device_is_a_target_with_its_memory() -> None:
    board, profile = parse_target("jetson-orin"), load_profile("jetson-orin")
    assert (board.name, board.compute_capability, board.sm) == (profile.name, "8.7", "sm_87")
    assert board.usable_bytes == profile.memory.usable_bytes
    assert parse_target("jetson-orin-nx-16gb").dla_cores == 2
    with pytest.raises(UsageError, match="laptop-cpu has no GPU"):
        parse_target("laptop-cpu")
    with pytest.raises(ProfileError, match="no device 'sm_8'"):
        parse_target("sm_8")


def test_the_workspace_follows_from_memory_and_budget() -> None:
    board = EngineTarget("board", "8.7", usable_bytes=4096 * MIB)
    assert settings_for(board, _plan(), Budget()).workspace_bytes == 1024 * MIB
    assert settings_for(board, _plan(), Budget(peak_memory_bytes=500 * MIB)).workspace_bytes == 300 * MIB
    assert settings_for(board, _plan(), Budget(peak_memory_bytes=150 * MIB)).workspace_bytes == 32 * MIB
    assert settings_for(board, _plan(), Budget(), workspace_bytes=5).workspace_bytes == 5
    assert settings_for(EngineTarget("sm_86", "8.6"), _plan(), Budget()).workspace_bytes is None
    assert settings_for(board, _plan(), Budget()).axes == _plan().axes


def test_fp8_on_orin_is_refused_with_the_reason() -> None:
    with pytest.raises(UnsupportedModelError, match=r"FP8, which sm_87 does not have \(jetson-orin-nano-8gb\).*sm_89"):
        settings_for(parse_target("jetson-orin"), _plan("fp8"), Budget())
    assert settings_for(parse_target("laptop-rtx"), _plan("fp8"), Budget()).compute_capability == "8.9"


def test_a_dla_only_where_there_is_one() -> None:
    with pytest.raises(UsageError, match="DLA core 0 is asked for, and jetson-orin-nano-8gb has none"):
        settings_for(parse_target("jetson-orin"), _plan(), Budget(), dla_core=0)
    with pytest.raises(UsageError, match="DLA core 2 is asked for, and jetson-orin-nx-16gb has 2"):
        settings_for(parse_target("jetson-orin-nx-16gb"), _plan(), Budget(), dla_core=2)
    assert settings_for(parse_target("jetson-orin-nx-16gb"), _plan(), Budget(), dla_core=1).dla_core == 1


def test_a_gpu_of_the_asked_kind_here_brings_its_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(index=0, name="RTX", compute_capability="8.9", sms=24, memory_bytes=8 << 30, integrated=False)
    monkeypatch.setattr(targets, "find_gpu", lambda: gpu)
    assert parse_target("laptop-rtx").machine.sms == 24
    assert parse_target("sm_86").machine.sms is None
    assert this_machine().machine.sms == 24
    assert target_here("laptop-rtx").usable_bytes == load_profile("laptop-rtx").memory.usable_bytes
    assert target_here("laptop-rtx").machine.sms == 24
    for other in ("jetson-orin", "laptop-cpu", "no-such-device"):
        assert target_here(other).usable_bytes == 8 << 30
    monkeypatch.setattr(targets, "find_gpu", lambda: None)
    with pytest.raises(SessionError, match=r"no NVIDIA GPU on this machine\. .*--for"):
        this_machine()


def _library(codes: dict[str, int], calls: list[str]) -> Any:
    """Answers of libcuda, by function."""

    def function(name: str) -> Any:
        def call(*arguments: Any) -> int:
            calls.append(name)
            if name == "cuGetErrorString":
                arguments[1]._obj.value = b"out of memory"
            if name == "cuDeviceGetAttribute":
                arguments[0]._obj.value = {16: 8, 18: 1, 75: 8, 76: 7}[arguments[1].value]
            if name == "cuDeviceGetName":
                arguments[0].value = b"Orin"
            if name in {"cuDeviceTotalMem_v2", "cuMemAlloc_v2"}:
                arguments[0]._obj.value = 4096
            if name == "cuDeviceGetCount":
                arguments[0]._obj.value = 1
            return codes.get(name, 0)

        return call

    return type("Library", (), {"__getattr__": lambda _self, name: function(name)})()


def test_the_driver_tells_what_the_gpu_is() -> None:
    calls: list[str] = []
    driver = CudaDriver(_library({}, calls))
    gpu = driver.describe(0)
    driver.close()
    driver.close()
    assert gpu == Gpu(0, "Orin", "8.7", 8, 4096, integrated=True)
    assert calls[:3] == ["cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain"]
    assert calls.count("cuDevicePrimaryCtxRelease_v2") == 1


def test_the_drivers_errors_are_one_line() -> None:
    calls: list[str] = []
    driver = CudaDriver(_library({"cuMemAlloc_v2": 2, "cuStreamSynchronize": 700}, calls))
    with pytest.raises(SessionError, match="The GPU's memory is full"):
        driver.allocate(10)
    with pytest.raises(SessionError, match=r"CUDA refused cuStreamSynchronize: .* \(error 700\)"):
        driver.wait(1)
    with pytest.raises(SessionError, match=r"cuInit.*\(error 999\)"):
        CudaDriver(_library({"cuInit": 999}, calls))


def test_a_recording_that_fails_leaves_no_graph() -> None:
    calls: list[str] = []
    driver = CudaDriver(_library({"cuGraphInstantiateWithFlags": 1}, calls))
    with pytest.raises(SessionError):
        driver.end_capture(1)
    assert "cuGraphDestroy" in calls


@pytest.mark.cuda
def test_the_real_driver_copies_there_and_back() -> None:
    gpu = find_gpu()
    assert gpu is not None
    driver = CudaDriver.open()
    driver.enter()
    stream, device, host = driver.create_stream(), driver.allocate(64), driver.allocate_host(64)
    data = (ctypes.c_uint8 * 64).from_address(host)
    data[:] = list(range(64))
    driver.to_device(device, host, 64, stream)
    driver.wait(stream)
    ctypes.memset(host, 0, 64)
    driver.begin_capture(stream)
    driver.to_host(host, device, 64, stream)
    graph = driver.end_capture(stream)
    driver.launch(graph, stream)
    driver.wait(stream)
    assert list(data) == list(range(64))
    driver.destroy_graph(graph)
    driver.free(device)
    driver.free_host(host)
    driver.destroy_stream(stream)
    driver.close()
