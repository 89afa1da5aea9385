"""Inputs of a model: what they must look like, and a hash that names them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.onnx.infer import input_axes
from edgeq.errors import ConversionError
from edgeq.tensor_types import TensorSpec

if TYPE_CHECKING:
    import onnx

__all__ = ["Feeds", "InputDigest", "check_feeds", "input_specs"]

Feeds = Mapping[str, NDArray[np.generic]]


class InputDigest:
    """SHA-256 over names, types, shapes and bytes of inputs, in the order of the calls."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def update(self, feeds: Feeds) -> None:
        """Take in the inputs of a call; the order of their names does not matter."""
        for name in sorted(feeds):
            array = np.ascontiguousarray(feeds[name])
            self._hash.update(f"{name}\0{array.dtype.str}\0{array.shape}\0".encode())
            self._hash.update(array.reshape(-1).view(np.uint8).data)

    def hexdigest(self) -> str:
        """Of all so far."""
        return self._hash.hexdigest()


def input_specs(model: onnx.ModelProto) -> tuple[TensorSpec, ...]:
    """What a caller feeds; axes without a size or a name are called by their place.

    Raises:
        UnsupportedModelError: an input that is no tensor with a known number of axes.
    """
    import onnx

    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    return tuple(
        TensorSpec(
            name=name,
            dtype=onnx.helper.tensor_dtype_to_np_dtype(types[name]).name,
            shape=tuple(f"axis {n}" if axis is None else axis for n, axis in enumerate(axes)),
        )
        for name, axes in input_axes(model).items()
    )


def check_feeds(feeds: Feeds, specs: Sequence[TensorSpec], index: int) -> None:
    """Refuse inputs that the model does not take.

    Args:
        feeds: of one call.
        specs: of the model's inputs.
        index: of the call, from 0, for the message.

    Raises:
        ConversionError: names, shapes or types that are not the model's, or numbers that are not finite.
    """
    wanted, given = {spec.name for spec in specs}, set(feeds)
    if wanted != given:
        wrong = ", ".join(
            [*(f"{n!r} is missing" for n in sorted(wanted - given)), *(map(repr, sorted(given - wanted)))]
        )
        raise ConversionError(
            f"Input {index} has not the names of the model's inputs: {wrong}",
            f"Give {', '.join(sorted(wanted)) or 'none'}",
        )
    for spec in specs:
        array = feeds[spec.name]
        if array.dtype.name != spec.dtype:
            raise ConversionError(
                f"{spec.name!r} of input {index} is {array.dtype.name}, the model takes {spec.dtype}",
                "Convert it to that type",
            )
        sizes = {axis: size for axis, size in zip(spec.shape, array.shape, strict=False) if isinstance(axis, str)}
        fits = len(spec.shape) == array.ndim and all(
            size == (sizes[axis] if isinstance(axis, str) else axis)
            for axis, size in zip(spec.shape, array.shape, strict=True)
        )
        if not fits:
            shape = " x ".join(map(str, spec.shape))
            raise ConversionError(
                f"{spec.name!r} of input {index} has the shape {list(array.shape)}, the model takes {shape}",
                "Give it in that shape",
            )
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ConversionError(
                f"{spec.name!r} of input {index} holds NaN or infinite numbers", "Leave this input out, or repair it"
            )
