"""Random inputs of the right names, types and shapes: for proofs of life and for timing, not for accuracy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from edgeq.errors import UsageError
from edgeq.inputs.arrays import Array
from edgeq.tensor_types import AxisRange, TensorArtifact, TensorSpec

__all__ = ["random_inputs"]

_LARGEST_ID = 100  # exclusive: every vocabulary has as many
_FIRST, _NONE = ("position_ids", "cache_position"), ("token_type_ids",)


def random_inputs(
    artifact: TensorArtifact,
    axes: Mapping[str, AxisRange | int],
    count: int,
    seed: int = 0,
    *,
    limits: Mapping[str, int] | None = None,
) -> Iterator[dict[str, Array]]:
    """Inputs of so many calls; the same seed gives the same.

    Floats are from a normal distribution with variance 1, as normalized images are; masks are all 1, token types 0,
    positions count from 0, other integers are from 0 to below their limit.

    Args:
        artifact: of the model.
        axes: sizes of the dynamic axes, or their ranges, whose usual sizes then count.
        count: of calls.
        seed: of the random numbers.
        limits: exclusive upper limits of integer inputs by name; 100 for others.

    Raises:
        UsageError: a dynamic axis without a size, or an input of a type that has no random numbers.
    """
    rng = np.random.default_rng(seed)
    shapes = {spec.name: _shape(spec, axes) for spec in artifact.inputs}
    for spec in artifact.inputs:
        if np.dtype(spec.dtype).kind not in "fiub":
            raise UsageError(f"the input {spec.name!r} is {spec.dtype}", "Give inputs of your own as .npz files")
    return _calls(artifact.inputs, shapes, limits or {}, rng, count)


def _calls(
    specs: Sequence[TensorSpec],
    shapes: Mapping[str, tuple[int, ...]],
    limits: Mapping[str, int],
    rng: np.random.Generator,
    count: int,
) -> Iterator[dict[str, Array]]:
    for _ in range(count):
        yield {s.name: _values(s, shapes[s.name], limits.get(s.name, _LARGEST_ID), rng) for s in specs}


def _values(spec: TensorSpec, shape: tuple[int, ...], limit: int, rng: np.random.Generator) -> Array:
    dtype: np.dtype[Any] = np.dtype(spec.dtype)
    if "mask" in spec.name:
        return np.ones(shape, dtype)
    if spec.name in _NONE:
        return np.zeros(shape, dtype)
    if spec.name in _FIRST:
        return np.broadcast_to(np.arange(shape[-1]), shape).astype(dtype)
    if dtype.kind == "f":
        return rng.standard_normal(shape, np.float32).astype(dtype)
    if dtype.kind == "b":
        return rng.integers(0, 2, shape).astype(dtype)
    return rng.integers(0, min(limit, int(np.iinfo(dtype).max) + 1), shape).astype(dtype)


def _shape(spec: TensorSpec, axes: Mapping[str, AxisRange | int]) -> tuple[int, ...]:
    sizes = []
    for axis in spec.shape:
        size = axes.get(axis) if isinstance(axis, str) else axis
        if size is None:
            raise UsageError(f"the axis {axis!r} of {spec.name!r} has no size", "Say it with --shape")
        sizes.append(size.usual if isinstance(size, AxisRange) else size)
    return tuple(sizes)
