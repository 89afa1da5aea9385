"""What an ONNX file from elsewhere is for: by the names and shapes of its outputs, and by config.json beside it.

Names are those that transformers gives, and exporters keep. What is recognised is judged as an exported model is: a
detector by its boxes, a classifier by its classes too. Anything else stays a model that answers with plain arrays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgeq.converters.json_files import read_json_object
from edgeq.converters.onnx.export.embedding import class_count, class_labels
from edgeq.errors import SourceError
from edgeq.queries import BOXES, LOGITS
from edgeq.tensor_types import TensorSpec

__all__ = ["Recognised", "recognise"]

_UNKNOWN = "tensor"
_BOX_NUMBERS = 4  # centre and size
_IMAGE_RANK = 4  # (batch, channels, height, width)
_CHANNELS = (1, 3, 4)
_TOKENS = "input_ids"


@dataclasses.dataclass(frozen=True)
class Recognised:
    """What is known of a model beside its graph.

    Attributes:
        task: as in `edgeq.tensor_types.TensorArtifact.task`.
        labels: of its classes, if they have names.
        n_classes: that it knows; None where nothing says it.
        notes: what a user must know, one line each.
    """

    task: str = _UNKNOWN
    labels: tuple[str, ...] = ()
    n_classes: int | None = None
    notes: tuple[str, ...] = ()


def recognise(folder: Path, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> Recognised:
    """The task of a graph.

    A detector needs its number of classes, since the last column of its logits may be a class or stand for "nothing":
    without config.json, or with one that does not fit, it stays unknown, and a note says so. A classifier without has
    classes without names.

    Args:
        folder: that the file lies in.
        inputs: of the graph.
        outputs: likewise.

    Raises:
        SourceError: the config.json of a detector cannot be read.
    """
    found = {spec.name: spec for spec in outputs}
    logits, boxes = found.get(LOGITS), found.get(BOXES)
    if logits is None or not logits.dtype.startswith("float"):
        return Recognised()
    if boxes is not None:
        return _detector(_config(folder), logits, boxes) if _are_queries(logits, boxes) else Recognised()
    task = _task_of_classes(inputs)
    if len(outputs) > 1 or len(logits.shape) != 2 or logits.shape[1] == 1 or task is None:
        return Recognised()
    return _classifier(task, folder, logits)


def _config(folder: Path) -> Mapping[str, Any]:
    """``config.json``, or nothing."""
    path = folder / "config.json"
    return read_json_object(path) if path.is_file() else {}


def _are_queries(logits: TensorSpec, boxes: TensorSpec) -> bool:
    return (
        len(logits.shape) == len(boxes.shape) == 3
        and boxes.shape[2] == _BOX_NUMBERS
        and boxes.dtype.startswith("float")
        and (logits.shape[1] == boxes.shape[1] or bool(_open(logits.shape[1]) or _open(boxes.shape[1])))
    )


def _classifier(task: str, folder: Path, logits: TensorSpec) -> Recognised:
    try:
        config = _config(folder)
    except SourceError as error:  # it would only name the classes
        return Recognised(task, notes=(f"The classes have no names: {error.cause}",))
    if config.get("problem_type") == "regression":
        return Recognised()
    count, columns = class_count(config), logits.shape[1]
    if count is None or columns in (count, *_open(columns)):
        return Recognised(task, class_labels(config), count)
    note = f"The classes have no names: config.json has {count}, where {logits.name} has {columns} columns"
    return Recognised(task, notes=(note,))


def _detector(config: Mapping[str, Any], logits: TensorSpec, boxes: TensorSpec) -> Recognised:
    count, columns = class_count(config), logits.shape[2]
    if count is not None and columns in (count, count + 1, *_open(columns)):
        return Recognised("object-detection", class_labels(config), count)
    why = (
        "nothing says how many classes it knows"
        if count is None
        else f"config.json has {count} classes, where {logits.name} has {columns} columns"
    )
    note = (
        f"The outputs {logits.name} and {boxes.name} are a detector's, but {why}: it is judged by plain arrays; with "
        "the model's config.json (id2label) beside the file it is judged by its boxes"
    )
    return Recognised(notes=(note,))


def _task_of_classes(inputs: Sequence[TensorSpec]) -> str | None:
    """By what is classified; None where the inputs do not say it."""
    if any(spec.name == _TOKENS for spec in inputs):
        return "text-classification"
    if len(inputs) == 1 and len(inputs[0].shape) == _IMAGE_RANK and inputs[0].shape[1] in _CHANNELS:
        return "image-classification"
    return None


def _open(size: int | str) -> tuple[str, ...]:
    """The name of an axis of any size."""
    return (size,) if isinstance(size, str) else ()
