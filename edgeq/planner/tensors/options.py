"""What a model would take in each precision, counted in files that are written for nothing else.

What a graph holds does not depend on where the ranges of its activations lie, so a range made up stands for a
calibrated one: sizes and coverage are those of a conversion, its numbers are not.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from edgeq.converters.onnx.calibration.ranges import Range
from edgeq.converters.onnx.quantize.coverage import coverage, write_executed
from edgeq.converters.onnx.quantize.dynamic import quantize_dynamic
from edgeq.converters.onnx.quantize.fp8 import fp8_tensors, quantize_fp8
from edgeq.converters.onnx.quantize.half import to_half
from edgeq.converters.onnx.quantize.static import calibration_tensors, quantize_static
from edgeq.converters.onnx.quantize.weights_only import quantize_weights
from edgeq.errors import ConversionError
from edgeq.planner.tensors.candidates import DISABLED_OPTIMIZERS, MODEL_FILE
from edgeq.planner.tensors.predict import predict
from edgeq.planner.tensors.prepare import Prepared
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
        covered = None if scheme == "fp32" else _coverage(prepared, model, place)
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
    return predict(model, prepared.profile, prepared.backend, axes, disabled_optimizers=disabled)


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
    _write(prepared, scheme, folder / MODEL_FILE, frozenset(keep_float))
    return folder / MODEL_FILE


def _write(prepared: Prepared, scheme: Scheme, out: Path, kept: frozenset[str]) -> None:
    bench = prepared.bench
    if scheme == "fp16":
        to_half(bench.model, out, keep_float=kept)
    elif scheme == "int8-dynamic":
        quantize_dynamic(bench.model, out, keep_float=kept, narrow_weights=bench.narrow_weights)
    elif scheme in ("int8-weights", "int4-weights"):
        quantize_weights(bench.model, out, bits=8 if scheme == "int8-weights" else 4, keep_float=kept)
    else:
        grids = out.with_name("grids") / MODEL_FILE if prepared.backend.on_gpu else out
        grids.parent.mkdir(exist_ok=True)
        if scheme == "fp8":
            quantize_fp8(bench.model, grids, dict.fromkeys(fp8_tensors(bench.model), _MADE_UP), keep_float=kept)
        else:
            ranges = dict.fromkeys(calibration_tensors(bench.model, bench.backend, kept), _MADE_UP)
            quantize_static(
                bench.model,
                grids,
                ranges,
                backend=bench.backend,
                activations=bench.activations,
                keep_float=kept,
                narrow_weights=bench.narrow_weights,
            )
        if grids != out:
            to_half(grids, out)


def _coverage(prepared: Prepared, model: Path, folder: Path) -> Coverage:
    bench = prepared.bench
    if prepared.backend.on_gpu:
        return coverage(model, executed=None, dims=bench.dims)
    executed = folder / "executed" / MODEL_FILE
    executed.parent.mkdir()
    signed = bench.activations == "s8"
    write_executed(model, executed, dims=bench.dims, disabled_optimizers=DISABLED_OPTIMIZERS, signed=signed)
    return coverage(model, executed=executed, dims=bench.dims)
