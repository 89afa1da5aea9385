"""Buffers that are bound to a session once: calls of one shape that allocate nothing."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from edgeq.errors import EdgeqError, SessionClosedError, SessionError, UsageError
from edgeq.inputs.arrays import Array, describe_specs
from edgeq.tensor_types import AxisRange, TensorSpec

__all__ = ["Binding", "input_buffers"]

_EXAMPLE = "Give whole numbers, as in bind({'x': (1, 3, 224, 224)})"


class Binding:
    """Inputs and outputs of a session at fixed places in memory. For one thread at a time.

    Attributes:
        inputs: arrays to write into, as in ``binding.inputs["x"][:] = image``; zeros at first.
        outputs: arrays that each `run` writes anew.
    """

    def __init__(self, compute: Callable[[], None], inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        """Take over what is bound already."""
        self.inputs = inputs
        self.outputs = outputs
        self._compute: Callable[[], None] | None = compute

    def run(self) -> Mapping[str, Array]:
        """Compute `outputs` from what `inputs` hold now, and return them.

        Raises:
            SessionClosedError: the session was closed.
            SessionError: the runtime failed.
        """
        compute = self._compute
        if compute is None:
            raise SessionClosedError("the session was closed", "Load the bundle again")
        try:
            compute()
        except EdgeqError:
            raise
        except Exception as error:  # ONNX Runtime's exceptions have no common base but Exception
            reason = " ".join(str(error).split())
            raise SessionError(
                f"ONNX Runtime failed: {reason}", "Check the values of the inputs, and free memory"
            ) from error
        return self.outputs

    def close(self) -> None:
        """Let go of the session; the arrays stay."""
        self._compute = None


def input_buffers(
    specs: Sequence[TensorSpec], axes: Mapping[str, AxisRange], shapes: Mapping[str, Sequence[int]]
) -> dict[str, Array]:
    """Arrays of zeros for inputs.

    Args:
        specs: of the inputs.
        axes: whose usual sizes count where ``shapes`` says nothing.
        shapes: of inputs by name.

    Raises:
        UsageError: a name that the model does not have, a shape that is none or that takes more memory than there is,
            or a dynamic axis without a size.
    """
    if not isinstance(shapes, Mapping):
        raise UsageError(f"bind() takes shapes by the names of inputs, not a {type(shapes).__name__}", _EXAMPLE)
    for name in shapes:
        if name not in {spec.name for spec in specs}:
            raise UsageError(f"the model has no input {name!r}", f"It takes {describe_specs(specs)}")
    return {spec.name: _zeros(spec, _shape(spec, axes, shapes.get(spec.name))) for spec in specs}


def _zeros(spec: TensorSpec, shape: tuple[int, ...]) -> Array:
    try:
        return np.zeros(shape, spec.dtype)
    except (MemoryError, ValueError) as error:  # numpy has a largest size of its own
        raise UsageError(
            f"the shape {shape} of {spec.name!r} takes more memory than there is", "Give smaller sizes"
        ) from error


def _shape(spec: TensorSpec, axes: Mapping[str, AxisRange], told: object) -> tuple[int, ...]:
    if told is not None:
        return _sizes(spec, told)
    sizes = []
    for axis in spec.shape:
        if isinstance(axis, str) and axis not in axes:
            raise UsageError(
                f"the axis {axis!r} of {spec.name!r} has no size", f"Give it a shape: bind({{{spec.name!r}: ...}})"
            )
        sizes.append(axes[axis].usual if isinstance(axis, str) else axis)
    return tuple(sizes)


def _sizes(spec: TensorSpec, told: object) -> tuple[int, ...]:
    """A user's shape: whole numbers, of numpy too, of zero or more."""
    try:
        sizes = tuple(operator.index(size) for size in told) if isinstance(told, Iterable) else None
    except TypeError:
        sizes = None
    if sizes is None or min(sizes, default=0) < 0:
        raise UsageError(f"the shape {told!r} of {spec.name!r} makes no sense", _EXAMPLE)
    return sizes
