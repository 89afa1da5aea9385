"""Several calls as one, along their first axis."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from edgeq.errors import SessionError
from edgeq.inputs.arrays import Array
from edgeq.tensor_types import AxisRange, TensorSpec

__all__ = ["Group", "batch_axis", "join_calls", "split_calls"]

_MOST_ROWS = 32  # of one run where a bundle does not say


@dataclasses.dataclass(frozen=True)
class Group:
    """Calls that are computed together.

    Attributes:
        inputs: of all of them.
        rows: of each call along the first axis, in their order; one number for a call of its own.
    """

    inputs: Mapping[str, Array]
    rows: tuple[int, ...]


def batch_axis(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> str | None:
    """The dynamic axis that every input and output begins with; None if there is none."""
    firsts = {spec.shape[0] if spec.shape else None for spec in (*inputs, *outputs)}
    first = firsts.pop() if len(firsts) == 1 else None
    return first if isinstance(first, str) else None


def join_calls(
    calls: Sequence[Mapping[str, Array]],
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    axes: Mapping[str, AxisRange],
) -> Iterator[Group]:
    """Neighbours that can be computed together; all arrays have been checked."""
    axis = batch_axis(inputs, outputs)
    names = [spec.name for spec in inputs]
    if axis is None or not names:
        for call in calls:
            yield Group(call, (1,))
        return
    limit = axes[axis].most if axis in axes else _MOST_ROWS
    for _, alike in itertools.groupby(calls, lambda call: [call[name].shape[1:] for name in names]):
        for part in _portions(list(alike), names[0], limit):
            yield _join(part, names)


def _portions(calls: Sequence[Mapping[str, Array]], name: str, limit: int) -> Iterator[list[Mapping[str, Array]]]:
    part: list[Mapping[str, Array]] = []
    rows = 0
    for call in calls:
        if part and rows + len(call[name]) > limit:
            yield part
            part, rows = [], 0
        part.append(call)
        rows += len(call[name])
    if part:
        yield part


def _join(calls: Sequence[Mapping[str, Array]], names: Sequence[str]) -> Group:
    rows = tuple(len(call[names[0]]) for call in calls)
    if len(calls) == 1:
        return Group(calls[0], rows)
    return Group({name: np.concatenate([call[name] for call in calls]) for name in names}, rows)


def split_calls(outputs: Mapping[str, Array], rows: Sequence[int]) -> list[dict[str, Array]]:
    """The outputs of each of the calls that were joined, as views.

    Raises:
        SessionError: an output has not as many rows as the inputs, against what the graph tells.
    """
    ends = list(itertools.accumulate(rows))
    for name, array in outputs.items():
        if len(array) != ends[-1]:
            raise SessionError(
                f"the output {name!r} has {len(array)} rows for {ends[-1]} rows of inputs", "Call run for each instead"
            )
    starts = [end - count for end, count in zip(ends, rows, strict=True)]
    return [
        {name: array[start:end] for name, array in outputs.items()} for start, end in zip(starts, ends, strict=True)
    ]
