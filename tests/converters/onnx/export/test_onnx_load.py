"""Hugging Face folders as modules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from edgeq.converters.onnx.export.embedding import read_config
from edgeq.converters.onnx.export.load import forward_parameters, load_model
from edgeq.converters.onnx.export.tasks import model_task

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

TinyModel = Callable[[str], Path]


@pytest.mark.parametrize(
    ("name", "task", "kind"),
    [
        ("vit", "image-feature-extraction", "ViTModel"),
        ("mpnet", "feature-extraction", "MPNetModel"),
        ("bert", None, "BertModel"),
        ("siglip", None, "SiglipVisionModel"),
        ("deit", None, "DeiTForImageClassificationWithTeacher"),
        ("whisper", None, "WhisperEncoder"),
        ("clip", "feature-extraction", "CLIPTextModelWithProjection"),
    ],
)
def test_the_class_that_serves_the_task_is_loaded(
    tiny_model: TinyModel, name: str, task: str | None, kind: str
) -> None:
    folder = tiny_model(name)
    config = read_config(folder)
    model = load_model(folder, model_task(config, task), config)
    assert type(model).__name__ == kind
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_pooler_without_weights_is_left_out_instead_of_made_up(tiny_model: TinyModel) -> None:
    folder = tiny_model("vit")
    config = read_config(folder)
    model = load_model(folder, model_task(config, "image-feature-extraction"), config)
    assert not [name for name, _ in model.named_parameters() if "pooler" in name]


def test_weights_in_bf16_are_computed_with_in_float32(tiny_model: TinyModel, tmp_path: Path) -> None:
    import transformers

    folder = tmp_path / "half"
    transformers.BertModel.from_pretrained(tiny_model("bert"), dtype=torch.bfloat16).save_pretrained(folder)
    config = read_config(folder)
    model = load_model(folder, model_task(config), config)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_the_arguments_of_a_model_are_known(tiny_model: TinyModel) -> None:
    folder = tiny_model("bert")
    config = read_config(folder)
    assert {"input_ids", "attention_mask"} <= forward_parameters(load_model(folder, model_task(config), config))
