"""How answers are compared."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeq.converters.onnx.export.verify import ABSOLUTE, RELATIVE, check_outputs
from edgeq.errors import ConversionError, SourceError, UnsupportedModelError

_X = np.linspace(-4, 4, 12, dtype=np.float32).reshape(3, 4)


def _check(expected: NDArray[Any], found: NDArray[Any] | None) -> Any:
    answer = {} if found is None else {"y": found}
    return check_outputs(lambda _: {"y": expected}, lambda _: answer, [{"x": _X}] * 2)


def test_small_differences_pass_and_are_reported() -> None:
    (check,) = _check(_X, _X + np.float32(1e-3))
    assert (check.name, check.calls, check.scale) == ("y", 2, 4.0)
    assert check.max_error == pytest.approx(1e-3, rel=1e-3)
    assert check.tolerance == pytest.approx(ABSOLUTE + 4 * RELATIVE)
    assert check.passed


def test_larger_ones_do_not() -> None:
    with pytest.raises(ConversionError, match=r"'y'.*differs from the original by 0\.005"):
        _check(_X, _X + np.float32(5e-3))


def test_the_worst_call_counts() -> None:
    calls = iter([0.0, 1e-3, 0.0])
    (check,) = check_outputs(lambda _: {"y": _X}, lambda _: {"y": _X + np.float32(next(calls))}, [{"x": _X}] * 3)
    assert check.max_error == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (None, "no output 'y'"),
        (_X[:2], r"\(2, 4\) in ONNX and float32 \(3, 4\) before"),
        (_X.astype(np.float64), "float64"),
        (np.where(_X > 3, np.float32(np.nan), _X), "differs from the original by inf"),
    ],
)
def test_other_names_shapes_types_and_nan_are_errors(found: NDArray[Any] | None, message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        _check(_X, found)


def test_a_model_that_gives_nan_itself_is_to_blame() -> None:
    with pytest.raises(SourceError, match="model itself gives NaN"):
        _check(np.full_like(_X, np.inf), _X)


def test_whole_numbers_must_be_equal() -> None:
    whole = np.arange(4)
    assert _check(whole, whole)[0].max_error == 0
    with pytest.raises(ConversionError, match="by inf"):
        _check(whole, whole[::-1].copy())


def test_a_reference_that_differs_from_itself_is_random() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(UnsupportedModelError, match=r"The model is random: two calls .* differ at 'y'"):
        check_outputs(lambda _: {"y": rng.standard_normal(4)}, lambda _: {"y": np.zeros(4)}, [{"x": _X}])
    with pytest.raises(UnsupportedModelError, match="The model is random"):
        check_outputs(lambda _: {"y": np.zeros(rng.integers(1, 1000))}, lambda _: {"y": np.zeros(0)}, [{"x": _X}])
