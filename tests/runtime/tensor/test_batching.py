from __future__ import annotations

import numpy as np
import pytest

from edgeq.errors import SessionError
from edgeq.runtime.tensor.batching import batch_axis, join_calls, split_calls
from edgeq.tensor_types import AxisRange, TensorSpec


def spec(name: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name=name, dtype="float32", shape=shape)


def test_the_axis_that_all_begin_with() -> None:
    assert batch_axis([spec("x", "n", 3)], [spec("y", "n")]) == "n"
    assert batch_axis([spec("x", "n", 3)], [spec("y", "m")]) is None
    assert batch_axis([spec("x", 1, 3)], [spec("y", 1)]) is None
    assert batch_axis([spec("x", "n"), spec("scale")], [spec("y", "n")]) is None


def test_neighbours_of_one_shape_are_joined() -> None:
    calls = [{"x": np.full((rows, width), rows)} for rows, width in ((1, 4), (2, 4), (2, 5), (1, 5), (1, 4), (9, 4))]
    axes = {"n": AxisRange(least=1, usual=1, most=3)}
    groups = list(join_calls(calls, [spec("x", "n", "m")], [spec("y", "n")], axes))
    assert [group.rows for group in groups] == [(1, 2), (2, 1), (1,), (9,)]
    np.testing.assert_array_equal(groups[0].inputs["x"], [[1] * 4, [2] * 4, [2] * 4])
    assert [len(g.rows) for g in join_calls(calls, [spec("x", "n", "m")], [spec("y", "k")], axes)] == [1] * 6


def test_splitting_is_the_inverse() -> None:
    parts = split_calls({"y": np.arange(6)}, (1, 3, 2))
    assert [part["y"].tolist() for part in parts] == [[0], [1, 2, 3], [4, 5]]
    with pytest.raises(SessionError, match="'y' has 5 rows for 6 rows"):
        split_calls({"y": np.arange(5)}, (1, 3, 2))
