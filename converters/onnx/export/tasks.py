"""The tasks that can be exported: which class loads the model, what it is fed, and what it answers.

One table holds them all. A task is found by the ending of the class in ``architectures``, or named by the user. Names
are those of transformers' pipelines, with ``semantic-segmentation`` beside them for classes per pixel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from edgeq.errors import SourceError, UnsupportedModelError, UsageError
from edgeq.registry import nearest

__all__ = ["TASKS", "Modality", "Task", "TaskInput", "architecture_of", "modality_of", "model_task"]

Modality = Literal["text", "image", "audio"]


@dataclasses.dataclass(frozen=True)
class TaskInput:
    """An input that models of a modality take.

    Attributes:
        name: of the argument of ``forward``, and in the graph.
        dtype: numpy's name.
        axes: names; ``"batch"``, ``"sequence"`` and ``"samples"`` stay open unless the user fixes them, ``"height"``
            and ``"width"`` where the preprocessing leaves them open, others are sizes that the configuration says.
        optional: it is fed only to models whose ``forward`` has it.
    """

    name: str
    dtype: Literal["int64", "float32"]
    axes: tuple[str, ...]
    optional: bool = False


@dataclasses.dataclass(frozen=True)
class Task:
    """What a model is exported for.

    Attributes:
        name: of the task.
        modality: of the inputs.
        auto_class: of transformers, which picks the class for a ``model_type``.
        outputs: names that an output of the model may have; those that it has are exported, in this order.
        model_class: instead of the automatic one.
        part: attribute of the loaded model that is exported, with dots; empty for all of it.
        note: what a user must know.
        unordered: the outputs are of objects, in any order.
    """

    name: str
    modality: Modality
    auto_class: str
    outputs: tuple[str, ...]
    model_class: str | None = None
    part: str = ""
    note: str | None = None
    unordered: bool = False

    @property
    def inputs(self) -> tuple[TaskInput, ...]:
        """All that models of the modality may be fed."""
        return _INPUTS[self.modality]


_TEXT_AXES = ("batch", "sequence")
_INPUTS: Mapping[Modality, tuple[TaskInput, ...]] = {
    "text": (
        TaskInput("input_ids", "int64", _TEXT_AXES),
        TaskInput("attention_mask", "int64", _TEXT_AXES, optional=True),
        TaskInput("token_type_ids", "int64", _TEXT_AXES, optional=True),
    ),
    "image": (TaskInput("pixel_values", "float32", ("batch", "channels", "height", "width")),),
    "audio": (
        TaskInput("input_features", "float32", ("batch", "mel_bins", "frames"), optional=True),
        TaskInput("input_values", "float32", ("batch", "samples"), optional=True),
    ),
}

_CLASSES = ("logits",)
_MASKS = ("class_queries_logits", "masks_queries_logits", "logits", "pred_boxes", "pred_masks")
_HIDDEN = ("last_hidden_state",)
_POOLED = ("last_hidden_state", "pooler_output")

TASKS: tuple[Task, ...] = (
    Task("feature-extraction", "text", "AutoModel", _HIDDEN),
    Task("feature-extraction", "audio", "AutoModel", _HIDDEN),
    Task("image-feature-extraction", "image", "AutoModel", _POOLED),
    Task("text-classification", "text", "AutoModelForSequenceClassification", _CLASSES),
    Task("token-classification", "text", "AutoModelForTokenClassification", _CLASSES),
    Task("question-answering", "text", "AutoModelForQuestionAnswering", ("start_logits", "end_logits")),
    Task("fill-mask", "text", "AutoModelForMaskedLM", _CLASSES),
    Task("image-classification", "image", "AutoModelForImageClassification", _CLASSES),
    Task("object-detection", "image", "AutoModelForObjectDetection", ("logits", "pred_boxes"), unordered=True),
    Task("depth-estimation", "image", "AutoModelForDepthEstimation", ("predicted_depth",)),
    Task("semantic-segmentation", "image", "AutoModelForSemanticSegmentation", _CLASSES),
    Task("image-segmentation", "image", "AutoModelForImageSegmentation", _MASKS),
    Task("image-segmentation", "image", "AutoModelForUniversalSegmentation", _MASKS),
    Task("image-segmentation", "image", "AutoModelForInstanceSegmentation", _MASKS),
    Task("audio-classification", "audio", "AutoModelForAudioClassification", _CLASSES),
    Task("automatic-speech-recognition", "audio", "AutoModelForCTC", _CLASSES),
)

# Endings of class names. The modality decides where a task has more than one.
_HEADS: Mapping[str, str] = {
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForImageClassification": "AutoModelForImageClassification",
    "ForImageClassificationWithTeacher": "AutoModelForImageClassification",
    "ForObjectDetection": "AutoModelForObjectDetection",
    "ForDepthEstimation": "AutoModelForDepthEstimation",
    "ForSemanticSegmentation": "AutoModelForSemanticSegmentation",
    "ForSegmentation": "AutoModelForImageSegmentation",
    "ForUniversalSegmentation": "AutoModelForUniversalSegmentation",
    "ForInstanceSegmentation": "AutoModelForInstanceSegmentation",
    "ForAudioClassification": "AutoModelForAudioClassification",
    "ForCTC": "AutoModelForCTC",
    "Model": "AutoModel",
    "Encoder": "AutoModel",
    "Backbone": "AutoModel",
    "WithProjection": "AutoModel",
}
_AUDIO_SEQUENCE = "AutoModelForSequenceClassification"  # Wav2Vec2ForSequenceClassification and its kin
_ALIASES = {
    "embedding": "feature-extraction",
    "ner": "token-classification",
    "segmentation": "image-segmentation",
    "sentence-similarity": "feature-extraction",
    "sentiment-analysis": "text-classification",
    "sequence-classification": "text-classification",
}
# The nearest thing that a model of this modality has.
_SIBLINGS: Mapping[tuple[str, Modality], str] = {
    ("feature-extraction", "image"): "image-feature-extraction",
    ("image-feature-extraction", "text"): "feature-extraction",
    ("image-feature-extraction", "audio"): "feature-extraction",
}

# Models of two towers: the half for images and the half for texts.
_HALVES: Mapping[str, tuple[str, str]] = {
    "clip": ("CLIPVisionModelWithProjection", "CLIPTextModelWithProjection"),
    "siglip": ("SiglipVisionModel", "SiglipTextModel"),
    "siglip2": ("Siglip2VisionModel", "Siglip2TextModel"),
}
_HALF_OF: Mapping[Modality, str] = {"image": "for images", "text": "for texts", "audio": "for sound"}
_AUDIO_KEYS = frozenset({"num_mel_bins", "feat_extract_norm", "conv_stride"})
_IMAGE_KEYS = frozenset(
    {"image_size", "patch_size", "num_channels", "vision_config", "backbone_config", "backbone", "depth_multiplier"}
)
_TEXT_KEYS = frozenset({"vocab_size", "type_vocab_size"})


def architecture_of(config: Mapping[str, Any]) -> str:
    """The first of ``architectures``.

    Raises:
        SourceError: the configuration names none.
    """
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise SourceError(
            "config.json names no architectures", 'Add the class of the model, such as "architectures": ["BertModel"]'
        )
    return names[0]


def modality_of(config: Mapping[str, Any]) -> Modality:
    """What a model is fed, by the keys of its configuration.

    Raises:
        UnsupportedModelError: none of the keys is known.
    """
    keys = config.keys()
    # Models of sound have a vocabulary or patches too, and models of images may have a vocabulary.
    if keys & _AUDIO_KEYS:
        return "audio"
    if keys & _IMAGE_KEYS:
        return "image"
    if keys & _TEXT_KEYS:
        return "text"
    raise UnsupportedModelError(
        f"config.json does not say whether {architecture_of(config)} takes texts, images or sound",
        "Export it yourself and give the ONNX file",
    )


def model_task(config: Mapping[str, Any], task: str | None = None) -> Task:
    """What a model is exported for.

    Args:
        config: contents of its config.json.
        task: of the user; None takes what the architecture is made for.

    Raises:
        UsageError: a task that nothing is known of.
        UnsupportedModelError: a task or architecture that is not exported.
        SourceError: config.json does not name its architecture.
    """
    architecture = architecture_of(config)
    modality = modality_of(config)
    if task is not None:
        return _chosen(task, architecture, modality, config)
    endings = [ending for ending in _HEADS if architecture.endswith(ending)]
    model_type = str(config.get("model_type"))
    if model_type == "whisper" and architecture.endswith("ForConditionalGeneration"):
        endings = ["Encoder"]
    if not endings:
        raise _unknown_head(architecture)
    auto_class = _HEADS[max(endings, key=len)]
    if auto_class == _AUDIO_SEQUENCE and modality == "audio":
        auto_class = "AutoModelForAudioClassification"
    options = [item for item in TASKS if item.auto_class == auto_class]
    found = next((item for item in options if item.modality == modality), options[0])
    return _specialized(found, architecture, model_type)


def _chosen(name: str, architecture: str, modality: Modality, config: Mapping[str, Any]) -> Task:
    name = _ALIASES.get(name, name)
    known = sorted({task.name for task in TASKS})
    if name not in known:
        close = nearest(name, known) or known
        raise UsageError(f"There is no task {name!r}", f"Choose {' or '.join(close)}")
    model_type = str(config.get("model_type"))
    if model_type not in _HALVES:
        name = _SIBLINGS.get((name, modality), name)
    options = [task for task in TASKS if task.name == name]
    if model_type in _HALVES and name == "feature-extraction":
        modality = "text"
    fitting = [task for task in options if task.modality == modality]
    if not fitting:
        raise UnsupportedModelError(
            f"{architecture} takes {modality}, which {name} does not", "Leave the task out, or choose one that fits"
        )
    # An architecture that was made for one of several decides between them.
    own = [task for task in fitting if _HEADS.get(_ending(architecture)) == task.auto_class]
    return _specialized((own or fitting)[0], architecture, model_type)


def _ending(architecture: str) -> str:
    return max((ending for ending in _HEADS if architecture.endswith(ending)), key=len, default="")


def _specialized(task: Task, architecture: str, model_type: str) -> Task:
    """Parts of models that are exported alone."""
    if model_type == "whisper" and task.auto_class == "AutoModel":
        return dataclasses.replace(
            task,
            model_class="WhisperModel",
            part="encoder",
            note="The encoder alone is exported: the decoder, which writes the text, is a language model",
        )
    if model_type in _HALVES and task.auto_class == "AutoModel":
        image, text = _HALVES[model_type]
        chosen = image if task.modality == "image" else text
        note: str | None = None
        if architecture not in {image, text}:
            other = "feature-extraction" if task.modality == "image" else "image-feature-extraction"
            note = f"The half {_HALF_OF[task.modality]} is exported; the task {other} gives the other one"
        outputs = ("image_embeds", "text_embeds", "last_hidden_state", "pooler_output")
        return dataclasses.replace(task, model_class=chosen, outputs=outputs, note=note)
    return task


def _unknown_head(architecture: str) -> UnsupportedModelError:
    if architecture.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
        return UnsupportedModelError(
            f"{architecture} writes text, which an ONNX graph that is called once cannot",
            "Convert it to GGUF, or choose --task feature-extraction for its hidden states",
        )
    return UnsupportedModelError(
        f"No task is known for {architecture}",
        "Choose one with --task, such as feature-extraction, or export it yourself and give the ONNX file",
    )
