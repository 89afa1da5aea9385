"""Which graph of a bundle a machine takes, also where its GPU does not answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from edgeq.bundle import open_bundle
from edgeq.errors import SessionError
from edgeq.runtime.tensor.devices import fitting_device
from edgeq.runtime.tensorrt import driver
from edgeq.tensor_types import TensorManifest, TensorVariant
from edgeq.types import Target

CUDA_ERROR_STUB_LIBRARY, CUDA_ERROR_NO_DEVICE, CUDA_ERROR_SYSTEM_DRIVER_MISMATCH = 34, 100, 803


class Driver:
    """Stands for libcuda on a machine with one GPU; functions answer with the codes that they are given."""

    def __init__(self, **codes: int) -> None:
        self._codes = codes

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            if name == "cuGetErrorString":
                arguments[1]._obj.value = b"unknown error"
            if name == "cuDeviceGetCount":
                arguments[0]._obj.value = 1
            return self._codes.get(name, 0)

        return call


def _variant(of: TensorManifest, name: str, backend: str) -> TensorVariant:
    plan = msgspec.structs.replace(of.plan, backend=backend)
    target = Target(arch="any", accelerator="cpu" if backend == "onnxruntime-cpu" else "cuda:sm_89")
    return TensorVariant(built_for=name, target=target, plan=plan, files=(), budget=of.budget)


@pytest.fixture
def manifest(linear_onnx: Path, make_tensor_bundle: Any) -> TensorManifest:
    """Of a bundle for a GPU first, and for any CPU."""
    plan, target = {"backend": "onnxruntime-cuda"}, Target(arch="any", accelerator="cuda:sm_89")
    folder = make_tensor_bundle(linear_onnx, plan=plan, target=target, built_for="rtx")
    made = open_bundle(folder).tensor
    return msgspec.structs.replace(made, others=(_variant(made, "cpu", "onnxruntime-cpu"),))


def _use(monkeypatch: pytest.MonkeyPatch, library: object) -> None:
    monkeypatch.setattr(driver, "_load", lambda: library)


@pytest.mark.parametrize(
    ("library", "device"),
    [
        (None, "cpu"),
        (Driver(cuInit=CUDA_ERROR_NO_DEVICE), "cpu"),
        (Driver(cuInit=CUDA_ERROR_STUB_LIBRARY), "cpu"),
        (Driver(), "rtx"),
    ],
)
def test_a_machine_without_a_gpu_takes_the_cpus_graph(
    manifest: TensorManifest, monkeypatch: pytest.MonkeyPatch, library: object, device: str
) -> None:
    _use(monkeypatch, library)
    assert fitting_device(manifest) == device


@pytest.mark.parametrize(
    ("codes", "what"),
    [
        ({"cuInit": 999}, "cuInit"),
        ({"cuInit": CUDA_ERROR_SYSTEM_DRIVER_MISMATCH}, "cuInit"),
        ({"cuDeviceGetCount": 3}, "cuDeviceGetCount"),
        ({"cuDevicePrimaryCtxRetain": 2}, "memory is full"),
    ],
)
def test_a_gpu_that_does_not_answer_is_an_error(
    manifest: TensorManifest, monkeypatch: pytest.MonkeyPatch, codes: dict[str, int], what: str
) -> None:
    _use(monkeypatch, Driver(**codes))
    with pytest.raises(SessionError, match=what) as told:
        fitting_device(manifest)
    assert "device='rtx' or device='cpu'" in told.value.remedy


def test_the_gpu_is_looked_at_only_where_it_decides(manifest: TensorManifest, monkeypatch: pytest.MonkeyPatch) -> None:
    _use(monkeypatch, Driver(cuInit=999))
    cpu = _variant(manifest, "other", "onnxruntime-cpu")
    assert fitting_device(msgspec.structs.replace(manifest, others=())) == "rtx"
    assert fitting_device(manifest, ["CPUExecutionProvider"]) == "cpu"
    swapped = msgspec.structs.replace(
        manifest, built_for="first", plan=cpu.plan, target=cpu.target, others=(_variant(manifest, "rtx", "tensorrt"),)
    )
    assert fitting_device(swapped) == "first"


@pytest.mark.parametrize("rest", [[], ["CPUExecutionProvider"]])
def test_the_provider_that_comes_first_chooses(manifest: TensorManifest, rest: list[str]) -> None:
    cpu_first = msgspec.structs.replace(
        manifest,
        built_for="first",
        plan=msgspec.structs.replace(manifest.plan, backend="onnxruntime-cpu"),
        others=(_variant(manifest, "rtx", "onnxruntime-cuda"),),
    )
    assert fitting_device(cpu_first, ["CUDAExecutionProvider", *rest]) == "rtx"
    assert fitting_device(cpu_first, [("CUDAExecutionProvider", {"device_id": "1"}), *rest]) == "rtx"
