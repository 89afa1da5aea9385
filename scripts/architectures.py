"""Architectures that robots see, hear and read with: of usual width and inputs, with few layers where that will do."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["Architecture", "architectures"]

Shapes = Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One of them.

    Attributes:
        make: gives the model, with weights as transformers draws them.
        shapes: of its inputs.
        part: attribute of the model that is exported; empty for all of it.
    """

    make: Callable[[], Any]
    shapes: Shapes
    part: str = ""


_TWO: Mapping[str, Any] = {"num_hidden_layers": 2}


def architectures() -> Mapping[str, Architecture]:
    """By name."""
    return {**_images(), **_dense(), **_texts(), **_sounds()}


def _transformers() -> Any:  # noqa: ANN401 - its configurations take more than their signatures say
    return importlib.import_module("transformers")


def _images() -> Mapping[str, Architecture]:
    t = _transformers()

    camera: Shapes = {"pixel_values": (1, 3, 224, 224)}
    makers: Mapping[str, Callable[[], Any]] = {
        "ResNet-50": lambda: t.ResNetForImageClassification(t.ResNetConfig()),
        "RegNet": lambda: t.RegNetForImageClassification(t.RegNetConfig(depths=[1, 1, 2, 1])),
        "MobileNetV1": lambda: t.MobileNetV1ForImageClassification(t.MobileNetV1Config()),
        "MobileNetV2": lambda: t.MobileNetV2ForImageClassification(t.MobileNetV2Config()),
        "EfficientNet-B0": lambda: t.EfficientNetForImageClassification(
            t.EfficientNetConfig(image_size=224, width_coefficient=1.0, depth_coefficient=1.0, hidden_dim=1280)
        ),
        "ConvNeXt": lambda: t.ConvNextForImageClassification(t.ConvNextConfig()),
        "ConvNeXtV2": lambda: t.ConvNextV2ForImageClassification(t.ConvNextV2Config(depths=[1, 1, 2, 1])),
        "MobileViT": lambda: t.MobileViTForImageClassification(t.MobileViTConfig(image_size=224)),
        "ViT": lambda: t.ViTForImageClassification(t.ViTConfig(**_TWO)),
        "DeiT": lambda: t.DeiTForImageClassification(t.DeiTConfig(**_TWO)),
        "BEiT": lambda: t.BeitForImageClassification(t.BeitConfig(**_TWO)),
        "DINOv2": lambda: t.Dinov2Model(t.Dinov2Config(image_size=224, **_TWO)),
        "DINOv3": lambda: t.DINOv3ViTModel(t.DINOv3ViTConfig(**_TWO)),
        "CLIP vision": lambda: t.CLIPVisionModel(t.CLIPVisionConfig(**_TWO)),
        "SigLIP vision": lambda: t.SiglipVisionModel(t.SiglipVisionConfig(**_TWO)),
        "Swin": lambda: t.SwinForImageClassification(t.SwinConfig(depths=[1, 1, 2, 1])),
    }
    return {name: Architecture(make, camera) for name, make in makers.items()}


def _dense() -> Mapping[str, Architecture]:
    """Objects, depth and masks."""
    t = _transformers()

    def square(size: int) -> Shapes:
        return {"pixel_values": (1, 3, size, size)}

    def detr() -> Any:  # noqa: ANN401
        backbone = t.ResNetConfig(out_features=["stage4"])
        return t.DetrForObjectDetection(
            t.DetrConfig(use_timm_backbone=False, use_pretrained_backbone=False, backbone=None,
                         backbone_config=backbone, encoder_layers=2, decoder_layers=2)
        )  # fmt: skip

    def depth_anything() -> Any:  # noqa: ANN401
        backbone = t.Dinov2Config(
            image_size=224, hidden_size=384, num_hidden_layers=4, num_attention_heads=6,
            out_indices=[1, 2, 3, 4], reshape_hidden_states=False, apply_layernorm=True,
        )  # fmt: skip
        return t.DepthAnythingForDepthEstimation(t.DepthAnythingConfig(backbone_config=backbone))

    def dpt() -> Any:  # noqa: ANN401
        return t.DPTForDepthEstimation(t.DPTConfig(num_hidden_layers=4, backbone_out_indices=[0, 1, 2, 3]))

    def mask2former() -> Any:  # noqa: ANN401
        backbone = t.SwinConfig(depths=[1, 1, 2, 1], out_features=["stage1", "stage2", "stage3", "stage4"])
        return t.Mask2FormerForUniversalSegmentation(
            t.Mask2FormerConfig(backbone_config=backbone, encoder_layers=1, decoder_layers=2)
        )

    def upernet() -> Any:  # noqa: ANN401
        backbone = t.ConvNextConfig(
            hidden_sizes=[96, 192, 384, 768], depths=[1, 1, 2, 1], out_features=["stage1", "stage2", "stage3", "stage4"]
        )
        return t.UperNetForSemanticSegmentation(t.UperNetConfig(backbone_config=backbone))

    return {
        "DETR": Architecture(detr, square(512)),
        "RT-DETR": Architecture(lambda: t.RTDetrForObjectDetection(t.RTDetrConfig(decoder_layers=2)), square(512)),
        "YOLOS": Architecture(
            lambda: t.YolosForObjectDetection(t.YolosConfig(image_size=[512, 512], **_TWO)), square(512)
        ),
        "DPT": Architecture(dpt, square(384)),
        "Depth Anything": Architecture(depth_anything, square(224)),
        "SegFormer": Architecture(lambda: t.SegformerForSemanticSegmentation(t.SegformerConfig()), square(512)),
        "UperNet": Architecture(upernet, square(256)),
        "Mask2Former": Architecture(mask2former, square(384)),
    }


def _texts() -> Mapping[str, Architecture]:
    t = _transformers()

    text: Shapes = dict.fromkeys(("input_ids", "attention_mask"), (1, 128))
    makers: Mapping[str, Callable[[], Any]] = {
        "BERT": lambda: t.BertModel(t.BertConfig(**_TWO)),
        "RoBERTa": lambda: t.RobertaForSequenceClassification(t.RobertaConfig(**_TWO)),
        "XLM-RoBERTa": lambda: t.XLMRobertaModel(t.XLMRobertaConfig(**_TWO)),
        "DistilBERT": lambda: t.DistilBertModel(t.DistilBertConfig(n_layers=2)),
        "ELECTRA": lambda: t.ElectraModel(t.ElectraConfig(**_TWO)),
        "MPNet": lambda: t.MPNetModel(t.MPNetConfig(**_TWO)),
        "ModernBERT": lambda: t.ModernBertModel(t.ModernBertConfig(**_TWO)),
    }
    return {name: Architecture(make, text) for name, make in makers.items()}


def _sounds() -> Mapping[str, Architecture]:
    t = _transformers()

    spoken: Shapes = {"input_values": (1, 16000)}
    spectrogram: Shapes = {"input_features": (1, 80, 3000)}
    return {
        "Whisper encoder": Architecture(
            lambda: t.WhisperModel(t.WhisperConfig(encoder_layers=2, decoder_layers=1)), spectrogram, "encoder"
        ),
        "wav2vec 2.0": Architecture(lambda: t.Wav2Vec2ForCTC(t.Wav2Vec2Config(**_TWO)), spoken),
        "HuBERT": Architecture(lambda: t.HubertModel(t.HubertConfig(**_TWO)), spoken),
        "AST": Architecture(lambda: t.ASTForAudioClassification(t.ASTConfig(**_TWO)), {"input_values": (1, 1024, 128)}),
    }
