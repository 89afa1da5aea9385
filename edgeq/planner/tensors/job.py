"""What is asked for in the conversion of a model that is called with arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from edgeq.types import Budget

__all__ = ["Calibration", "Gate", "Precision", "TensorJob"]

Precision = Literal[
    "auto", "fp32", "fp16", "int8", "int8-static", "int8-dynamic", "int8-weights", "int4-weights", "fp8"
]


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Where ranges of activations come from, and on what the result is judged.

    Attributes:
        inputs: folder of images, text file, ``.npz`` or folder of them; None for random inputs, which is noted.
        held_out: likewise, to judge on; None for the part of ``inputs`` that ranges are not taken from.
        samples: inputs that ranges are taken from.
        judged: inputs that the result is judged on.
        method: how a range follows from what was seen; ``"auto"`` tries them all and takes the nearest outputs.
        percentile: of that method.
    """

    inputs: Path | None = None
    held_out: Path | None = None
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
        min_coverage: share of multiply-adds that is truly quantized.
        max_slowdown: of the quantized model over the float one: above it the float model is shipped.
    """

    min_cosine: float = 0.995
    min_top1: float | None = None
    min_coverage: float = 0.9
    max_slowdown: float = 1.0


@dataclasses.dataclass(frozen=True)
class TensorJob:
    """One conversion.

    Attributes:
        model: a hub id, a Hugging Face folder, or an ONNX file.
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
    """

    model: str
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
