"""How near the outputs of a model are to those of the float model that it was made from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.onnx.detection import DetectionAgreement, detections_of
from edgeq.converters.onnx.feeds import Feeds, InputDigest, check_feeds, input_specs
from edgeq.converters.onnx.pieces import named_arrays
from edgeq.converters.onnx.skeleton import read_skeleton
from edgeq.errors import ConversionError, EdgeqError, SessionError, UsageError
from edgeq.profiles.onnx.session import open_onnx_session
from edgeq.queries import BOXES, LOGITS, in_order_of
from edgeq.tensor_types import OutputQuality, TensorQuality, TensorSpec

if TYPE_CHECKING:
    import onnxruntime

__all__ = [
    "Agreement",
    "CandidateError",
    "Comparison",
    "Derived",
    "Metric",
    "MetricError",
    "compare_outputs",
    "has_classes",
    "has_detections",
]

Arrays = Mapping[str, NDArray[np.generic]]
Progress = Callable[[int, int, str], None]
Metric = Callable[[int, Arrays, Arrays], float]
"""A user's own measure of one call: its index, its inputs and a model's outputs to a number; the mean is reported."""

Derived = Callable[[Arrays, Arrays], NDArray[np.generic]]
"""An array that follows from the inputs and outputs of a call, and is compared as one more output."""

# Tasks whose answer is the largest of some logits: of the last axis, but of pixels of the second.
_DECIDING = frozenset(
    {"audio-classification", "fill-mask", "image-classification", "image-segmentation", "semantic-segmentation"}
    | {"text-classification", "token-classification", "video-classification", "zero-shot-image-classification"}
)
_OF_PIXELS = frozenset({"image-segmentation", "semantic-segmentation"})
_PIXEL_RANK = 4  # (batch, classes, height, width); where queries have a mask each: (batch, queries, classes)
_DETECTION = "object-detection"
_MASK = "attention_mask"
_FAINTEST = 1e-300  # keeps the ratio of an error to a signal of zeros a number


class CandidateError(ConversionError):
    """A candidate cannot be loaded or run, or gives what cannot be compared, where the float model does its part."""


class MetricError(ConversionError):
    """The user's own measure fails, or gives no number."""


def has_classes(task: str) -> bool:
    """Whether the answers of a task are classes, so that the share of the same ones is measured."""
    return task in _DECIDING


def has_detections(task: str | None) -> bool:
    """Whether the answers of a task are detections, which are compared by boxes and classes."""
    return task == _DETECTION


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What `compare_outputs` found.

    Attributes:
        inputs: calls compared.
        outputs: one each, in the order of the model, and then those that were derived.
        top1: share of decisions that are the same: of images or texts, of tokens, or of pixels; None where the task
            has no classes.
        detection_map: mean average precision against what the float model detects; None for other tasks, and if it
            detects nothing.
        detection_iou: mean overlap with the float model's boxes, of those that find one; None likewise.
        metric: mean of the user's own measure, of the candidate and of the float model; None if none was given.
        sha256: of the inputs.
    """

    inputs: int
    outputs: tuple[OutputQuality, ...]
    top1: float | None
    detection_map: float | None
    detection_iou: float | None
    metric: tuple[float, float] | None
    sha256: str

    def quality(self, source: str) -> TensorQuality:
        """The record of a bundle.

        Args:
            source: where the inputs come from, for people.
        """
        return TensorQuality(
            inputs=self.inputs,
            outputs=self.outputs,
            top1=self.top1,
            detection_map=self.detection_map,
            detection_iou=self.detection_iou,
            metric=self.metric,
            source=source,
            sha256=self.sha256,
        )


class Agreement:
    """Running sums over two series of arrays."""

    def __init__(self) -> None:
        self.calls = 0
        self.energy = 0.0
        self.error = 0.0
        self.max_error = 0.0
        self.cosines = 0.0
        self.min_cosine = math.inf

    def update(self, reference: NDArray[np.generic], candidate: NDArray[np.generic]) -> None:
        """Take in one pair of arrays of one shape; infinite numbers of the reference are masks and left out.

        Raises:
            ValueError: shapes differ, or the candidate has NaN or infinite numbers where the reference has none.
        """
        if reference.shape != candidate.shape:
            raise ValueError(f"has the shape {list(candidate.shape)} instead of {list(reference.shape)}")
        x, y = (array.astype(np.float64).reshape(-1) for array in (reference, candidate))
        finite = np.isfinite(x)
        if not finite.all():
            x, y = x[finite], y[finite]
        if not np.isfinite(y).all():
            raise ValueError("holds NaN or infinite numbers")
        energy, product = float(x @ x), float(x @ y)
        length = math.sqrt(energy * float(y @ y))
        y -= x
        error = float(y @ y)
        cosine = min(max(product / length, -1.0), 1.0) if length else float(not error)
        self.calls += 1
        self.energy += energy
        self.error += error
        self.max_error = max(self.max_error, float(np.abs(y).max(initial=0.0)))
        self.cosines += cosine
        self.min_cosine = min(self.min_cosine, cosine)

    def judge(self, reference: NDArray[np.generic], candidate: NDArray[np.generic], what: str, index: int) -> None:
        """`update`, with an error that a user can read.

        Args:
            reference: as in `update`.
            candidate: likewise.
            what: the array, as the message calls it.
            index: of the input.

        Raises:
            CandidateError: for what `update` refuses.
        """
        try:
            self.update(reference, candidate)
        except ValueError as error:
            raise CandidateError(
                f"{what} of the quantized model {error} on input {index}",
                "Keep the node that makes it in floats, or convert the model again",
            ) from error

    @property
    def mean_cosine(self) -> float:
        """Over the calls."""
        return self.cosines / self.calls

    @property
    def noise(self) -> float:
        """Energy of the error over energy of the reference."""
        return self.error / max(self.energy, _FAINTEST)

    @property
    def sqnr_db(self) -> float | None:
        """Signal to quantization noise ratio; None without any error."""
        return -10 * math.log10(self.noise) if self.error else None


def compare_outputs(  # noqa: PLR0913 - what to judge by is optional
    reference: Path,
    candidate: Path,
    inputs: Iterable[Feeds],
    *,
    task: str | None = None,
    classes: int | None = None,
    metric: Metric | None = None,
    derived: Mapping[str, Derived] | None = None,
    threads: int = 1,
    open_session: Callable[[Path, int], onnxruntime.InferenceSession] = open_onnx_session,
    progress: Progress | None = None,
) -> Comparison:
    """Run both models on the same inputs and compare what comes out.

    Queries of detectors are a set: they are compared with the nearest ones, not with those in the same row.

    Args:
        reference: the float model.
        candidate: the model in question, with the same inputs and outputs.
        inputs: one mapping of names to arrays for each call; it is gone through once.
        task: as transformers' pipelines call it; says whether outputs are classes or detections.
        classes: that the model knows; needed for detections.
        metric: a measure of the user's own; see `Metric`.
        derived: further arrays to compare, by the name that they are reported with; see `Derived`.
        threads: of each call.
        open_session: opens both models.
        progress: told calls done, calls in all (0 if ``inputs`` does not say), and what is going on.

    Raises:
        UsageError: no inputs, or a detector whose number of classes is not given.
        ConversionError: inputs that do not fit, or a metric that fails.
        CandidateError: ONNX Runtime cannot load or run the candidate, or its outputs do not match or are not finite.
        SourceError: no sound ONNX file.
        SessionError: ONNX Runtime cannot load the float model.
        MissingPackageError: the package onnx or onnxruntime is not installed.
    """
    if has_detections(task) and classes is None:
        raise UsageError("Detections cannot be compared without the number of classes", "Say how many there are")
    specs = input_specs(read_skeleton(reference).model)
    read_skeleton(candidate)  # refuses data outside of its folder
    floats = _Model(reference, open_session(reference, threads))
    try:
        quantized = _Model(candidate, open_session(candidate, threads), CandidateError)
    except SessionError as error:
        raise CandidateError(error.cause, error.remedy) from error
    judges = _Judges(task, classes, metric, derived or {})
    total = len(inputs) if isinstance(inputs, Sized) else 0
    digest = InputDigest()
    index = -1
    for index, feeds in enumerate(inputs):
        check_feeds(feeds, specs, index)
        digest.update(feeds)
        expected, found = (model.run(feeds, specs, index) for model in (floats, quantized))
        judges.update(index, feeds, expected, found)
        if progress is not None:
            progress(index + 1, total, "Comparing with the float model")
    if index < 0:
        raise UsageError("No inputs to compare on", "Give at least one")
    return judges.comparison(digest.hexdigest())


class _Model:
    """A session, its file for messages, and the kind of its failures."""

    def __init__(
        self, path: Path, session: onnxruntime.InferenceSession, failure: type[ConversionError] = ConversionError
    ) -> None:
        self._path, self._failure = path, failure
        self._session = session
        self._inputs = {value.name for value in session.get_inputs()}
        self._outputs = [value.name for value in session.get_outputs()]

    def run(self, feeds: Feeds, specs: Sequence[TensorSpec], index: int) -> Arrays:
        if self._inputs != set(feeds):
            raise self._failure(
                f"{self._path.name} has the inputs {sorted(self._inputs)}, "
                f"the float model {sorted(spec.name for spec in specs)}",
                "Compare models that were made from one another",
            )
        try:
            made = self._session.run(self._outputs, dict(feeds))
        except Exception as error:  # ONNX Runtime's exceptions have no common base but Exception
            raise self._failure(
                f"ONNX Runtime cannot run {self._path.name} on input {index}: {' '.join(str(error).split())}",
                "Give inputs of the sizes that the model takes",
            ) from error
        return named_arrays(self._outputs, made)


class _Judges:
    """All that is summed up over the calls."""

    def __init__(
        self, task: str | None, classes: int | None, metric: Metric | None, derived: Mapping[str, Derived]
    ) -> None:
        self._decides, self._of_pixels = task is not None and has_classes(task), task in _OF_PIXELS
        self._derived = derived
        self._classes = classes if has_detections(task) else None
        self._metric = metric
        self._outputs: dict[str, Agreement] = {}
        self._same, self._decisions = 0, 0
        self._detections = DetectionAgreement()
        self._sums = [0.0, 0.0]
        self._calls = 0

    def update(self, index: int, feeds: Feeds, expected: Arrays, found: Arrays) -> None:
        missing = [name for name in expected if name not in found]
        if missing:
            raise CandidateError(
                f"The model has not the float model's output {missing[0]!r}",
                "Compare models that were made from one another",
            )
        found = in_order_of(expected, found)
        for name, array in expected.items():
            self._outputs.setdefault(name, Agreement()).judge(array, found[name], f"The output {name!r}", index)
        for name, derive in self._derived.items():
            wanted, made = derive(feeds, expected), derive(feeds, found)
            self._outputs.setdefault(name, Agreement()).judge(wanted, made, f"The {name}", index)
        if self._decides:
            self._decide(feeds, expected, found)
        if self._classes is not None:
            self._detect(expected, found, self._classes)
        if self._metric is not None:
            for place, outputs in enumerate((found, expected)):
                self._sums[place] += _measured(self._metric, index, feeds, outputs)
        self._calls += 1

    def comparison(self, sha256: str) -> Comparison:
        return Comparison(
            inputs=self._calls,
            outputs=tuple(
                OutputQuality(
                    name=name,
                    mean_cosine=one.mean_cosine,
                    min_cosine=one.min_cosine,
                    sqnr_db=one.sqnr_db,
                    max_error=one.max_error,
                )
                for name, one in self._outputs.items()
            ),
            top1=self._same / self._decisions if self._decisions else None,
            detection_map=self._detections.mean_average_precision(),
            detection_iou=self._detections.mean_overlap(),
            metric=None if self._metric is None else (self._sums[0] / self._calls, self._sums[1] / self._calls),
            sha256=sha256,
        )

    def _decide(self, feeds: Feeds, expected: Arrays, found: Arrays) -> None:
        name = LOGITS if LOGITS in expected else next(iter(expected))
        axis = 1 if self._of_pixels and expected[name].ndim == _PIXEL_RANK else -1
        same = expected[name].argmax(axis=axis) == found[name].argmax(axis=axis)
        mask = feeds.get(_MASK)
        if mask is not None and mask.shape == same.shape:  # a decision a token, and padding is none
            same = same[mask.astype(np.bool_)]
        self._same += int(same.sum())
        self._decisions += same.size

    def _detect(self, expected: Arrays, found: Arrays, n_classes: int) -> None:
        if not {LOGITS, BOXES} <= expected.keys():
            raise ConversionError(
                f"A detector with the outputs {', '.join(expected)} is not known",
                f"Name them {LOGITS} and {BOXES}, or give a metric of your own and another task",
            )
        for n in range(len(expected[LOGITS])):
            pair = [detections_of(some[LOGITS][n], some[BOXES][n], n_classes) for some in (expected, found)]
            self._detections.update(*pair)


def _measured(metric: Metric, index: int, feeds: Feeds, outputs: Arrays) -> float:
    """What the user's function says."""
    name = getattr(metric, "__name__", type(metric).__name__)
    try:
        value = float(metric(index, feeds, outputs))
    except EdgeqError:
        raise
    except Exception as error:  # whatever a user's function raises
        raise MetricError(
            f"The metric {name} failed on input {index}: {type(error).__name__}: {error}", "Repair the function"
        ) from error
    if not math.isfinite(value):
        raise MetricError(f"The metric {name} gave {value} on input {index}", "Give a finite number for each input")
    return value
