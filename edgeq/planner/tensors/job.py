"""What is asked for in the conversion of a model that is called with arrays."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from numpy.typing import NDArray

from edgeq.converters.onnx.compare import Metric
from edgeq.converters.onnx.export.module_source import ModuleSource
from edgeq.errors import UsageError
from edgeq.types import Budget

__all__ = ["Arrays", "Calibration", "Gate", "Precision", "TensorJob", "check_patterns"]

Arrays = Mapping[str, NDArray[Any]]
"""One call: an array for each input, or for each output."""

Precision = Literal[
    "auto", "fp32", "fp16", "bf16", "int8", "int8-static", "int8-dynamic", "int8-weights", "int4-weights", "fp8"
]


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Where ranges of activations come from, and on what the result is judged.

    Attributes:
        inputs: folder of images, text file, ``.npz`` or folder of them; or calls in memory, an array for each input;
            None for random inputs, which is noted.
        held_out: likewise, to judge on; None for the part of ``inputs`` that ranges are not taken from.
        samples: inputs that ranges are taken from.
        judged: inputs that the result is judged on.
        method: how a range follows from what was seen; ``"auto"`` tries them all and takes the nearest outputs.
        percentile: of that method.
    """

    inputs: Path | Iterable[Arrays] | None = None
    held_out: Path | Iterable[Arrays] | None = None
    samples: int = 64
    judged: int = 32
    method: Literal["auto", "minmax", "percentile", "entropy", "mse"] = "auto"
    percentile: float = 99.99


@dataclasses.dataclass(frozen=True)
class Gate:
    """What a quantized model must keep to be shipped.

    Attributes:
        min_cosine: mean cosine of every output to the float model's.
        min_top1: share of inputs with the same class; None to leave it free.
        min_detection_map: of detectors, instead of cosines: mean average precision with what the float model detects
            as the truth, over overlaps from 0.5 to 0.95.
        min_coverage: share of multiply-adds that is truly quantized.
        max_slowdown: of the quantized model over the float one: above it the float model is shipped.
        metric: the user's own measure of a call, the larger the better: its index, its inputs and a model's outputs,
            both as mappings of arrays, to a number. The mean over the judged inputs is recorded in the bundle, of
            the float model too. ``Calibration.held_out`` tells which input an index is.
        max_metric_drop: of its mean below the float model's; None to record it only.
    """

    min_cosine: float = 0.995
    min_top1: float | None = None
    min_detection_map: float = 0.8
    min_coverage: float = 0.9
    max_slowdown: float = 1.0
    metric: Metric | None = None
    max_metric_drop: float | None = None


@dataclasses.dataclass(frozen=True)
class TensorJob:
    """One conversion of a model that is called with arrays, for `edgeq.convert_tensor`.

    ::

        job = edgeq.TensorJob(
            model="./resnet-50",
            target="jetson-orin",
            calibration=edgeq.Calibration(inputs=Path("photos")),
            gate=edgeq.Gate(min_cosine=0.999, min_top1=0.98),
        )
        bundle = edgeq.convert_tensor(job, "camera.edgeq")

    Attributes:
        model: a hub id, a Hugging Face folder, an ONNX file, or a module in memory.
        target: a device profile's name or file.
        budget: overrides the profile's, line by line.
        task: as transformers' pipelines call it; None for what config.json says.
        shapes: input to its fixed sizes; empty for dynamic axes.
        precision: ``"auto"`` for the fastest that passes the gate.
        backend: None for the profile's first that runs ONNX models.
        calibration: see `Calibration`.
        gate: see `Gate`.
        keep_float: names of nodes, or regular expressions, that stay in floats.
        threads: of a call; None for the profile's.
        revision: of a hub id.
        power_mode: of the device.
        also_for: other devices, as ``target``: the bundle then holds a graph for each, made for it alone, and
            `edgeq.load` takes the one that fits. ``backend`` and ``power_mode`` are of ``target`` only.
    """

    model: str | ModuleSource
    target: str
    budget: Budget = dataclasses.field(default_factory=Budget)
    task: str | None = None
    shapes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    precision: Precision = "auto"
    backend: str | None = None
    calibration: Calibration = dataclasses.field(default_factory=Calibration)
    gate: Gate = dataclasses.field(default_factory=Gate)
    keep_float: tuple[str, ...] = ()
    threads: int | None = None
    revision: str | None = None
    power_mode: str | None = None
    also_for: tuple[str, ...] = ()


def check_patterns(patterns: Iterable[str]) -> None:
    """Refuse what is no regular expression in `TensorJob.keep_float`.

    Raises:
        UsageError: with the pattern.
    """
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:  # noqa: PERF203 - each names its pattern
            raise UsageError(f"--keep-float {pattern!r} is no regular expression: {error}", "Correct it") from error
