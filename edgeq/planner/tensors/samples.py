"""Inputs to calibrate with and others to judge on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgeq.errors import UsageError
from edgeq.inputs import random_inputs, read_inputs
from edgeq.planner.tensors.job import Calibration
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
    artifact: TensorArtifact, folder: Path, axes: Mapping[str, AxisRange], wanted: Calibration
) -> Samples:
    """Read or draw inputs.

    Args:
        artifact: the model.
        folder: with the model's files for what comes before it.
        axes: sizes of dynamic axes; the usual ones are drawn.
        wanted: where from, and how many.

    Raises:
        UsageError: inputs of other names, shapes or types, with NaN, or too few of them.
        SourceError: a file cannot be read.
    """
    if wanted.inputs is None:
        return _drawn(artifact, axes, wanted)
    calibration = list(read_inputs(wanted.inputs, artifact, folder, wanted.samples + wanted.judged, axes=axes))
    if wanted.held_out is not None:
        judged = list(read_inputs(wanted.held_out, artifact, folder, wanted.judged, axes=axes))
        source = f"{wanted.held_out.name}, judged; {wanted.inputs.name}, calibrated"
    else:
        # Every third one, so that both halves see all of a sorted folder.
        share = max(2, round(len(calibration) / max(1, min(wanted.judged, len(calibration) // 3))))
        judged = calibration[::share]
        calibration = [call for index, call in enumerate(calibration) if index % share]
        source = f"{wanted.inputs.name}, of which {len(judged)} were held out"
    calibration = calibration[: wanted.samples]
    if min(len(calibration), len(judged)) < _FEWEST:
        raise UsageError(
            f"{wanted.inputs} leaves {len(calibration)} inputs to calibrate and {len(judged)} to judge",
            "Give at least 6, better 64",
        )
    return Samples(calibration, judged, source)


def _drawn(artifact: TensorArtifact, axes: Mapping[str, AxisRange], wanted: Calibration) -> Samples:
    count = wanted.samples + wanted.judged
    drawn = list(random_inputs(artifact, axes, count, seed=0))
    note = (
        "ranges come from random inputs, which no camera or user makes: give real ones with --calibration "
        "before a robot depends on it"
    )
    calibration, judged = drawn[: wanted.samples], drawn[wanted.samples :]
    return Samples(calibration, judged, "random inputs", (note,))
