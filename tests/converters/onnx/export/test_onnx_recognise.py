"""What an ONNX file from elsewhere is for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from edgeq.converters.onnx.export.adopt import adopt_onnx
from edgeq.converters.onnx.export.export import export_model
from edgeq.converters.onnx.export.recognise import recognise
from edgeq.errors import SourceError
from edgeq.tensor_types import TensorSpec

PIXELS = TensorSpec(name="pixel_values", dtype="float32", shape=("batch", 3, 64, 64))
TOKENS = TensorSpec(name="input_ids", dtype="int64", shape=("batch", "sequence"))
THREE = {"id2label": {"0": "cup", "1": "door", "2": "person"}}


def _logits(*shape: int | str, dtype: str = "float32") -> TensorSpec:
    return TensorSpec(name="logits", dtype=dtype, shape=shape)


def _boxes(*shape: int | str) -> TensorSpec:
    return TensorSpec(name="pred_boxes", dtype="float32", shape=shape)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(THREE))
    return tmp_path


@pytest.mark.parametrize(
    ("logits", "boxes"),
    [
        (("batch", 7, 4), ("batch", 7, 4)),  # "nothing" has the last column
        ((1, 300, 3), (1, 300, 4)),  # each class by itself
        (("batch", "queries", "classes"), ("batch", 100, 4)),
    ],
)
def test_a_detector_with_its_config_is_one(
    folder: Path, logits: tuple[int | str, ...], boxes: tuple[int | str, ...]
) -> None:
    found = recognise(folder, [PIXELS], [_boxes(*boxes), _logits(*logits)])
    assert (found.task, found.n_classes, found.labels) == ("object-detection", 3, ("cup", "door", "person"))
    assert found.notes == ()


def test_a_detector_whose_classes_are_not_known_stays_arrays_and_says_so(tmp_path: Path) -> None:
    outputs = [_logits(1, 7, 4), _boxes(1, 7, 4)]
    found = recognise(tmp_path, [PIXELS], outputs)
    assert (found.task, found.n_classes) == ("tensor", None)
    assert "nothing says how many classes it knows" in found.notes[0]
    (tmp_path / "config.json").write_text(json.dumps({"num_labels": 80}))
    found = recognise(tmp_path, [PIXELS], outputs)
    assert found.task == "tensor"
    assert "config.json has 80 classes, where logits has 4 columns" in found.notes[0]
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SourceError, match=r"config\.json is no valid JSON"):
        recognise(tmp_path, [PIXELS], outputs)


@pytest.mark.parametrize(
    "outputs",
    [
        [_logits(1, 7, 4), _boxes(1, 8, 4)],
        [_logits(1, 7, 4), _boxes(1, 7, 5)],
        [_logits(7, 4), _boxes(7, 4)],
        [_logits(1, 7, 4, dtype="int64"), _boxes(1, 7, 4)],
        [_boxes(1, 7, 4)],
        [_logits("batch", 7, 4)],  # a class for each of seven things
        [_logits("batch", 1)],  # one number is a measure, and no class
        [_logits("batch", 3), TensorSpec(name="hidden", dtype="float32", shape=("batch", 8))],
    ],
)
def test_other_outputs_are_plain_arrays(folder: Path, outputs: list[TensorSpec]) -> None:
    found = recognise(folder, [PIXELS], outputs)
    assert (found.task, found.labels, found.notes) == ("tensor", (), ())


@pytest.mark.parametrize(
    ("inputs", "task"),
    [
        ([PIXELS], "image-classification"),
        (
            [TOKENS, TensorSpec(name="attention_mask", dtype="int64", shape=("batch", "sequence"))],
            "text-classification",
        ),
        ([TensorSpec(name="state", dtype="float32", shape=("batch", 8))], "tensor"),
        ([PIXELS, TensorSpec(name="state", dtype="float32", shape=("batch", 8))], "tensor"),
    ],
)
def test_classes_of_what_is_classified(tmp_path: Path, inputs: list[TensorSpec], task: str) -> None:
    found = recognise(tmp_path, inputs, [_logits("batch", 3)])
    assert (found.task, found.labels, found.n_classes) == (task, (), None)


def test_labels_come_from_a_config_that_fits(folder: Path) -> None:
    assert recognise(folder, [PIXELS], [_logits("batch", 3)]).labels == ("cup", "door", "person")
    other = recognise(folder, [PIXELS], [_logits("batch", 1000)])
    assert (other.task, other.labels) == ("image-classification", ())
    assert other.notes == ("The classes have no names: config.json has 3, where logits has 1000 columns",)
    (folder / "config.json").write_text(json.dumps({**THREE, "problem_type": "regression"}))
    assert recognise(folder, [PIXELS], [_logits("batch", 3)]).task == "tensor"
    (folder / "config.json").write_text("{")
    broken = recognise(folder, [PIXELS], [_logits("batch", 3)])
    assert broken.task == "image-classification"
    assert "no valid JSON" in broken.notes[0]


def test_an_adopted_detector_is_what_an_exported_one_is(tiny_model: Any, tmp_path: Path) -> None:
    model = tiny_model("yolos")
    exported = export_model(model, tmp_path / "exported.onnx", task=None, shapes={"pixel_values": (1, 3, 32, 48)})
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(exported.path, elsewhere / "det.onnx")
    alone = adopt_onnx(elsewhere / "det.onnx", tmp_path / "alone.onnx")
    assert alone.artifact.task == "tensor"
    assert any("beside the file" in note for note in alone.notes)
    shutil.copy(model / "config.json", elsewhere / "config.json")
    adopted = adopt_onnx(elsewhere / "det.onnx", tmp_path / "adopted.onnx")
    assert adopted.artifact.task == exported.artifact.task == "object-detection"
    assert adopted.artifact.labels == exported.artifact.labels
    assert adopted.n_classes == exported.n_classes
    assert not any("beside the file" in note for note in adopted.notes)
