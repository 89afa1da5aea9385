"""Wishes that contradict one another or make no sense, refused before any work is done."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import get_args

import numpy as np

from edgeq.converters.onnx.compare import has_classes, has_detections
from edgeq.converters.onnx.export.module_source import ModuleSource
from edgeq.errors import UsageError
from edgeq.planner.tensors.candidates import Method
from edgeq.planner.tensors.job import Calibration, Gate, TensorJob, check_patterns
from edgeq.profiles.loader import load_profile
from edgeq.queries import BOXES, LOGITS
from edgeq.tensor_types import TensorArtifact

__all__ = ["refuse_contradictions", "refuse_uncounted", "refuse_unmeasured"]

_LEAST_PERCENTILE = 50.0  # below it less than half of the numbers would stay inside a range


def refuse_contradictions(job: TensorJob) -> None:
    """Refuse what cannot be done, whatever the model is.

    Raises:
        UsageError: with the field.
        ProfileError: a device that is not known.
    """
    _refuse_numbers(job.gate, job.calibration)
    check_patterns(job.keep_float)
    _refuse_twice(job)
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


def refuse_uncounted(artifact: TensorArtifact, n_classes: int | None) -> None:
    """Refuse a detector that could not be judged, before anything is calibrated.

    Args:
        artifact: the model.
        n_classes: that it knows; None if nothing says it.

    Raises:
        UsageError: nothing says how many classes a detector has.
    """
    if has_detections(artifact.task) and n_classes is None:
        raise UsageError(
            f"Nothing says how many classes the detector has, neither config.json nor an output {LOGITS!r}",
            f"Write id2label into config.json, give ModuleSource its labels, or name the outputs {LOGITS} and {BOXES}",
        )


def _refuse_twice(job: TensorJob) -> None:
    names = [load_profile(device).name for device in (job.target, *job.also_for)]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise UsageError(f"A model is made for {name} already", "Name other devices with --also-for")


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
