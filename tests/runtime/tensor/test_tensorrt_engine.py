"""The session's face of an engine of TensorRT, with a stand-in for what needs a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import pytest

from edgeq.errors import SessionClosedError, UsageError
from edgeq.inputs.arrays import Array
from edgeq.runtime.tensor.engine import TensorrtEngine
from edgeq.runtime.tensor.session import TensorSession
from edgeq.runtime.tensor.settings import TensorSettings
from edgeq.runtime.tensorrt.session import EngineSession
from edgeq.tensor_types import AxisRange, TensorArtifact, TensorSpec

ARTIFACT = TensorArtifact(
    architecture="onnx",
    task="tensor",
    opset=20,
    inputs=(TensorSpec(name="x", dtype="float32", shape=("n", 3)),),
    outputs=(
        TensorSpec(name="sum", dtype="float32", shape=("n",)),
        TensorSpec(name="twice", dtype="float32", shape=("n", 3)),
    ),
)
SETTINGS = TensorSettings(axes={"n": AxisRange(least=1, usual=2, most=4)})


class StandIn:
    """Gives outputs in another order than the manifest's."""

    closed = False

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        return {"twice": inputs["x"] * 2, "sum": inputs["x"].sum(axis=1)}

    def close(self) -> None:
        self.closed = True


def test_all_ways_to_call_it() -> None:
    stand_in = StandIn()
    engine = TensorrtEngine(cast("EngineSession", stand_in), ARTIFACT, "tensorrt")
    x: Any = np.arange(6, dtype=np.float32).reshape(2, 3)
    with TensorSession(engine, SETTINGS) as session:
        assert (session.providers, session.threads) == (("tensorrt",), 0)
        results = [session.run({"x": x}), session.run_async({"x": x}).result(60), *session.run_batch([{"x": x}] * 3)]
        binding = session.bind()
        binding.inputs["x"][:] = x
        results.append(dict(binding.run()))
        for result in results:
            assert list(result) == ["sum", "twice"]
            np.testing.assert_array_equal(result["sum"], [3, 12])
            np.testing.assert_array_equal(result["twice"], x * 2)
        with pytest.raises(UsageError, match="'n' of 'x' has 5"):
            session.run({"x": np.zeros((5, 3), np.float32)})
    assert stand_in.closed
    with pytest.raises(SessionClosedError):
        binding.run()
