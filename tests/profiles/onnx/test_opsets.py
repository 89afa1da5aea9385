"""What opsets devices take."""

from __future__ import annotations

import msgspec
import pytest

from edgeq.profiles.device import Software
from edgeq.profiles.loader import load_profile
from edgeq.profiles.onnx.opsets import newest_opset


@pytest.mark.parametrize(
    ("device", "backend", "newest"),
    [
        ("jetson-orin-nx-16gb", "tensorrt", 20),  # JetPack 6.1 to 7.2: TensorRT 10.3 and 10.16
        ("jetson-thor", "tensorrt", 20),
        ("jetson-xavier-nx", "tensorrt", 17),
        ("laptop-rtx", "tensorrt-rtx", 24),
        ("jetson-orin-nx-16gb", "onnxruntime-cuda", None),
        ("laptop-cpu", "onnxruntime-cpu", None),
    ],
)
def test_the_oldest_software_that_counts_decides(device: str, backend: str, newest: int | None) -> None:
    assert newest_opset(load_profile(device), backend) == newest


@pytest.mark.parametrize(("version", "newest"), [(None, 20), ("10", 20), ("11.5.0", 24), ("8.2.1", 13), ("odd", 20)])
def test_a_users_own_profile(version: str | None, newest: int) -> None:
    profile = msgspec.structs.replace(load_profile("jetson-thor"), software=(Software(tensorrt=version),))
    assert newest_opset(profile, "tensorrt") == newest
