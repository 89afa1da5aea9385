"""Ranges of activations are symmetric where grids have no zero point, and only there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from edgeq.planner.tensors.candidates import Workbench
from edgeq.planner.tensors.samples import Samples
from edgeq.planner.tensors.writing import Dialect


def test_signed_activations_of_a_cpu_have_zero_points(chain: Path, make_bench: Callable[..., Workbench]) -> None:
    rng = np.random.default_rng(0)
    calls = [{"x": rng.random((128, 512), np.float32)} for _ in range(2)]
    found = {}
    for backend in ("onnxruntime-cpu", "tensorrt"):
        bench = make_bench(chain, dialect=Dialect(backend, "s8"), samples=Samples(calls, calls, "positive numbers"))
        found[backend] = bench.ranges(("minmax",))["minmax"]["x"]
    one = found["onnxruntime-cpu"]
    assert one.low == 0
    assert found["tensorrt"].low == -one.high
