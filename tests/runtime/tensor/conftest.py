"""Small graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeq.tensor_types import AxisRange


def linear(path: Path, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """What ``y`` of `linear_onnx` is."""
    import onnx

    weights = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    y: np.ndarray[Any, Any] = x @ weights["w"] + weights["b"]
    return y


@pytest.fixture(scope="session")
def axes() -> dict[str, AxisRange]:
    """Up to six rows."""
    return {"batch": AxisRange(least=1, usual=2, most=6)}
