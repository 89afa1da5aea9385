"""What a model would take in each precision, counted in files that are written for nothing else.

What a graph holds does not depend on where the ranges of its activations lie, so a range made up stands for a
calibrated one: sizes and coverage are those of a conversion, its numbers are not.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from edgeq.converters.onnx.calibration.ranges import Range
from edgeq.errors import ConversionError
from edgeq.planner.tensors.predict import predict
from edgeq.planner.tensors.prepare import Prepared
from edgeq.planner.tensors.writing import (
    DISABLED_OPTIMIZERS,
    MODEL_FILE,
    Evidence,
    coverage_of,
    tensors_to_range,
    write_scheme,
)
from edgeq.record import Record
from edgeq.tensor_types import AxisRange, Coverage, Scheme, TensorPrediction

__all__ = ["TensorOption", "count_options", "predicted_of", "write_option"]

_MADE_UP = Range(-1.0, 1.0)


class TensorOption(Record, frozen=True, kw_only=True):
    """One way to compute a model.

    Attributes:
        scheme: what most of the weights compute in.
        coverage: that would be reached; None for floats, and where it cannot be.
        predicted: what it would take; None where it cannot be.
        reason: why it cannot be, or would not be taken; None if nothing speaks against it before it is judged.
        notes: on the prediction.
    """

    scheme: Scheme
    coverage: Coverage | None = None
    predicted: TensorPrediction | None = None
    reason: str | None = None
    notes: tuple[str, ...] = ()


def count_options(
    prepared: Prepared, schemes: Sequence[Scheme], keep_float: Mapping[str, str], folder: Path
) -> tuple[TensorOption, ...]:
    """One after the other, so that one file at a time takes room.

    Args:
        prepared: the model and the device.
        schemes: to count.
        keep_float: nodes that the user wants in floats.
        folder: for files; nothing stays there.
    """
    found: list[TensorOption] = []
    for scheme in schemes:
        prepared.bench.progress("count", len(found), len(schemes), scheme)
        found.append(_count(prepared, scheme, keep_float, folder))
    return tuple(found)


def _count(prepared: Prepared, scheme: Scheme, keep_float: Mapping[str, str], folder: Path) -> TensorOption:
    """Write a scheme's file, count it, and drop it."""
    place = folder / f"counted-{scheme}"
    try:
        model = write_option(prepared, scheme, keep_float, place)
        covered = None if scheme == "fp32" else coverage_of(model, prepared.bench.dialect, prepared.bench.dims)
    except ConversionError as error:
        return TensorOption(scheme=scheme, reason=error.cause)
    else:
        predicted, notes = predicted_of(prepared, model, prepared.axes)
        return TensorOption(scheme=scheme, coverage=covered, predicted=predicted, notes=notes)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def predicted_of(
    prepared: Prepared, model: Path, axes: Mapping[str, AxisRange]
) -> tuple[TensorPrediction, tuple[str, ...]]:
    """What `edgeq.planner.tensors.predict.predict` says of a file with those sizes."""
    disabled = () if prepared.backend.on_gpu else DISABLED_OPTIMIZERS
    beside = prepared.tokenizer_bytes
    return predict(model, prepared.profile, prepared.backend, axes, disabled_optimizers=disabled, beside_bytes=beside)


def write_option(prepared: Prepared, scheme: Scheme, keep_float: Mapping[str, str], folder: Path) -> Path:
    """A scheme's file with ranges made up; the float model is there already.

    Args:
        prepared: the model and the device.
        scheme: that it shall have.
        keep_float: nodes that the user wants in floats.
        folder: is made.

    Raises:
        ConversionError: the model has nothing that this scheme could quantize.
    """
    if scheme == "fp32":
        return prepared.bench.reference
    folder.mkdir(parents=True)
    bench, kept, out = prepared.bench, frozenset(keep_float), folder / MODEL_FILE
    ranges = dict.fromkeys(tensors_to_range(bench.model, scheme, bench.dialect, kept), _MADE_UP)
    write_scheme(scheme, bench.model, out, bench.dialect, kept=kept, evidence=Evidence(ranges))
    return out
