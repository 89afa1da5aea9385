"""Ways to compute one model, each written, compared with the float model, and looked into for what is quantized."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from edgeq.converters.onnx.calibration.collect import collect_by_method
from edgeq.converters.onnx.calibration.ranges import Range
from edgeq.converters.onnx.compare import compare_outputs
from edgeq.converters.onnx.quantize.channels import sample_channels
from edgeq.converters.onnx.quantize.coverage import coverage, write_executed
from edgeq.converters.onnx.quantize.dynamic import quantize_dynamic
from edgeq.converters.onnx.quantize.fp8 import fp8_tensors, quantize_fp8
from edgeq.converters.onnx.quantize.half import to_half
from edgeq.converters.onnx.quantize.smooth import channel_tensors, smooth
from edgeq.converters.onnx.quantize.static import calibration_tensors, quantize_static
from edgeq.converters.onnx.quantize.weights_only import quantize_weights
from edgeq.planner.tensors.samples import Samples
from edgeq.tensor_types import Coverage, Scheme, TensorQuality

__all__ = ["DISABLED_OPTIMIZERS", "METHODS", "MODEL_FILE", "Candidate", "Method", "Workbench"]

MODEL_FILE = "model.onnx"
# ONNX Runtime's fused kernel takes five times what LayerNormalization and a sum take (1.31, x86-64 and 128 x 768).
DISABLED_OPTIMIZERS = ("SkipLayerNormFusion",)
_SMOOTHING_INPUTS = 8

Progress = Callable[[str, int, int, str], None]
Method = Literal["minmax", "percentile", "entropy", "mse"]
METHODS: tuple[Method, ...] = ("minmax", "percentile", "entropy", "mse")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way.

    Attributes:
        scheme: of most of its weights.
        path: the ONNX file; data beside it.
        label: for people and as a folder's name.
        activations: of INT8.
        float_nodes: that could be quantized and were not, with the reason.
        quality: against the float model; None for the float model itself.
        coverage: None for the float model.
    """

    scheme: Scheme
    path: Path
    label: str
    activations: Literal["u8", "s8"] | None = None
    float_nodes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    quality: TensorQuality | None = None
    coverage: Coverage | None = None


@dataclasses.dataclass(frozen=True)
class Workbench:
    """The float model, inputs, and where candidates are made.

    Attributes:
        reference: the float model, cleaned for the backend: what is judged against, and shipped if nothing is better.
        model: what is quantized: the same, or one that computes the same and is smoother.
        suffix: of labels, for the latter.
        folder: for candidates.
        backend: that they are made for.
        activations: of INT8 there.
        samples: to calibrate with and to judge on.
        task: of the model, for what is compared.
        classes: that it knows; None if it has none.
        dims: usual sizes of dynamic axes.
        percentile: of that method of calibration.
        threads: to calibrate and judge with.
        progress: told stage, amount done, amount in all, and a detail.
    """

    reference: Path
    model: Path
    folder: Path
    backend: str
    activations: Literal["u8", "s8"]
    samples: Samples
    task: str
    classes: int | None
    dims: Mapping[str, int]
    percentile: float
    threads: int
    progress: Progress
    narrow_weights: bool = False
    suffix: str = ""

    def smoothed(self) -> Workbench | None:
        """Outliers of activations moved into weights, or kept in floats by themselves (SmoothQuant); None without any.

        The model computes the same; only rounding gets easier.
        """
        tensors = channel_tensors(self.model, paid=True)
        if not tensors or self.suffix:
            return None
        self.progress("smooth", 0, 1, "")
        folder = self.folder / "smooth"
        folder.mkdir(parents=True, exist_ok=True)
        samples = sample_channels(
            self.model, tensors, self.samples.calibration[:_SMOOTHING_INPUTS], threads=self.threads
        )
        changed = smooth(self.model, folder / MODEL_FILE, samples, paid=True)
        if not changed:
            return None
        return dataclasses.replace(self, model=folder / MODEL_FILE, folder=folder / "candidates", suffix="-smooth")

    def ranges(self, methods: Sequence[Method] = METHODS) -> dict[Method, dict[str, Range]]:
        """Of every value that static quantization asks for, by each method in one pass."""
        return self._ranges_of(calibration_tensors(self.model, self.backend), methods)

    def _ranges_of(self, tensors: Sequence[str], methods: Sequence[Method]) -> dict[Method, dict[str, Range]]:
        return collect_by_method(
            self.model,
            tensors,
            self.samples.calibration,
            methods=methods,
            percentile=self.percentile,
            symmetric=self.activations == "s8",
            threads=self.threads,
            progress=lambda done, total, what: self.progress("calibrate", done, total, what),
        )

    def float_model(self) -> Candidate:
        """Nothing is changed."""
        return Candidate("fp32", self.reference, "fp32")

    def static(self, ranges: Mapping[str, Range], keep_float: Mapping[str, str], label: str) -> Candidate:
        """INT8 by calibrated ranges."""
        path, kept = self._path(label), frozenset(keep_float)
        if self.backend == "onnxruntime-cpu":
            quantize_static(
                self.model, path, ranges, backend=self.backend, activations=self.activations, keep_float=kept
            )
        else:
            self._halved(
                path,
                lambda out: quantize_static(
                    self.model, out, ranges, backend=self.backend, activations=self.activations, keep_float=kept
                ),
            )
        return self.judged(Candidate("int8-static", path, label + self.suffix, self.activations, dict(keep_float)))

    def dynamic(self, keep_float: Mapping[str, str]) -> Candidate:
        """INT8 by the range of each call."""
        path = self._path("int8-dynamic")
        quantize_dynamic(self.model, path, keep_float=frozenset(keep_float), narrow_weights=self.narrow_weights)
        return self.judged(Candidate("int8-dynamic", path, f"int8-dynamic{self.suffix}", "u8", dict(keep_float)))

    def other(self, scheme: Scheme, keep_float: Mapping[str, str]) -> Candidate:
        """The schemes that leave nothing to decide: FP16, FP8, weights alone."""
        path = self.written(scheme, keep_float)
        return self.judged(Candidate(scheme, path, scheme, float_nodes=dict(keep_float)))

    def written(self, scheme: Scheme, keep_float: Mapping[str, str] | None = None) -> Path:
        """The file of such a scheme, not judged: ONNX Runtime on a CPU may not run it."""
        path, kept = self._path(scheme), frozenset(keep_float or {})
        if scheme == "fp16":
            to_half(self.model, path, keep_float=kept)
        elif scheme == "fp8":
            ranges = self._ranges_of(fp8_tensors(self.model), ("minmax",))["minmax"]
            self._halved(path, lambda out: quantize_fp8(self.model, out, ranges, keep_float=kept))
        else:
            quantize_weights(self.model, path, bits=8 if scheme == "int8-weights" else 4, keep_float=kept)
        return path

    def _halved(self, path: Path, write: Callable[[Path], None]) -> None:
        """What is not quantized in FP16: a GPU computes it faster, and Turing no other way."""
        grids = path.with_name("grids") / MODEL_FILE
        grids.parent.mkdir(exist_ok=True)
        write(grids)
        to_half(grids, path)
        shutil.rmtree(grids.parent)

    def judged(self, candidate: Candidate) -> Candidate:
        """With its accuracy and coverage."""
        self.progress("judge", 0, 1, candidate.label)
        found = compare_outputs(
            self.reference,
            candidate.path,
            self.samples.judged,
            task=self.task,
            classes=self.classes,
            threads=self.threads,
        )
        quality = found.quality(self.samples.source)
        return dataclasses.replace(candidate, quality=quality, coverage=self._coverage(candidate))

    def _coverage(self, candidate: Candidate) -> Coverage:
        if self.backend != "onnxruntime-cpu":
            return coverage(candidate.path, executed=None, dims=self.dims)
        executed = candidate.path.with_name("executed") / MODEL_FILE
        executed.parent.mkdir()
        signed = candidate.activations == "s8"
        write_executed(candidate.path, executed, dims=self.dims, disabled_optimizers=DISABLED_OPTIMIZERS, signed=signed)
        found = coverage(candidate.path, executed=executed, dims=self.dims)
        shutil.rmtree(executed.parent)
        return found

    def _path(self, label: str) -> Path:
        folder = self.folder / label
        folder.mkdir(parents=True, exist_ok=True)
        return folder / MODEL_FILE
