"""Inputs to calibrate with and others to judge on."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgeq.errors import UsageError
from edgeq.inputs import check_arrays, random_inputs, read_inputs
from edgeq.planner.tensors.job import Arrays, Calibration
from edgeq.tensor_types import AxisRange, TensorArtifact

__all__ = ["Samples", "gather_samples"]

Call = Mapping[str, NDArray[np.generic]]
_FEWEST = 2  # to calibrate and to judge


@dataclasses.dataclass(frozen=True)
class Samples:
    """Inputs of a model, one call each.

    Attributes:
        calibration: what ranges of activations are taken from.
        judged: what the result is judged on; none of them is among ``calibration``.
        source: for people.
        notes: what a user must know of them.
    """

    calibration: Sequence[Call]
    judged: Sequence[Call]
    source: str
    notes: tuple[str, ...] = ()


def gather_samples(
    artifact: TensorArtifact, folder: Path | None, axes: Mapping[str, AxisRange], wanted: Calibration
) -> Samples:
    """Read or draw inputs.

    Args:
        artifact: the model.
        folder: with the model's files for what comes before it; None if there are none.
        axes: sizes of dynamic axes; the usual ones are drawn.
        wanted: where from, and how many.

    Raises:
        UsageError: inputs of other names, shapes or types, with NaN, or too few of them.
        SourceError: a file cannot be read.
    """
    if wanted.inputs is None:
        return _drawn(artifact, axes, wanted)
    count = wanted.samples if wanted.held_out is not None else wanted.samples + wanted.judged
    calibration = _given(wanted.inputs, artifact, folder, axes, count)
    if wanted.held_out is not None:
        judged = _given(wanted.held_out, artifact, folder, axes, wanted.judged)
        source = f"{_name(wanted.held_out)}, judged; {_name(wanted.inputs)}, calibrated"
    else:
        # Every third one, so that both halves see all of a sorted folder.
        share = max(2, round(len(calibration) / max(1, min(wanted.judged, len(calibration) // 3))))
        judged = calibration[::share]
        calibration = [call for index, call in enumerate(calibration) if index % share]
        source = f"{_name(wanted.inputs)}, of which {len(judged)} were held out"
    calibration = calibration[: wanted.samples]
    if wanted.held_out is not None:
        _refuse_few(wanted.held_out, len(judged), "judge on", "held_out")
        _refuse_few(wanted.inputs, len(calibration), "calibrate with", "inputs")
    if min(len(calibration), len(judged)) < _FEWEST:
        raise UsageError(
            f"{_name(wanted.inputs)} leaves {len(calibration)} inputs to calibrate and {len(judged)} to judge",
            "Give at least 6, better 64",
        )
    return Samples(calibration, judged, source)


def _refuse_few(inputs: Path | Iterable[Arrays], count: int, purpose: str, field: str) -> None:
    if count < _FEWEST:
        raise UsageError(
            f"{_name(inputs)} ({field}) has {count} inputs to {purpose}",
            f"Give at least {_FEWEST}, better 32",
        )


def _given(
    inputs: Path | Iterable[Arrays],
    artifact: TensorArtifact,
    folder: Path | None,
    axes: Mapping[str, AxisRange],
    count: int,
) -> list[Call]:
    """From files, or from calls in memory, of which the first ones count."""
    if isinstance(inputs, (str, os.PathLike)):
        return list(read_inputs(inputs, artifact, folder, count, axes=axes))
    calls: list[Call] = []
    for index, call in enumerate(itertools.islice(inputs, count)):
        if not isinstance(call, Mapping):
            raise UsageError(
                f"call {index} is a {type(call).__name__}, not a mapping of inputs to arrays",
                f"Give calls such as {{{artifact.inputs[0].name!r}: array}}",
            )
        check_arrays(call, artifact.inputs, axes, finite=True, source=f"call {index}")
        calls.append(dict(call))
    return calls


def _name(inputs: Path | Iterable[Arrays]) -> str:
    return Path(inputs).name if isinstance(inputs, (str, os.PathLike)) else "calls in memory"


def _drawn(artifact: TensorArtifact, axes: Mapping[str, AxisRange], wanted: Calibration) -> Samples:
    count = wanted.samples + wanted.judged
    drawn = list(random_inputs(artifact, axes, count, seed=0))
    note = (
        "calibrated and judged on random inputs, which no camera or user makes: give real ones with --calibration "
        "before a robot depends on it"
    )
    calibration, judged = drawn[: wanted.samples], drawn[wanted.samples :]
    return Samples(calibration, judged, "random inputs", (note,))
