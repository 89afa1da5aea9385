"""Wishes that contradict one another or make no sense, refused before any work is done."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import get_args

import numpy as np

from edgeq.converters.onnx.compare import has_classes
from edgeq.converters.onnx.export.module_source import ModuleSource
from edgeq.errors import UsageError
from edgeq.planner.tensors.candidates import Method
from edgeq.planner.tensors.job import Calibration, Gate, TensorJob

__all__ = ["refuse_contradictions", "refuse_unmeasured"]

_LEAST_PERCENTILE = 50.0  # below it less than half of the numbers would stay inside a range


def refuse_contradictions(job: TensorJob) -> None:
    """Refuse what cannot be done, whatever the model is.

    Raises:
        UsageError: with the field.
    """
    _refuse_numbers(job.gate, job.calibration)
    if job.gate.max_metric_drop is not None and job.gate.metric is None:
        raise UsageError("A drop of the metric is limited, and there is no metric", "Give Gate(metric=function)")
    if job.calibration.held_out is not None and job.calibration.inputs is None:
        raise UsageError(
            "held_out has inputs to judge on, and there are none to calibrate with",
            "Give them with --calibration (Calibration.inputs); without --held-out a part of them is judged on",
        )
    if isinstance(job.model, ModuleSource) and (job.shapes or job.task is not None or job.revision is not None):
        raise UsageError(
            "shapes, task and revision are for models in files, and this is a module",
            "Give ModuleSource its example inputs, dynamic axes and task",
        )


def refuse_unmeasured(gate: Gate, task: str) -> None:
    """Refuse a gate that nothing could be held to.

    Args:
        gate: what is asked for.
        task: of the model.

    Raises:
        UsageError: top-1 agreement of a model whose answers are no classes.
    """
    if gate.min_top1 is not None and not has_classes(task):
        raise UsageError(
            f"min_top1 is asked for, and answers of the task {task!r} are not known to be classes",
            "Leave it out, give ModuleSource its task, or measure it yourself with Gate(metric=, max_metric_drop=)",
        )


def _refuse_numbers(gate: Gate, calibration: Calibration) -> None:
    _within("Gate.min_cosine", gate.min_cosine, 0.0, 1.0, above=True)
    shares: Mapping[str, float | None] = {
        "min_top1": gate.min_top1,
        "min_detection_map": gate.min_detection_map,
        "min_coverage": gate.min_coverage,
    }
    for name, share in shares.items():
        if share is not None:
            _within(f"Gate.{name}", share, 0.0, 1.0)
    _within("Gate.max_slowdown", gate.max_slowdown, 0.0, math.inf, above=True)
    if gate.max_metric_drop is not None:
        _within("Gate.max_metric_drop", gate.max_metric_drop, -math.inf, math.inf)
    for name, count in {"samples": calibration.samples, "judged": calibration.judged}.items():
        if not isinstance(count, (int, np.integer)) or isinstance(count, bool) or count < 1:
            raise UsageError(f"Calibration.{name} is {count!r}, not a number of inputs", "Give 1 or more, better 32")
    methods = ("auto", *get_args(Method))
    if calibration.method not in methods:
        raise UsageError(
            f"Calibration.method is {calibration.method!r}, which is not known", f"Choose one of {', '.join(methods)}"
        )
    _within("Calibration.percentile", calibration.percentile, _LEAST_PERCENTILE, 100.0, above=True)


def _within(name: str, value: object, low: float, high: float, *, above: bool = False) -> None:
    """Finite, and within limits; above the lower one if that is asked for."""
    if (
        isinstance(value, (int, float, np.integer, np.floating))
        and not isinstance(value, bool)
        and math.isfinite(value)
        and low <= value <= high
        and not (above and value <= low)
    ):
        return
    if math.isinf(low):
        wanted = "a finite number"
    elif math.isinf(high):
        wanted = f"a number above {low:g}"
    else:
        wanted = f"{'above' if above else 'from'} {low:g} {'and at most' if above else 'to'} {high:g}"
    raise UsageError(f"{name} is {value!r}, not {wanted}", "Give such a number, or leave the default")
