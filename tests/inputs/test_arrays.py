from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgeq.errors import UsageError
from edgeq.inputs import check_arrays
from edgeq.inputs.arrays import refuse_constant
from edgeq.tensor_types import AxisRange, TensorSpec

SPECS = (
    TensorSpec(name="x", dtype="float32", shape=("batch", 3, "length")),
    TensorSpec(name="mask", dtype="int64", shape=("batch", "length")),
)
AXES = {"batch": AxisRange(least=1, usual=1, most=4)}


def good() -> dict[str, Any]:
    return {"x": np.zeros((2, 3, 5), np.float32), "mask": np.zeros((2, 5), np.int64)}


def test_what_fits() -> None:
    check_arrays(good(), SPECS)
    check_arrays(good(), SPECS, AXES, finite=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": np.zeros(1)}, r"no input 'y'.*It takes x float32 \(batch, 3, length\); mask int64"),
        ({"x": None}, "'x' is a NoneType, not a numpy array"),
        ({"x": [[1.0]]}, "'x' is a list"),
        ({"x": np.zeros((2, 3, 5))}, r"'x' is float64.*takes float32.*asarray\(x, dtype=numpy.float32\)"),
        ({"x": np.zeros((2, 3, 5), ">f4")}, "'x' is >f4"),
        ({"x": np.zeros((2, 3), np.float32)}, r"shape \(2, 3\).*takes \(batch, 3, length\)"),
        ({"x": np.zeros((2, 4, 5), np.float32)}, r"shape \(2, 4, 5\)"),
        ({"x": np.zeros((2, 3, 6), np.float32)}, "'length' has 6 in 'x' and 5 in 'mask'"),
        ({"x": np.zeros((5, 3, 5), np.float32)}, "'batch' of 'x' has 5.*made for 1 to 4"),
        ({"x": np.zeros((0, 3, 5), np.float32)}, "'batch' of 'x' has 0"),
        ({"x": np.full((2, 3, 5), np.nan, np.float32)}, "'x' holds NaN or infinity"),
        ({"x": np.full((2, 3, 5), np.inf, np.float32)}, "'x' holds NaN or infinity"),
    ],
)
def test_each_fault_in_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        check_arrays({**good(), **change}, SPECS, AXES, finite=True, source="file.npz")
    assert str(caught.value).startswith("file.npz: ")
    assert "\n" not in str(caught.value)


def test_a_missing_input() -> None:
    with pytest.raises(UsageError, match="'mask' is missing"):
        check_arrays({"x": good()["x"]}, SPECS)


FLOATS = (TensorSpec(name="x", dtype="float32", shape=("n", 3)), TensorSpec(name="gain", dtype="float32", shape=(1,)))


def _call(value: float, gain: float = 1.0) -> dict[str, Any]:
    return {"x": np.full((2, 3), value, np.float32), "gain": np.full(1, gain, np.float32)}


@pytest.mark.parametrize("value", [0.0, 0.1, -3.5])
def test_inputs_that_never_change_are_refused(value: float) -> None:
    with pytest.raises(UsageError, match=rf"'x' is {value:g} throughout all inputs .*--calibration"):
        refuse_constant([_call(value)] * 3, FLOATS)


def test_what_changes_once_has_a_range() -> None:
    refuse_constant([_call(0.5), _call(0.5), _call(0.25)], FLOATS)
    refuse_constant([_call(0.5), _call(0.5, gain=2)], FLOATS)
    refuse_constant([{"x": np.eye(3, dtype=np.float32), "gain": np.ones(1, np.float32)}], FLOATS)
    refuse_constant([{"ids": np.ones((1, 4), np.int64)}], (TensorSpec(name="ids", dtype="int64", shape=(1, 4)),))
    refuse_constant([], FLOATS)
