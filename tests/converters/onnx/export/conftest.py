"""Tiny random models of many architectures as Hugging Face folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import pytest

_TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
}
_VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "image_size": 32,
    "patch_size": 8,
}
_LABELS = {"id2label": {0: "cup", 1: "door", 2: "person"}, "label2id": {"cup": 0, "door": 1, "person": 2}}


def _backbone(transformers: Any, stages: list[str]) -> Any:
    return transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], layer_type="basic", out_features=stages
    )


def _detr(transformers: Any, stages: tuple[str, ...] = ("stage4",)) -> Any:
    return transformers.DetrConfig(
        use_timm_backbone=False,
        backbone_config=_backbone(transformers, list(stages)),
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=8,
        decoder_attention_heads=8,
        encoder_ffn_dim=40,
        decoder_ffn_dim=40,
        num_queries=7,
        **_LABELS,
    )


def _rt_detr(transformers: Any) -> Any:
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 24, 32, 40],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
        out_indices=[2, 3, 4],
    )
    return transformers.RTDetrConfig(
        backbone_config=backbone,
        encoder_hidden_dim=32,
        encoder_in_channels=[24, 32, 40],
        encoder_ffn_dim=40,
        encoder_attention_heads=4,
        d_model=32,
        num_queries=12,
        decoder_in_channels=[32, 32, 32],
        decoder_ffn_dim=40,
        decoder_layers=1,
        decoder_attention_heads=4,
        num_denoising=0,
        **_LABELS,
    )


def _depth_anything(transformers: Any) -> Any:
    backbone = transformers.Dinov2Config(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=28,
        patch_size=14,
        out_indices=[1, 2, 3, 4],
        reshape_hidden_states=False,
    )
    return transformers.DepthAnythingConfig(
        backbone_config=backbone,
        reassemble_hidden_size=32,
        neck_hidden_sizes=[8, 8, 16, 16],
        fusion_hidden_size=16,
        head_hidden_size=8,
    )


def _dpt(transformers: Any) -> Any:
    return transformers.DPTConfig(
        **{**_VIT, "num_hidden_layers": 4, "patch_size": 16},
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 16, 16],
        fusion_hidden_size=16,
    )


def _clip(transformers: Any) -> Any:
    text = {key: value for key, value in _TEXT.items() if key != "max_position_embeddings"}
    return transformers.CLIPConfig(
        text_config={**text, "max_position_embeddings": 20, "projection_dim": 16},
        vision_config={**_VIT, "projection_dim": 16},
        projection_dim=16,
    )


# Name to architecture and configuration.
MODELS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "bert": ("BertModel", lambda t: t.BertConfig(**_TEXT)),
    "bert-classifier": ("BertForSequenceClassification", lambda t: t.BertConfig(**_TEXT, **_LABELS)),
    "bert-tokens": ("BertForTokenClassification", lambda t: t.BertConfig(**_TEXT, **_LABELS)),
    "roberta": ("RobertaModel", lambda t: t.RobertaConfig(**_TEXT, type_vocab_size=1, pad_token_id=1)),
    "xlm-roberta": (
        "XLMRobertaForSequenceClassification",
        lambda t: t.XLMRobertaConfig(**_TEXT, type_vocab_size=1, pad_token_id=1, **_LABELS),
    ),
    "distilbert": (
        "DistilBertForSequenceClassification",
        lambda t: t.DistilBertConfig(
            vocab_size=99, dim=32, n_layers=2, n_heads=4, hidden_dim=40, max_position_embeddings=64, **_LABELS
        ),
    ),
    "mpnet": ("MPNetForMaskedLM", lambda t: t.MPNetConfig(**_TEXT, pad_token_id=1)),
    "deberta": (
        "DebertaV2ForSequenceClassification",
        lambda t: t.DebertaV2Config(
            **_TEXT,
            relative_attention=True,
            position_buckets=8,
            pos_att_type=["c2p", "p2c"],
            norm_rel_ebd="layer_norm",
            share_att_key=True,
            type_vocab_size=0,
            **_LABELS,
        ),
    ),
    "vit": ("ViTForImageClassification", lambda t: t.ViTConfig(**_VIT, **_LABELS)),
    "deit": ("DeiTForImageClassificationWithTeacher", lambda t: t.DeiTConfig(**_VIT, **_LABELS)),
    "dinov2": ("Dinov2Model", lambda t: t.Dinov2Config(**{**_VIT, "image_size": 28, "patch_size": 14})),
    "siglip": ("SiglipVisionModel", lambda t: t.SiglipVisionConfig(**_VIT)),
    "clip": ("CLIPModel", _clip),
    "swin": (
        "SwinForImageClassification",
        lambda t: t.SwinConfig(
            image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4, **_LABELS
        ),
    ),
    "resnet": (
        "ResNetForImageClassification",
        lambda t: t.ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], **_LABELS),
    ),
    "mobilenet-v1": (
        "MobileNetV1ForImageClassification",
        lambda t: t.MobileNetV1Config(image_size=32, depth_multiplier=0.25, **_LABELS),
    ),
    "mobilenet-v2": (
        "MobileNetV2ForImageClassification",
        lambda t: t.MobileNetV2Config(image_size=32, depth_multiplier=0.25, **_LABELS),
    ),
    "convnext": (
        "ConvNextForImageClassification",
        lambda t: t.ConvNextConfig(
            image_size=32, num_stages=2, hidden_sizes=[8, 16], depths=[1, 1], layer_scale_init_value=0.5, **_LABELS
        ),
    ),
    "efficientnet": (
        "EfficientNetForImageClassification",
        lambda t: t.EfficientNetConfig(
            image_size=64, width_coefficient=0.25, depth_coefficient=0.5, hidden_dim=320, pooling_type="mean", **_LABELS
        ),
    ),
    "segformer": (
        "SegformerForSemanticSegmentation",
        lambda t: t.SegformerConfig(
            depths=[1, 1, 1, 1],
            hidden_sizes=[8, 16, 24, 32],
            num_attention_heads=[1, 2, 4, 4],
            decoder_hidden_size=16,
            image_size=64,
            **_LABELS,
        ),
    ),
    "dpt": ("DPTForDepthEstimation", _dpt),
    "depth-anything": ("DepthAnythingForDepthEstimation", _depth_anything),
    "detr": ("DetrForObjectDetection", _detr),
    "detr-masks": ("DetrForSegmentation", lambda t: _detr(t, ("stage1", "stage2", "stage3", "stage4"))),
    "rt-detr": ("RTDetrForObjectDetection", _rt_detr),
    "yolos": (
        "YolosForObjectDetection",
        lambda t: t.YolosConfig(**{**_VIT, "image_size": [32, 48]}, num_detection_tokens=7, **_LABELS),
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        lambda t: t.WhisperConfig(
            vocab_size=99,
            d_model=32,
            encoder_layers=2,
            decoder_layers=1,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=40,
            decoder_ffn_dim=40,
            num_mel_bins=16,
            max_source_positions=30,
            max_target_positions=20,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=3,
        ),
    ),
    "wav2vec2": (
        "Wav2Vec2ForSequenceClassification",
        lambda t: t.Wav2Vec2Config(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=40,
            conv_dim=(16, 16, 16),
            conv_stride=(5, 4, 4),
            conv_kernel=(10, 5, 5),
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=2,
            **_LABELS,
        ),
    ),
    "ast": (
        "ASTForAudioClassification",
        lambda t: t.ASTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=40,
            max_length=48,
            num_mel_bins=32,
            **_LABELS,
        ),
    ),
}


class TinyModel(Protocol):
    """The signature of the ``tiny_model`` fixture."""

    def __call__(self, name: str) -> Path:
        """The folder of the model of that name in `MODELS`; tests must not change it."""
        ...


def make_model(name: str, folder: Path) -> Path:
    """Write a random model whose outputs are of the order of 1, with statistics of batches that are not all 0 and 1."""
    import torch
    import transformers

    architecture, config = MODELS[name]
    torch.manual_seed(3)
    model = getattr(transformers, architecture)(config(transformers))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1.4 / parameter[0].numel() ** 0.5)
    for buffer_name, buffer in model.named_buffers():
        if buffer_name.endswith("running_mean"):
            buffer.normal_(std=0.1)
        elif buffer_name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    transformers.utils.logging.enable_progress_bar()
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """``tiny_model("vit")``: a random model of two layers or so as a Hugging Face folder."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = make_model(name, tmp_path_factory.mktemp("tiny-model") / name)
        return made[name]

    return make
