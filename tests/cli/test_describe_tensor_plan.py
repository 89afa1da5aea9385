"""What ``edgeq plan`` says of latencies: a floor is marked wherever it stands, and decides nothing for certain."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edgeq.bundle import open_bundle
from edgeq.cli.describe_tensor import coverage_lines
from edgeq.cli.describe_tensor_plan import preview_lines
from edgeq.planner.tensors.options import TensorOption
from edgeq.planner.tensors.plan_only import TensorPreview
from edgeq.tensor_types import Coverage, NodeGroup, TensorPrediction
from edgeq.types import Budget

pytest.importorskip("onnxruntime")

SIZES: dict[str, Any] = dict.fromkeys(
    ("file_bytes", "weights_bytes", "activation_bytes", "runtime_bytes", "peak_memory_bytes"), 1 << 20
)


def _lines(bundle: Path, *, is_floor: bool, limit_ms: float) -> str:
    manifest = open_bundle(bundle).tensor
    predicted = TensorPrediction(**SIZES, latency_ms=3.0, latency_is_floor=is_floor)
    preview = TensorPreview(
        source=manifest.source,
        artifact=manifest.artifact,
        built_for=manifest.built_for,
        decided=False,
        plan=msgspec.structs.replace(manifest.plan, predicted=predicted),
        coverage=None,
        quality=None,
        options=(TensorOption(scheme="fp32", predicted=predicted),),
        budget=Budget(latency_ms=limit_ms),
    )
    return "\n".join(preview_lines(preview))


@pytest.mark.parametrize(
    ("is_floor", "limit_ms", "shown", "verdict"),
    [
        (True, 5.0, "≳ 3.00 ms", "may pass"),
        (True, 2.0, "≳ 3.00 ms", "unlikely to pass"),
        (False, 5.0, "3.00 ms", "would pass"),
        (False, 2.0, "3.00 ms", "would fail"),
    ],
)
def test_a_floor_is_marked(
    linear_onnx: Path, make_tensor_bundle: Any, is_floor: bool, limit_ms: float, shown: str, verdict: str
) -> None:
    text = _lines(make_tensor_bundle(linear_onnx), is_floor=is_floor, limit_ms=limit_ms)
    assert re.search(rf"^fp32 .*  {shown}$", text, re.MULTILINE), text
    assert re.search(rf"^latency p99 +{shown} +≤ {limit_ms:.2f} ms  {verdict}$", text, re.MULTILINE), text


def test_a_graph_in_16_bits_is_not_said_to_be_quantized_to_nothing() -> None:
    groups = (
        NodeGroup(op_type="MatMul", precision="bf16", nodes=3, macs=750, weight_bytes=10),
        NodeGroup(op_type="Conv", precision="fp32", nodes=1, macs=250, weight_bytes=10),
    )
    found = coverage_lines(Coverage(weight_share=0.0, mac_share=0.0, groups=groups, left=("a", "b")))
    assert found[0] == "in 16 bits: 75.0% of the multiply-adds; nothing is quantized"
    assert not any("in floats" in line for line in found)
