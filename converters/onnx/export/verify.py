"""An ONNX file against what it was made from, on random and on real inputs.

An output passes if its largest absolute difference is at most `ABSOLUTE` + `RELATIVE` times the largest absolute value
that the reference gave: float32 sums in another order differ by about 1e-6 of that, a wrong graph by far more.
Outputs that are no floats must be equal.

Detectors that pick the best of many candidates (RT-DETR) give them in an order that the last bit of two equal scores
decides. What a detector finds is a set, so its outputs may be in any order, the same for all of them; and since equal
scores may also decide who is picked at all, only the half of the calls that agrees best counts.

What fails is asked once more of the reference alone: a model that draws random numbers differs from itself.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.errors import ConversionError, SessionError, SourceError, UnsupportedModelError
from edgeq.profiles.onnx.session import import_onnxruntime, open_onnx_session

__all__ = ["ABSOLUTE", "RELATIVE", "Call", "OutputCheck", "Reference", "check_outputs", "session_caller"]

Arrays = Mapping[str, NDArray[Any]]
Call = Callable[[Arrays], Arrays]

RELATIVE = 1e-3
ABSOLUTE = 1e-6
_FATAL = 4
# Where in ONNX Runtime's own sources an error arose: "/onnxruntime_src/…/reshape_helper.h:84 onnxruntime::…(…) "
_SOURCE_LINE = re.compile(r"\S*/onnxruntime_src/\S+:\d+ \S*\([^()]*\) |\[ONNXRuntimeError\] : \d+ : \w+ : ")
_REMEDY = "Export it yourself and give the ONNX file"
_REMEDY_SHAPES = "Fix the shapes with --shape (shapes=), or export it yourself and give the ONNX file"


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
    """What an ONNX file was made from, to be compared with.

    Attributes:
        call: of it, with the graph's names.
        unordered: whether its outputs are sets.
    """

    call: Call
    unordered: bool = False


@dataclasses.dataclass(frozen=True)
class OutputCheck:
    """One output of the ONNX file against the reference's.

    Attributes:
        name: of the output.
        calls: compared.
        max_error: the largest absolute difference.
        scale: the largest absolute value of the reference.
        tolerance: what the difference may be.
    """

    name: str
    calls: int
    max_error: float
    scale: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the difference is within the tolerance."""
        return self.max_error <= self.tolerance


def session_caller(model: Path, threads: int = 1, *, remedy: str = _REMEDY_SHAPES) -> Call:
    """An ONNX file as a function of arrays.

    Args:
        model: the ``.onnx`` file.
        threads: of a call.
        remedy: of its errors.

    Raises:
        ConversionError: ONNX Runtime cannot load it, or, when called, cannot run it.
    """
    try:
        session = open_onnx_session(model, threads)
    except SessionError as error:
        raise ConversionError(error.cause, remedy) from error
    names = [output.name for output in session.get_outputs()]
    settings = import_onnxruntime().RunOptions()
    settings.log_severity_level = _FATAL  # what fails is raised, so it need not be logged besides

    def call(inputs: Arrays) -> Arrays:
        try:
            found = session.run(names, dict(inputs), settings)
        except Exception as error:  # ONNX Runtime's errors have no common base
            shapes = ", ".join(f"{name} {array.shape}" for name, array in inputs.items())
            reason = _SOURCE_LINE.sub("", " ".join(str(error).split()))
            raise ConversionError(f"ONNX Runtime cannot run the graph with {shapes}: {reason}", remedy) from error
        return dict(zip(names, (np.asarray(array) for array in found), strict=True))

    return call


def check_outputs(
    reference: Call,
    candidate: Call,
    calls: Iterable[Arrays],
    *,
    as_sets: bool = False,
    remedy: str = _REMEDY_SHAPES,
) -> tuple[OutputCheck, ...]:
    """Compare all outputs of the reference with the candidate's, call by call.

    Args:
        reference: what is right.
        candidate: what is checked.
        calls: inputs.
        as_sets: the outputs are of shape (batch, objects, …), and objects may be in any order.
        remedy: of an error about a difference.

    Raises:
        SourceError: the reference itself gives NaN or infinity.
        UnsupportedModelError: the reference gives something else each time.
        ConversionError: an output that is missing, of another shape or type, or further away than allowed.
    """
    compared: list[dict[str, tuple[float, float]]] = []
    for inputs in calls:
        expected, found = reference(inputs), candidate(inputs)
        if as_sets:
            found = _in_order_of(expected, found)
        try:
            differences = {name: _difference(name, array, found) for name, array in expected.items()}
        except ConversionError:
            _refuse_random(reference, inputs, expected)
            raise
        if any(error > _tolerance(scale) for error, scale in differences.values()):
            _refuse_random(reference, inputs, expected)
        compared.append(differences)
    counted = _best_half(compared) if as_sets else compared
    checks = tuple(_worst(name, counted) for name in (counted[0] if counted else ()))
    for check in checks:
        if not check.passed:
            raise ConversionError(
                f"The output {check.name!r} of the ONNX graph differs from the original by {check.max_error:.3g}, "
                f"more than {check.tolerance:.3g} (values up to {check.scale:.3g})",
                remedy,
            )
    return checks


def _refuse_random(reference: Call, inputs: Arrays, before: Arrays) -> None:
    """Refuse a reference that answers the same inputs in another way than before."""
    again = reference(inputs)
    for name, array in before.items():
        try:
            error, scale = _difference(name, array, again)
        except ConversionError:  # not even of the same shape
            error, scale = float("inf"), 0.0
        if error > _tolerance(scale):
            raise UnsupportedModelError(
                f"The model is random: two calls with the same inputs differ at {name!r}, and so nothing can be "
                "compared with it",
                "Export it without random numbers and active dropout, or let it take them as an input",
            )


def _tolerance(scale: float) -> float:
    return ABSOLUTE + RELATIVE * scale


def _worst(name: str, compared: Sequence[Mapping[str, tuple[float, float]]]) -> OutputCheck:
    error = max(call[name][0] for call in compared)
    scale = max(call[name][1] for call in compared)
    return OutputCheck(name, len(compared), error, scale, _tolerance(scale))


def _best_half(compared: list[dict[str, tuple[float, float]]]) -> list[dict[str, tuple[float, float]]]:
    """The calls that agree best: a wrong graph agrees in none, one cut between equal scores spoils a single call."""

    def worst(call: Mapping[str, tuple[float, float]]) -> float:
        return max(error / _tolerance(scale) for error, scale in call.values())

    return sorted(compared, key=worst)[: -(-len(compared) // 2)]


def _in_order_of(expected: Arrays, found: Arrays) -> Arrays:
    """The objects that were found, each where the nearest expected one stands; nothing changes if shapes differ."""
    shapes = {array.shape[:2] for array in (*expected.values(), *found.values())}
    if len(shapes) != 1 or expected.keys() != found.keys():
        return found
    ordered = {name: array.copy() for name, array in found.items()}
    for image in range(min(shapes)[0]):
        wanted, given = (
            np.concatenate([side[name][image].reshape(min(shapes)[1], -1) for name in expected], 1)
            for side in (expected, found)
        )
        order = _nearest(wanted, given)
        for name, array in found.items():
            ordered[name][image] = array[image][order]
    return ordered


def _nearest(wanted: NDArray[Any], given: NDArray[Any]) -> list[int]:
    """For each wanted row the nearest given one that is not taken, the one of the same place first."""
    left = list(range(len(given)))
    order = []
    for row, values in enumerate(wanted):
        distances = np.abs(given[left] - values).max(1)
        best = left[int(distances.argmin())]
        if row in left and np.abs(given[row] - values).max() <= distances.min():
            best = row
        left.remove(best)
        order.append(best)
    return order


def _difference(name: str, expected: NDArray[Any], outputs: Arrays) -> tuple[float, float]:
    """The largest absolute difference, and the largest absolute value."""
    found = outputs.get(name)
    if found is None:
        raise ConversionError(f"The ONNX graph has no output {name!r}, only {', '.join(outputs)}", _REMEDY)
    if found.shape != expected.shape or found.dtype != expected.dtype:
        raise ConversionError(
            f"The output {name!r} is {found.dtype} {found.shape} in ONNX and {expected.dtype} {expected.shape} before",
            _REMEDY,
        )
    if expected.dtype.kind not in "fc":
        return (0.0 if np.array_equal(expected, found) else float("inf")), float(expected.size > 0)
    if not np.isfinite(expected).all():
        raise SourceError(
            f"The model itself gives NaN or infinity at {name!r}",
            "Check its weights, and give usual inputs",
        )
    if not np.isfinite(found).all():
        return float("inf"), float(np.abs(expected).max(initial=0.0))
    wide = expected.astype(np.float64)
    return float(np.abs(wide - found).max(initial=0.0)), float(np.abs(wide).max(initial=0.0))
