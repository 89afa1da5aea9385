"""Ways to compute one model, each written, compared with the float model, and looked into for what is quantized."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.onnx.calibration.collect import collect_by_method
from edgeq.converters.onnx.calibration.ranges import Range
from edgeq.converters.onnx.compare import CandidateError, Derived, Metric, compare_outputs
from edgeq.converters.onnx.quantize.bias_correction import channel_means
from edgeq.converters.onnx.quantize.channels import sample_channels
from edgeq.converters.onnx.quantize.sites import quantizable
from edgeq.converters.onnx.quantize.smooth import channel_tensors, smooth
from edgeq.converters.onnx.quantize.static import is_tensorrt
from edgeq.errors import ConversionError
from edgeq.planner.tensors.accuracy import SENTENCE
from edgeq.planner.tensors.overflow import too_large_for_half
from edgeq.planner.tensors.samples import Samples
from edgeq.planner.tensors.sentences import sentence_vectors
from edgeq.planner.tensors.writing import (
    DISABLED_OPTIMIZERS,
    MODEL_FILE,
    Dialect,
    Evidence,
    coverage_of,
    tensors_to_range,
    write_floats,
    write_scheme,
    write_stand_in,
)
from edgeq.tensor_types import Coverage, Embedding, Scheme, TensorQuality

__all__ = ["METHODS", "Candidate", "Method", "Workbench"]

_SMOOTHING_INPUTS = 32
_OVERFLOW_INPUTS = 8

Progress = Callable[[str, int, int, str], None]
Method = Literal["minmax", "percentile", "entropy", "mse"]
METHODS: tuple[Method, ...] = ("minmax", "percentile", "entropy", "mse")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way.

    Attributes:
        scheme: of most of its weights.
        path: the ONNX file; data beside it.
        stand_in: what a CPU computes in its place, with the same roundings; None where it computes the file itself.
        label: for people and as a folder's name.
        activations: of INT8.
        float_nodes: that could be quantized and were not, with the reason.
        quality: against the float model; None for the float model itself, and where there is a failure.
        failure: why it cannot be compared with the float model at all; None if it can.
        coverage: None for the float model, and where there is a failure.
        kept_share: of the multiply-adds, that of ``float_nodes``.
        variant_of: label of the candidate that this one must be surely faster than; None if there is none.
        disabled_optimizers: of ONNX Runtime, when it runs.
        predicted_ms: of a call, from times of single kernels; None if they were not asked for.
        made_from: the float model whose nodes were quantized, perhaps a smoothed one; None for the float model itself.
        notes: what a user must know of it.
    """

    scheme: Scheme
    path: Path
    label: str
    activations: Literal["u8", "s8"] | None = None
    float_nodes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    quality: TensorQuality | None = None
    failure: str | None = None
    coverage: Coverage | None = None
    kept_share: float = 0.0
    variant_of: str | None = None
    disabled_optimizers: tuple[str, ...] = DISABLED_OPTIMIZERS
    predicted_ms: float | None = None
    made_from: Path | None = None
    notes: tuple[str, ...] = ()
    stand_in: Path | None = None

    @property
    def on_cpu(self) -> Path:
        """What a CPU computes."""
        return self.stand_in or self.path


@dataclasses.dataclass(frozen=True)
class Workbench:
    """The float model, inputs, and where candidates are made.

    Attributes:
        reference: the float model in the form that the backend computes fastest: what is judged against, and shipped if
            nothing is better.
        model: what is quantized, cleaned for the backend: it computes the same, and may be smoother.
        folder: for candidates.
        dialect: what the device wants of a graph.
        samples: to calibrate with and to judge on.
        task: of the model, for what is compared.
        classes: that it knows; None if it has none.
        dims: usual sizes of dynamic axes.
        percentile: of that method of calibration.
        threads: to calibrate and judge with.
        progress: told stage, amount done, amount in all, and a detail.
        suffix: of labels, where ``model`` is a smoother one.
        exported: the float model as it was before it was cleaned; None if there is no other.
        metric: the user's own measure of a call.
        embedding: how a text encoder's hidden states become vectors; None for other models.
    """

    reference: Path
    model: Path
    folder: Path
    dialect: Dialect
    samples: Samples
    task: str
    classes: int | None
    dims: Mapping[str, int]
    percentile: float
    threads: int
    progress: Progress
    suffix: str = ""
    exported: Path | None = None
    metric: Metric | None = None
    embedding: Embedding | None = None

    @functools.cached_property
    def smoothed(self) -> Workbench | None:
        """With outliers of activations moved into weights where that costs nothing (SmoothQuant); None without any.

        The model computes the same, node by node; only rounding gets easier.
        """
        return self._smoothed(channel_tensors(self.model), "smooth", paid=False)

    @functools.cached_property
    def smoothed_at_a_price(self) -> Workbench | None:
        """Likewise, and where it takes a node more; None where that is nowhere."""
        tensors = channel_tensors(self.model, paid=True)
        if len(tensors) == len(channel_tensors(self.model)):
            return None
        return self._smoothed(tensors, "smoother", paid=True)

    @functools.cached_property
    def floats(self) -> Path:
        """``model`` in the form that the backend computes fastest; its kernels are timed against those of 8 bits."""
        if not self.suffix:
            return self.reference
        return write_floats(self.model, self.folder / "floats" / MODEL_FILE, self.dialect)

    def _smoothed(self, tensors: Sequence[str], name: str, *, paid: bool) -> Workbench | None:
        if not tensors or self.suffix:
            return None
        self.progress("smooth", 0, 1, name)
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        samples = sample_channels(
            self.model, tensors, self.samples.calibration[:_SMOOTHING_INPUTS], threads=self.threads
        )
        if not smooth(self.model, folder / MODEL_FILE, samples, paid=paid):
            return None
        return dataclasses.replace(self, model=folder / MODEL_FILE, folder=folder / "candidates", suffix=f"-{name}")

    def ranges(self, methods: Sequence[Method] = METHODS) -> dict[Method, dict[str, Range]]:
        """Of every value that static quantization asks for, by each method in one pass."""
        return self._ranges_of(tensors_to_range(self.model, "int8-static", self.dialect), methods)

    def completed(
        self, ranges: Mapping[str, Range], method: Method, keep_float: Mapping[str, str]
    ) -> Mapping[str, Range]:
        """With the ranges of values that become grids only because some nodes stay in floats."""
        kept = frozenset(keep_float)
        asked = tensors_to_range(self.model, "int8-static", self.dialect, kept) if kept else ()
        missing = [name for name in asked if name not in ranges]
        return {**ranges, **self._ranges_of(missing, (method,))[method]} if missing else ranges

    @functools.cached_property
    def fp8_ranges(self) -> Mapping[str, Range]:
        """Of every value that FP8 asks for: the whole range, since FP8's steps are relative."""
        return self._ranges_of(tensors_to_range(self.model, "fp8", self.dialect), ("minmax",))["minmax"]

    def _ranges_of(self, tensors: Sequence[str], methods: Sequence[Method]) -> dict[Method, dict[str, Range]]:
        if not tensors:
            raise ConversionError("The model has no node that could be quantized", "Choose --precision auto or fp32")
        return collect_by_method(
            self.model,
            tensors,
            self.samples.calibration,
            methods=methods,
            percentile=self.percentile,
            symmetric=is_tensorrt(self.dialect.backend),  # all others have zero points
            threads=self.threads,
            progress=lambda done, total, what: self.progress("calibrate", done, total, what),
        )

    def float_model(self) -> Candidate:
        """Nothing is changed."""
        return Candidate("fp32", self.reference, "fp32")

    def static(self, ranges: Mapping[str, Range], keep_float: Mapping[str, str], label: str) -> Candidate:
        """INT8 by calibrated ranges."""
        path, notes = self._written("int8-static", keep_float, label, ranges)
        kind = self.dialect.activations
        return self.judged(Candidate("int8-static", path, label + self.suffix, kind, dict(keep_float), notes=notes))

    def dynamic(self, keep_float: Mapping[str, str], label: str = "int8-dynamic") -> Candidate:
        """INT8 by the range of each call."""
        path, _ = self._written("int8-dynamic", keep_float, label)
        return self.judged(Candidate("int8-dynamic", path, label + self.suffix, "u8", dict(keep_float)))

    def other(self, scheme: Scheme, keep_float: Mapping[str, str], label: str | None = None) -> Candidate:
        """The schemes without ranges to choose: FP16, BF16, FP8, weights alone."""
        name = label or scheme
        path, notes = self._written(scheme, keep_float, name, self.fp8_ranges if scheme == "fp8" else None)
        made = Candidate(scheme, path, name + self.suffix, float_nodes=dict(keep_float), notes=notes)
        stand_in = write_stand_in(scheme, path, self.folder / f"{name}-stand-in")
        return self.judged(dataclasses.replace(made, stand_in=stand_in))

    def written(self, scheme: Scheme) -> Path:
        """The file of such a scheme, not judged: ONNX Runtime on a CPU may not run it."""
        return self._written(scheme, {}, scheme, self.fp8_ranges if scheme == "fp8" else None)[0]

    def _written(
        self, scheme: Scheme, keep_float: Mapping[str, str], label: str, ranges: Mapping[str, Range] | None = None
    ) -> tuple[Path, tuple[str, ...]]:
        """The file, and notes."""
        path = self.folder / label / MODEL_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        evidence = Evidence(
            ranges=ranges or {},
            means=self.means if scheme == "int8-static" else None,
            too_large=self.too_large if self.dialect.on_gpu and scheme != "bf16" else {},
        )
        kept = frozenset(keep_float)
        return path, write_scheme(scheme, self.model, path, self.dialect, kept=kept, evidence=evidence)

    @functools.cached_property
    def means(self) -> Mapping[str, NDArray[np.float64]]:
        """Of what convolutions read, to take back by biases what rounding their weights shifts."""
        self.progress("means", 0, 1, "")
        return channel_means(self.model, self.samples.calibration, threads=self.threads)

    @functools.cached_property
    def too_large(self) -> Mapping[str, float]:
        """Values that FP16 cannot hold, by what calibration shows."""
        self.progress("overflow", 0, 1, "")
        return too_large_for_half(self.model, self.samples.calibration[:_OVERFLOW_INPUTS], threads=self.threads)

    def judged(self, candidate: Candidate) -> Candidate:
        """With its accuracy and coverage, or with its failure if it cannot be loaded or gives other shapes."""
        self.progress("judge", 0, 1, candidate.label)
        try:
            found = compare_outputs(
                self.reference,
                candidate.on_cpu,
                self.samples.judged,
                task=self.task,
                classes=self.classes,
                threads=self.threads,
                metric=self.metric,
                derived=self._derived(),
            )
            covered = self._coverage(candidate.path)
        except CandidateError as error:
            return dataclasses.replace(candidate, failure=error.cause)
        return dataclasses.replace(
            candidate,
            quality=found.quality(self.samples.source),
            coverage=covered,
            kept_share=self.share(candidate.float_nodes.keys()),
            made_from=self.model,
        )

    def _derived(self) -> dict[str, Derived]:
        """What is compared beside the outputs: the vectors of whole texts."""
        embedding = self.embedding
        if embedding is None:
            return {}
        return {SENTENCE: lambda inputs, outputs: sentence_vectors(inputs, outputs, embedding)}

    def share(self, names: Set[str]) -> float:
        """Of these nodes in the multiply-adds of all that could be quantized, 0 to 1."""
        if not names:
            return 0.0
        work = {site.name: site.macs or site.weights for site in quantizable(self.model)}
        return sum(amount for name, amount in work.items() if name in names) / max(sum(work.values()), 1)

    def _coverage(self, model: Path) -> Coverage:
        try:
            return coverage_of(model, self.dialect, self.dims)
        except ConversionError as error:  # with the usual sizes given it may refuse what it has just run without them
            raise CandidateError(error.cause, error.remedy) from error
