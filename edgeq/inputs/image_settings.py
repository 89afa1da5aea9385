"""What ``preprocessor_config.json`` says, and what transformers takes where it says nothing.

The defaults and rules of each processor are those of transformers 5 (``models/*/image_processing_pil_*.py``), whose
PIL processors are the reference; the ones on torchvision differ from them by a few grey levels after resizing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import msgspec

from edgeq.errors import SourceError, UnsupportedModelError
from edgeq.inputs.bounded import read_bounded

__all__ = ["ImageSettings", "Rule", "image_settings"]

Rule = Literal["plain", "convnext", "levit", "poolformer", "dpt", "glpn", "detr", "yolos", "exact"]
Pair = tuple[int, int]
Triple = tuple[float, float, float]
S = TypeVar("S")

_MAX_BYTES = 1 << 20
_MAX_EDGE = 1 << 15  # an image of 32768 x 32768 takes 12 GiB as float32
_FILES = ("preprocessor_config.json", "processor_config.json")
_SIZE_FORMS = (
    {"height", "width"},
    {"shortest_edge"},
    {"shortest_edge", "longest_edge"},
    {"max_height", "max_width"},
)

_HALF: tuple[Triple, Triple] = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_IMAGENET: tuple[Triple, Triple] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CLIP: tuple[Triple, Triple] = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)
_NEAREST, _BILINEAR, _BICUBIC = 0, 2, 3  # PIL.Image.Resampling
_FILTERS = range(6)
_DETR_LONGEST = 1333


@dataclasses.dataclass(frozen=True)
class ImageSettings:
    """How one image becomes the input of a model, everything decided.

    Attributes:
        processor: transformers' name of it, without ``Fast``.
        rule: by which the size is found.
        size: of the resized image in the keys of transformers; None leaves images as large as they are.
        resample: number of PIL's filter.
        crop: height and width of the part from the middle, padded with black if the image is smaller; None for all.
        scale: that 0 to 255 is multiplied with; None for 1.
        offset: 1 if 1 is subtracted afterwards.
        mean: of each channel, subtracted; None leaves out this and the division.
        std: of each channel, divided by.
        std_again: whether it is divided by once more.
        pad: height and width that are filled up with zeros on the right and below; None for nothing.
        pad_multiple: height and width are filled up around the image to multiples of it; None for nothing.
        bgr: channels in the order blue, green, red.
        crop_share: share of the resized image that the crop keeps.
        multiple: that height and width are made multiples of.
        keep_ratio: whether the rule ``dpt`` keeps the ratio.
    """

    processor: str
    rule: Rule
    size: Mapping[str, int] | None
    resample: int
    crop: Pair | None = None
    scale: float | None = None
    offset: int = 0
    mean: Triple | None = None
    std: Triple = (1.0, 1.0, 1.0)
    std_again: bool = False
    pad: Pair | None = None
    pad_multiple: int | None = None
    bgr: bool = False
    crop_share: float = 1.0
    multiple: int = 1
    keep_ratio: bool = False


@dataclasses.dataclass(frozen=True)
class _Known:
    """What transformers takes where a file is silent; ``square`` is what a single number as the size means."""

    resample: int
    values: tuple[Triple, Triple]
    size: Mapping[str, int]
    rule: Rule = "plain"
    square: bool = True
    crop: Pair | None = None
    crops: bool = False
    normalizes: bool = True
    pads: bool = False
    lacks: frozenset[str] = frozenset()


def _square(edge: int) -> dict[str, int]:
    return {"height": edge, "width": edge}


def _shortest(edge: int) -> dict[str, int]:
    return {"shortest_edge": edge}


_CLIP_LIKE = _Known(_BICUBIC, _CLIP, _shortest(224), square=False, crop=(224, 224), crops=True)
_MOBILENET = _Known(_BILINEAR, _HALF, _shortest(256), square=False, crop=(224, 224), crops=True)
_DETR = _Known(
    _BILINEAR,
    _IMAGENET,
    {"shortest_edge": 800, "longest_edge": _DETR_LONGEST},
    rule="detr",
    square=False,
    pads=True,
    lacks=frozenset({"crop"}),
)
_KNOWN: Mapping[str, _Known] = {
    "BeitImageProcessor": _Known(_BICUBIC, _HALF, _square(224), crop=(224, 224)),
    "BitImageProcessor": _CLIP_LIKE,
    "BlipImageProcessor": _Known(_BICUBIC, _CLIP, _square(384)),
    "CLIPImageProcessor": _CLIP_LIKE,
    "ChineseCLIPImageProcessor": _CLIP_LIKE,
    "ConditionalDetrImageProcessor": _DETR,
    "ConvNextImageProcessor": _Known(
        _BICUBIC, _HALF, _shortest(384), rule="convnext", square=False, lacks=frozenset({"pad"})
    ),
    "DPTImageProcessor": _Known(_BICUBIC, _HALF, _square(384), rule="dpt", lacks=frozenset({"crop"})),
    "DeformableDetrImageProcessor": _DETR,
    "DeiTImageProcessor": _Known(_BICUBIC, _HALF, _square(256), crop=(224, 224), crops=True),
    "DetrImageProcessor": _DETR,
    "EfficientNetImageProcessor": _Known(_BICUBIC, _HALF, _square(346), crop=(289, 289), lacks=frozenset({"pad"})),
    "GLPNImageProcessor": _Known(_BILINEAR, _HALF, {}, rule="glpn", normalizes=False, lacks=frozenset({"crop", "pad"})),
    "LevitImageProcessor": _Known(
        _BICUBIC, _IMAGENET, _shortest(224), rule="levit", square=False, crop=(224, 224), crops=True
    ),
    "MobileNetV1ImageProcessor": _MOBILENET,
    "MobileNetV2ImageProcessor": dataclasses.replace(_MOBILENET, lacks=frozenset({"pad"})),
    "MobileViTImageProcessor": _Known(
        _BICUBIC,
        _HALF,
        _shortest(224),
        square=False,
        crop=(256, 256),
        crops=True,
        normalizes=False,
        lacks=frozenset({"normalize", "pad"}),
    ),
    "OwlViTImageProcessor": _Known(_BICUBIC, _CLIP, _square(768), crop=(768, 768)),
    "PoolFormerImageProcessor": _Known(
        _BICUBIC, _IMAGENET, _shortest(224), rule="poolformer", square=False, crop=(224, 224), crops=True
    ),
    "PvtImageProcessor": _Known(_BICUBIC, _IMAGENET, _square(224)),
    "RTDetrImageProcessor": dataclasses.replace(_DETR, size=_square(640), normalizes=False, pads=False),
    "SegformerImageProcessor": _Known(_BILINEAR, _IMAGENET, _square(512), lacks=frozenset({"crop", "pad"})),
    "SiglipImageProcessor": _Known(_BICUBIC, _HALF, _square(224), square=False),
    "ViTImageProcessor": _Known(_BILINEAR, _HALF, _square(224)),
    "YolosImageProcessor": dataclasses.replace(_DETR, rule="yolos"),
}
# Of files that name no processor, by the model's type in config.json.
_OF_MODEL: Mapping[str, str] = {
    "clip": "CLIPImageProcessor",
    "convnext": "ConvNextImageProcessor",
    "convnextv2": "ConvNextImageProcessor",
    "deit": "DeiTImageProcessor",
    "depth_anything": "DPTImageProcessor",
    "detr": "DetrImageProcessor",
    "dinov2": "BitImageProcessor",
    "dpt": "DPTImageProcessor",
    "efficientnet": "EfficientNetImageProcessor",
    "mobilenet_v2": "MobileNetV2ImageProcessor",
    "regnet": "ConvNextImageProcessor",
    "resnet": "ConvNextImageProcessor",
    "rt_detr": "RTDetrImageProcessor",
    "segformer": "SegformerImageProcessor",
    "siglip": "SiglipImageProcessor",
    "swin": "ViTImageProcessor",
    "swinv2": "ViTImageProcessor",
    "vit": "ViTImageProcessor",
    "yolos": "YolosImageProcessor",
}

_Edge = Annotated[int, msgspec.Meta(ge=1, le=_MAX_EDGE)]
_Sizes = _Edge | list[_Edge] | dict[str, _Edge | None]


class _File(msgspec.Struct):
    """The keys of the file that count; it may hold others."""

    image_processor_type: str | None = None
    feature_extractor_type: str | None = None
    do_resize: bool | None = None
    size: _Sizes | None = None
    max_size: _Edge | None = None
    resample: int | None = None
    crop_pct: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    keep_aspect_ratio: bool | None = None
    ensure_multiple_of: _Edge | None = None
    do_center_crop: bool | None = None
    crop_size: _Sizes | None = None
    do_rescale: bool | None = None
    rescale_factor: float | None = None
    rescale_offset: bool | None = None
    do_normalize: bool | None = None
    include_top: bool | None = None
    image_mean: float | list[float] | None = None
    image_std: float | list[float] | None = None
    do_pad: bool | None = None
    pad_and_return_pixel_mask: bool | None = None
    pad_size: _Sizes | None = None
    size_divisor: _Edge | None = None
    do_flip_channel_order: bool | None = None


class _Config(msgspec.Struct):
    model_type: str | None = None


class _Wrapper(msgspec.Struct):
    image_processor: _File | None = None


def image_settings(folder: Path) -> ImageSettings:
    """The settings of the image processor in a folder of a Hugging Face model.

    Args:
        folder: with ``preprocessor_config.json``, or ``processor_config.json`` of a model of images and texts.

    Raises:
        SourceError: no such file, or one that makes no sense.
        UnsupportedModelError: a processor, or a setting of one, that edgeq does not know.
    """
    path, file = _read_settings(folder)
    name = _processor_name(folder, path, file)
    known = _KNOWN.get(name)
    if known is None:
        raise UnsupportedModelError(
            f"{path} names the image processor {name!r}, which edgeq does not know",
            f"Prepare the arrays yourself; known are {', '.join(sorted(_KNOWN))}",
        )
    try:
        return _decide(name, known, file)
    except ValueError as error:
        raise SourceError(f"{path} makes no sense: {error}", "Download the model again") from error


def _read_settings(folder: Path) -> tuple[Path, _File]:
    own, shared = (folder / name for name in _FILES)
    if own.is_file():
        return own, _decode(own, read_bounded(own, _MAX_BYTES), _File)
    inner = _decode(shared, read_bounded(shared, _MAX_BYTES), _Wrapper).image_processor if shared.is_file() else None
    if inner is None:
        raise SourceError(
            f"{folder} holds no settings of an image processor ({own.name})",
            "Download the whole model, or give the inputs as .npz files",
        )
    return shared, inner


def _decode(path: Path, data: bytes, kind: type[S]) -> S:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SourceError(f"{path} makes no sense: {error}", "Download the model again") from error


def _processor_name(folder: Path, path: Path, file: _File) -> str:
    name = file.image_processor_type
    if name is None and file.feature_extractor_type is not None:
        name = file.feature_extractor_type.replace("FeatureExtractor", "ImageProcessor")
    if name is not None:
        return name.removesuffix("Fast").removesuffix("Pil")
    config = folder / "config.json"
    model_type = _decode(config, read_bounded(config, _MAX_BYTES), _Config).model_type if config.is_file() else None
    found = _OF_MODEL.get(model_type or "")
    if found is None:
        raise UnsupportedModelError(
            f"{path} does not name its image processor", "Add image_processor_type to it, as its model card has it"
        )
    return found


def _decide(name: str, known: _Known, file: _File) -> ImageSettings:
    """Settings from a file and the defaults of its processor; a ValueError says what makes no sense."""
    resample = known.resample if file.resample is None else file.resample
    if resample not in _FILTERS:
        message = f"resample is {resample}, and PIL's filters are 0 to {_FILTERS[-1]}"
        raise ValueError(message)
    resizes = file.do_resize is not False
    crops = "crop" not in known.lacks and _either(file.do_center_crop, known.crops)
    rescales = file.do_rescale is not False
    normalizes = "normalize" not in known.lacks and _either(file.do_normalize, known.normalizes)
    pads = "pad" not in known.lacks and _either(file.do_pad, file.pad_and_return_pixel_mask, known.pads)
    mean, std = (
        _triple(given, default) for given, default in zip((file.image_mean, file.image_std), known.values, strict=True)
    )
    if 0 in std:
        raise ValueError("image_std holds a zero")
    scale = 1 / 255 if file.rescale_factor is None else file.rescale_factor
    efficientnet = name == "EfficientNetImageProcessor"
    return ImageSettings(
        processor=name,
        rule=known.rule,
        size=_size(known, file) if resizes else None,
        resample=resample,
        crop=_crop(known, file) if crops else None,
        scale=scale if rescales else None,
        offset=int(efficientnet and rescales and bool(file.rescale_offset)),
        mean=mean if normalizes else None,
        std=std,
        std_again=efficientnet and file.include_top is not False,
        pad=_pair(_sized(file.pad_size, square=True)) if pads and file.pad_size is not None else None,
        pad_multiple=file.size_divisor if pads and known.rule == "dpt" else None,
        bgr=name == "MobileViTImageProcessor" and file.do_flip_channel_order is not False,
        crop_share=_crop_share(known, file),
        multiple=(file.size_divisor or 32) if known.rule == "glpn" else (file.ensure_multiple_of or 1),
        keep_ratio=bool(file.keep_aspect_ratio),
    )


def _either(*values: bool | None) -> bool:
    return next((value for value in values if value is not None), False)


def _crop_share(known: _Known, file: _File) -> float:
    if file.crop_pct is not None:
        return file.crop_pct
    return 0.9 if known.rule == "poolformer" else 224 / 256


def _triple(given: float | list[float] | None, default: Triple) -> Triple:
    if given is None:
        return default
    values = given if isinstance(given, list) else [given] * 3
    if len(values) != 3:
        message = f"image_mean and image_std hold {len(values)} numbers, and images have 3 channels"
        raise ValueError(message)
    return values[0], values[1], values[2]


def _size(known: _Known, file: _File) -> Mapping[str, int]:
    if known.rule == "glpn":
        return {}
    if file.size is None:
        return known.size
    size = _sized(file.size, square=known.square)
    if known.rule in {"detr", "yolos"} and size.keys() == {"shortest_edge"}:
        size = {**size, "longest_edge": file.max_size or _DETR_LONGEST}
    needed = {"convnext": {"shortest_edge"}, "dpt": {"height", "width"}}.get(known.rule)
    if needed is not None and size.keys() != needed:
        message = f"size has the keys {', '.join(sorted(size))}, and this processor wants {', '.join(sorted(needed))}"
        raise ValueError(message)
    return size


def _sized(size: int | list[int] | dict[str, int | None], *, square: bool) -> dict[str, int]:
    if isinstance(size, int):
        return _square(size) if square else _shortest(size)
    if isinstance(size, list):
        if len(size) != 2:
            message = f"a size has {len(size)} numbers instead of height and width"
            raise ValueError(message)
        return {"height": size[0], "width": size[1]}
    named = {key: value for key, value in size.items() if value is not None}
    if set(named) not in _SIZE_FORMS:
        message = f"a size has the keys {', '.join(sorted(named)) or 'none'}"
        raise ValueError(message)
    return named


def _crop(known: _Known, file: _File) -> Pair:
    if file.crop_size is not None:
        return _pair(_sized(file.crop_size, square=True))
    if known.crop is None:
        raise ValueError("do_center_crop is set without crop_size")
    return known.crop


def _pair(size: Mapping[str, int]) -> Pair:
    if size.keys() != {"height", "width"}:
        message = f"a size has the keys {', '.join(sorted(size))} instead of height and width"
        raise ValueError(message)
    return size["height"], size["width"]
