"""What models are fed: sizes from their files, axes that stay open, and shapes by the user."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeq.converters.onnx.export.inputs import image_size, plan_inputs
from edgeq.converters.onnx.export.tasks import model_task
from edgeq.errors import UnsupportedModelError, UsageError

_BERT = {
    "architectures": ["BertForSequenceClassification"],
    "vocab_size": 50,
    "type_vocab_size": 2,
    "max_position_embeddings": 64,
}
_BERT_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "labels")
_VIT = {"architectures": ["ViTForImageClassification"], "image_size": 32, "num_channels": 3}
_VIT_INPUTS = ("pixel_values", "interpolate_pos_encoding")


def _with_processor(folder: Path, settings: dict[str, Any]) -> Path:
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize(
    ("settings", "size", "is_open"),
    [
        ({"do_resize": True, "size": {"height": 224, "width": 320}}, (224, 320), False),
        ({"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": 224}, (224, 224), False),
        ({"size": 384, "do_center_crop": False, "crop_size": 224}, (384, 384), False),
        ({"size": {"shortest_edge": 224}, "crop_pct": 0.875}, (224, 224), False),
        ({"size": {"shortest_edge": 800, "longest_edge": 1333}}, (800, 1066), True),
        ({"size": {"height": 518, "width": 518}, "keep_aspect_ratio": True}, (518, 518), True),
        ({"size": {"shortest_edge": 9}, "do_pad": True, "pad_size": {"height": 640, "width": 640}}, (640, 640), False),
        ({}, (32, 32), False),
    ],
)
def test_the_size_of_images_is_what_the_preprocessing_makes(
    tmp_path: Path, settings: dict[str, Any], size: tuple[int, int], is_open: bool
) -> None:
    height, width, varies = image_size(_with_processor(tmp_path, settings), {"image_size": 32})
    assert (height, width) == size
    assert varies is is_open


def test_the_size_of_images_may_stand_in_the_backbone(tmp_path: Path) -> None:
    assert image_size(tmp_path, {"backbone_config": {"image_size": [28, 42]}}) == (28, 42, False)


def test_texts_have_an_open_batch_and_sequence(tmp_path: Path) -> None:
    plan = plan_inputs(model_task(_BERT), tmp_path, _BERT, _BERT_INPUTS)
    assert [spec.name for spec in plan.specs] == ["input_ids", "attention_mask", "token_type_ids"]
    assert {spec.shape for spec in plan.specs} == {("batch", "sequence")}
    drawn = plan.draw(plan.sizes, 0)
    assert drawn["input_ids"].shape == (2, 16)
    assert 0 <= drawn["input_ids"].min() <= drawn["input_ids"].max() < 50
    assert drawn["attention_mask"][0].all()
    assert set(np.unique(drawn["token_type_ids"])) <= {0, 1}


def test_encoders_of_single_texts_take_no_token_types(tmp_path: Path) -> None:
    config = {**_BERT, "architectures": ["BertModel"]}
    plan = plan_inputs(model_task(config), tmp_path, config, _BERT_INPUTS)
    assert [spec.name for spec in plan.specs] == ["input_ids", "attention_mask"]


def test_a_given_shape_fixes_every_axis_of_every_input(tmp_path: Path) -> None:
    plan = plan_inputs(model_task(_BERT), tmp_path, _BERT, _BERT_INPUTS, {"input_ids": (1, 40)})
    assert {spec.shape for spec in plan.specs} == {(1, 40)}
    assert plan.sizes == {}
    assert plan.dynamic == {"input_ids": {}, "attention_mask": {}, "token_type_ids": {}}


def test_images_of_another_size_than_trained_adapt_the_positions(tmp_path: Path) -> None:
    plan = plan_inputs(model_task(_VIT), tmp_path, _VIT, _VIT_INPUTS, {"pixel_values": (1, 3, 64, 48)})
    assert plan.specs[0].shape == (1, 3, 64, 48)
    assert plan.constants == {"interpolate_pos_encoding": True}
    assert any("64x48" in note for note in plan.notes)
    assert plan_inputs(model_task(_VIT), tmp_path, _VIT, _VIT_INPUTS).constants == {}


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"images": (1, 3, 32, 32)}, "no input 'images'.*pixel_values"),
        ({"pixel_values": (1, 3, 32)}, "3 axes, not 4.*batchxchannelsxheightxwidth"),
        ({"pixel_values": (1, 4, 32, 32)}, "channels of pixel_values has the size 3, not 4"),
        ({"pixel_values": (0, 3, 32, 32)}, "cannot have the size 0"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(tmp_path: Path, shapes: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan_inputs(model_task(_VIT), tmp_path, _VIT, _VIT_INPUTS, shapes)


def test_more_tokens_than_the_model_has_positions_for_are_refused(tmp_path: Path) -> None:
    roberta = {**_BERT, "model_type": "roberta", "pad_token_id": 1, "type_vocab_size": 1}
    with pytest.raises(UsageError, match="62 tokens"):
        plan_inputs(model_task(roberta), tmp_path, roberta, _BERT_INPUTS, {"input_ids": (1, 63)})


def test_inputs_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="different sizes of sequence"):
        plan_inputs(model_task(_BERT), tmp_path, _BERT, _BERT_INPUTS, {"input_ids": (1, 8), "attention_mask": (1, 9)})


def test_a_model_with_inputs_of_its_own_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="takes flattened_patches"):
        plan_inputs(model_task(_VIT), tmp_path, _VIT, ("flattened_patches",))


def test_axes_that_cannot_stay_open_get_their_usual_sizes(tmp_path: Path) -> None:
    plan = plan_inputs(model_task(_BERT), tmp_path, _BERT, _BERT_INPUTS)
    assert plan.fixed({"sequence"}).specs[0].shape == ("batch", 64)
    fixed = plan.fixed({"batch", "sequence"})
    assert fixed.specs[0].shape == (1, 64)
    assert fixed.draw(fixed.sizes, 0)["input_ids"].shape == (1, 64)
