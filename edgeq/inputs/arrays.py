"""Whether arrays are what a model wants, each fault in one line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeq.errors import UsageError
from edgeq.tensor_types import AxisRange, TensorSpec

__all__ = ["Array", "check_arrays", "describe_shape", "describe_specs", "refuse_constant"]

Array = npt.NDArray[Any]


def describe_specs(specs: Sequence[TensorSpec]) -> str:
    """Inputs or outputs for people: ``pixel_values float32 (batch, 3, 224, 224)``."""
    return "; ".join(f"{spec.name} {spec.dtype} {describe_shape(spec.shape)}" for spec in specs) or "nothing"


def check_arrays(
    inputs: Mapping[str, Any],
    specs: Sequence[TensorSpec],
    axes: Mapping[str, AxisRange] | None = None,
    *,
    finite: bool = False,
    source: str = "",
) -> None:
    """Compare the inputs of one call with what the model wants.

    Args:
        inputs: arrays by name.
        specs: what the model wants.
        axes: sizes that dynamic axes may have; those that are not named may have any.
        finite: also refuse NaN and infinity.
        source: where the arrays come from, which messages then begin with.

    Raises:
        UsageError: an input that is missing or unknown, that is no array, has another type or shape, does not agree
            with another input about a dynamic axis, or holds NaN or infinity.
    """
    prefix = f"{source}: " if source else ""
    wanted = {spec.name: spec for spec in specs}
    for name in inputs:
        if name not in wanted:
            raise UsageError(f"{prefix}the model has no input {name!r}", f"It takes {describe_specs(specs)}")
    sizes: dict[str, tuple[int, str]] = {}
    for name, spec in wanted.items():
        if name not in inputs:
            raise UsageError(f"{prefix}the input {name!r} is missing", f"The model takes {describe_specs(specs)}")
        array = inputs[name]
        _check_type(array, spec, prefix)
        _check_shape(array, spec, prefix)
        _check_axes(array, spec, axes or {}, sizes, prefix)
        if finite and array.dtype.kind == "f" and not np.isfinite(array).all():
            raise UsageError(f"{prefix}the input {name!r} holds NaN or infinity", "Remove such inputs, or repair them")


def refuse_constant(calls: Iterable[Mapping[str, Any]], specs: Sequence[TensorSpec]) -> None:
    """Refuse inputs to calibrate with that hold one and the same number throughout: no range can be taken from them.

    One input of several may well be constant, such as a mask; and numbers of tokens have no range.

    Args:
        calls: that fit the model.
        specs: what the model wants.

    Raises:
        UsageError: all of the model's inputs are floats, and none of them ever changes.
    """
    if not specs or any(np.dtype(spec.dtype).kind != "f" for spec in specs):
        return
    values: dict[str, float] = {}
    for call in calls:
        for spec in specs:
            array = call[spec.name]
            value = values.setdefault(spec.name, float(array.flat[0])) if array.size else 0.0
            if array.size and (array != value).any():
                return
    if values:
        name, value = next(iter(values.items()))
        raise UsageError(
            f"the input {name!r} is {value:g} throughout all inputs to calibrate with: no range can be taken from them",
            "Give inputs from the robot's own work with --calibration",
        )


def _check_type(array: object, spec: TensorSpec, prefix: str) -> None:
    as_wanted = f"numpy.asarray({spec.name}, dtype=numpy.{spec.dtype})"
    if not isinstance(array, np.ndarray):
        raise UsageError(
            f"{prefix}the input {spec.name!r} is a {type(array).__name__}, not a numpy array", f"Give {as_wanted}"
        )
    if array.dtype != np.dtype(spec.dtype):
        raise UsageError(
            f"{prefix}the input {spec.name!r} is {array.dtype}, and the model takes {spec.dtype}", f"Give {as_wanted}"
        )


def _check_shape(array: Array, spec: TensorSpec, prefix: str) -> None:
    fits = len(array.shape) == len(spec.shape) and all(
        isinstance(wanted, str) or size == wanted for size, wanted in zip(array.shape, spec.shape, strict=True)
    )
    if not fits:
        raise UsageError(
            f"{prefix}the input {spec.name!r} has the shape {describe_shape(array.shape)}, and the model takes "
            f"{describe_shape(spec.shape)}",
            "Reshape it, or convert the model again with --shape",
        )


def _check_axes(
    array: Array,
    spec: TensorSpec,
    axes: Mapping[str, AxisRange],
    sizes: dict[str, tuple[int, str]],
    prefix: str,
) -> None:
    for size, axis in zip(array.shape, spec.shape, strict=True):
        if not isinstance(axis, str):
            continue
        limits = axes.get(axis)
        if limits is not None and not limits.least <= size <= limits.most:
            raise UsageError(
                f"{prefix}the axis {axis!r} of {spec.name!r} has {size}, and the model was made for "
                f"{limits.least} to {limits.most}",
                "Cut or pad the input, or convert the model again with other sizes",
            )
        known, first = sizes.setdefault(axis, (size, spec.name))
        if known != size:
            raise UsageError(
                f"{prefix}the axis {axis!r} has {known} in {first!r} and {size} in {spec.name!r}",
                "Give both the same size",
            )


def describe_shape(shape: Sequence[int | str]) -> str:
    """``(batch, 3, 224, 224)``, ``(8,)``."""
    return f"({shape[0]},)" if len(shape) == 1 else f"({', '.join(map(str, shape))})"
