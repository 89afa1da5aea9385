"""The table of tasks: every architecture to what it is exported for."""

from __future__ import annotations

from typing import Any

import pytest

from edgeq.converters.onnx.export.tasks import TASKS, model_task
from edgeq.errors import SourceError, UnsupportedModelError, UsageError

_TEXT = {"vocab_size": 9}
_IMAGE = {"num_channels": 3}
_AUDIO = {"num_mel_bins": 8, "vocab_size": 9}


@pytest.mark.parametrize(
    ("architecture", "config", "task", "outputs"),
    [
        ("BertModel", _TEXT, "feature-extraction", ("last_hidden_state",)),
        ("RobertaForSequenceClassification", _TEXT, "text-classification", ("logits",)),
        ("DistilBertForTokenClassification", _TEXT, "token-classification", ("logits",)),
        ("BertForQuestionAnswering", _TEXT, "question-answering", ("start_logits", "end_logits")),
        ("ViTModel", _IMAGE, "image-feature-extraction", ("last_hidden_state", "pooler_output")),
        ("SiglipVisionModel", _IMAGE, "image-feature-extraction", ("last_hidden_state", "pooler_output")),
        ("DeiTForImageClassificationWithTeacher", _IMAGE, "image-classification", ("logits",)),
        ("RTDetrForObjectDetection", _IMAGE, "object-detection", ("logits", "pred_boxes")),
        ("DPTForDepthEstimation", _IMAGE, "depth-estimation", ("predicted_depth",)),
        ("SegformerForSemanticSegmentation", _IMAGE, "semantic-segmentation", ("logits",)),
        ("ASTForAudioClassification", _AUDIO, "audio-classification", ("logits",)),
        ("Wav2Vec2ForCTC", {"conv_stride": [5]}, "automatic-speech-recognition", ("logits",)),
    ],
)
def test_architectures_have_the_task_that_they_are_named_for(
    architecture: str, config: dict[str, Any], task: str, outputs: tuple[str, ...]
) -> None:
    found = model_task({"architectures": [architecture], **config})
    assert found.name == task
    assert found.outputs == outputs


def test_sequence_classification_of_sound_is_not_of_text() -> None:
    config = {"architectures": ["Wav2Vec2ForSequenceClassification"], "conv_stride": [5, 2], "vocab_size": 32}
    assert model_task(config).name == "audio-classification"


def test_of_whisper_the_encoder_is_exported_and_a_note_says_so() -> None:
    config = {"architectures": ["WhisperForConditionalGeneration"], "model_type": "whisper", **_AUDIO}
    found = model_task(config)
    assert (found.name, found.modality, found.part) == ("feature-extraction", "audio", "encoder")
    assert "decoder" in (found.note or "")


def test_halves_of_models_with_two_towers_are_chosen_by_the_task() -> None:
    config = {"architectures": ["CLIPModel"], "model_type": "clip", "vision_config": {}, "text_config": {}}
    assert model_task(config).model_class == "CLIPVisionModelWithProjection"
    assert model_task(config, "image-feature-extraction").model_class == "CLIPVisionModelWithProjection"
    text = model_task(config, "feature-extraction")
    assert (text.model_class, text.modality) == ("CLIPTextModelWithProjection", "text")


def test_feature_extraction_of_an_image_model_is_image_feature_extraction() -> None:
    config = {"architectures": ["ViTForImageClassification"], **_IMAGE}
    assert model_task(config, "feature-extraction").name == "image-feature-extraction"


def test_two_tasks_of_one_name_are_told_apart_by_the_architecture() -> None:
    config = {"architectures": ["Mask2FormerForUniversalSegmentation"], **_IMAGE}
    assert model_task(config, "image-segmentation").auto_class == "AutoModelForUniversalSegmentation"
    config = {"architectures": ["DetrForSegmentation"], **_IMAGE}
    assert model_task(config, "image-segmentation").auto_class == "AutoModelForImageSegmentation"


def test_language_models_are_sent_to_gguf() -> None:
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM writes text.*GGUF"):
        model_task({"architectures": ["LlamaForCausalLM"], **_TEXT})


def test_an_unknown_task_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="image-classification"):
        model_task({"architectures": ["ViTModel"], **_IMAGE}, "image-clasification")


def test_a_task_of_another_modality_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="takes text"):
        model_task({"architectures": ["BertModel"], **_TEXT}, "image-classification")


@pytest.mark.parametrize("config", [{}, {"architectures": []}, {"architectures": [3]}, {"architectures": "BertModel"}])
def test_a_config_without_architectures_is_an_error(config: dict[str, Any]) -> None:
    with pytest.raises(SourceError, match="names no architectures"):
        model_task(config)


def test_the_classes_of_the_table_exist_in_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    for task in TASKS:
        assert hasattr(transformers, task.auto_class), task
