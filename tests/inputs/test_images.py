"""Against transformers' own processors, bit for bit."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from edgeq.errors import SourceError, UnsupportedModelError, UsageError
from edgeq.inputs import image_processor

transformers = pytest.importorskip("transformers")
Photo = Callable[[int, int], npt.NDArray[np.uint8]]

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
# As on the hub: google/vit, facebook/deit, facebook/convnext, google/efficientnet, google/mobilenet_v2, google/siglip,
# facebook/detr-resnet-50, hustvl/yolos, nvidia/segformer, Intel/dpt, depth-anything, facebook/dinov2, microsoft/resnet
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViT", {}),
    "vit-384": ("ViT", {"size": 384, "resample": 3}),
    "swin": ("ViT", {"size": {"height": 224, "width": 224}, "resample": 3, **IMAGENET}),
    "deit": ("DeiT", {"size": 256, "crop_size": 224, **IMAGENET}),
    "convnext-224": ("ConvNext", {"size": {"shortest_edge": 224}, "crop_pct": 0.875, **IMAGENET}),
    "convnext-384": ("ConvNext", {"size": 384, **IMAGENET}),
    "resnet": ("ConvNext", {"crop_pct": 0.875, "size": 224, **IMAGENET}),
    "efficientnet": ("EfficientNet", {"size": {"height": 224, "width": 224}, "resample": 0, **IMAGENET}),
    "efficientnet-crop": ("EfficientNet", {"do_center_crop": True, "include_top": False, "rescale_offset": True}),
    "mobilenet-v1": ("MobileNetV1", {}),
    "mobilenet-v2": ("MobileNetV2", {"size": {"shortest_edge": 256}}),
    "siglip": ("Siglip", {}),
    "clip": ("CLIP", {}),
    "dinov2": ("Bit", {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}, **IMAGENET}),
    "blip": ("Blip", {}),
    "detr": ("Detr", {"size": {"shortest_edge": 160, "longest_edge": 240}}),
    "detr-old": ("Detr", {"size": 160, "max_size": 266}),
    "detr-padded": ("Detr", {"size": {"height": 100, "width": 120}, "pad_size": {"height": 140, "width": 150}}),
    "detr-within": ("Detr", {"size": {"max_height": 170, "max_width": 190}}),
    "conditional-detr": ("ConditionalDetr", {"size": {"shortest_edge": 160, "longest_edge": 240}}),
    "deformable-detr": ("DeformableDetr", {"size": {"shortest_edge": 160, "longest_edge": 240}, "do_rescale": False}),
    "rt-detr": ("RTDetr", {}),
    "yolos": ("Yolos", {"size": {"shortest_edge": 160, "longest_edge": 240}}),
    "yolos-fixed": ("Yolos", {"size": {"height": 128, "width": 200}}),
    "segformer": ("Segformer", {"size": {"height": 128, "width": 128}}),
    "dpt": ("DPT", {"size": {"height": 192, "width": 192}}),
    "depth-anything": (
        "DPT",
        {"size": {"height": 196, "width": 196}, "keep_aspect_ratio": True, "ensure_multiple_of": 14, **IMAGENET},
    ),
    "dpt-padded": ("DPT", {"size": {"height": 190, "width": 170}, "do_pad": True, "size_divisor": 32}),
    "beit": ("Beit", {"do_center_crop": True, "crop_size": 200}),
    "mobilevit": ("MobileViT", {}),
    "glpn": ("GLPN", {}),
    "levit": ("Levit", {}),
    "poolformer": ("PoolFormer", {}),
    "poolformer-fixed": ("PoolFormer", {"size": {"height": 200, "width": 260}, "do_center_crop": False}),
    "pvt": ("Pvt", {}),
    "owlvit": ("OwlViT", {"size": 160, "crop_size": 160}),
    "unscaled": ("ViT", {"do_rescale": False, "do_normalize": False}),
    "as-it-is": ("ViT", {"do_resize": False}),
    "crop-larger": ("MobileNetV2", {"size": {"shortest_edge": 100}, "crop_size": {"height": 151, "width": 180}}),
}
SIZES = [(240, 320), (321, 239), (97, 400), (160, 160)]


def oracle(name: str, settings: dict[str, Any]) -> Any:
    return getattr(transformers, f"{name}ImageProcessorPil")(**settings)


@pytest.mark.parametrize("case", CASES)
def test_equal_to_transformers_bit_for_bit(case: str, photo: Photo, tmp_path: Path) -> None:
    theirs = oracle(*CASES[case])
    theirs.save_pretrained(tmp_path)
    ours = image_processor(tmp_path)
    sizes = {tuple(ours(photo(*size)).shape[2:]) for size in SIZES}
    assert ours.output_size == (sizes.pop() if len(sizes) == 1 else None)
    for size in SIZES:
        image = photo(*size)
        wanted = np.asarray(theirs(Image.fromarray(image), return_tensors="np")["pixel_values"])
        result = ours(image)
        assert result.dtype == np.float32
        assert result.flags.c_contiguous
        np.testing.assert_array_equal(result, wanted)


@pytest.mark.parametrize("case", ["vit", "dinov2", "detr", "convnext-224"])
def test_real_photos(case: str, tmp_path: Path) -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    theirs = oracle(*CASES[case])
    theirs.save_pretrained(tmp_path)
    ours = image_processor(tmp_path)
    for image in datasets.load_sample_images().images:
        wanted = np.asarray(theirs(Image.fromarray(image), return_tensors="np")["pixel_values"])
        np.testing.assert_array_equal(ours(image), wanted)


OLD_FILES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": (
        "ViT",
        {
            "do_normalize": True,
            "do_resize": True,
            "feature_extractor_type": "ViTFeatureExtractor",
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "resample": 2,
            "size": 224,
        },
    ),
    "deit": (
        "DeiT",
        {
            "crop_size": 224,
            "do_center_crop": True,
            "feature_extractor_type": "DeiTFeatureExtractor",
            "resample": 3,
            "size": 256,
            **IMAGENET,
        },
    ),
    "detr": (
        "Detr",
        {
            "do_normalize": True,
            "do_resize": True,
            "feature_extractor_type": "DetrFeatureExtractor",
            "format": "coco_detection",
            "max_size": 333,
            "size": 200,
            **IMAGENET,
        },
    ),
    "siglip-fast": ("Siglip", {"image_processor_type": "SiglipImageProcessorFast", "resample": 2, "size": [96, 64]}),
}


@pytest.mark.parametrize("case", OLD_FILES)
def test_files_of_older_transformers(case: str, photo: Photo, tmp_path: Path) -> None:
    name, settings = OLD_FILES[case]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    theirs = getattr(transformers, f"{name}ImageProcessorPil").from_pretrained(tmp_path)
    image = photo(210, 330)
    wanted = np.asarray(theirs(Image.fromarray(image), return_tensors="np")["pixel_values"])
    np.testing.assert_array_equal(image_processor(tmp_path)(image), wanted)


def write(folder: Path, **settings: Any) -> Path:
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "ViTImageProcessor", "size": 64, **settings})
    )
    return folder


def test_settings_inside_those_of_a_processor_of_images_and_texts(photo: Photo, tmp_path: Path) -> None:
    inner = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 64}, "crop_size": 64}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": inner}))
    assert image_processor(tmp_path)(photo(80, 90)).shape == (1, 3, 64, 64)


def test_a_file_that_names_no_processor_takes_that_of_the_model(photo: Photo, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text('{"size": 64}')
    with pytest.raises(UnsupportedModelError, match="does not name"):
        image_processor(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    assert image_processor(tmp_path)(photo(80, 90)).shape == (1, 3, 64, 64)


@pytest.mark.parametrize("mode", ["L", "P", "1", "LA", "RGBA", "CMYK"])
def test_every_mode_becomes_rgb_as_transformers_makes_it(mode: str, photo: Photo, tmp_path: Path) -> None:
    theirs = transformers.SiglipImageProcessorPil(size={"height": 48, "width": 48})
    theirs.save_pretrained(tmp_path)
    image = Image.fromarray(photo(60, 70)).convert(mode)
    if "A" in mode:
        image.putalpha(Image.fromarray(photo(60, 70)[..., 0]))
    wanted = theirs(image, return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(image_processor(tmp_path)(image), wanted)


@pytest.mark.parametrize("channels", [1, 4])
def test_arrays_of_other_channels(channels: int, photo: Photo, tmp_path: Path) -> None:
    theirs = transformers.SiglipImageProcessorPil(size={"height": 48, "width": 48})
    theirs.save_pretrained(tmp_path)
    image = np.concatenate([photo(60, 70), photo(60, 71)[:, 1:, :1]], axis=-1)[..., :channels]
    wanted = theirs(image, return_tensors="np", input_data_format="channels_last")["pixel_values"]
    ours = image_processor(tmp_path)
    np.testing.assert_array_equal(ours(image), wanted)
    if channels == 1:
        np.testing.assert_array_equal(ours(image[..., 0]), wanted)


def test_a_file_is_turned_upright(photo: Photo, tmp_path: Path) -> None:
    from transformers.image_utils import load_image

    ours = image_processor(write(tmp_path))
    theirs = transformers.ViTImageProcessorPil.from_pretrained(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.jpg"
    Image.fromarray(photo(50, 90)).save(path, exif=exif, quality=95)
    wanted = theirs(load_image(str(path)), return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(ours(path), wanted)
    np.testing.assert_array_equal(ours(str(path)), wanted)


def test_a_fixed_size_takes_the_whole_image(photo: Photo, tmp_path: Path) -> None:
    transformers.DetrImageProcessorPil().save_pretrained(tmp_path)
    processor = image_processor(tmp_path)
    assert processor.for_shape(("batch", 3, "height", "width")) is processor
    fixed = processor.for_shape((1, 3, 90, 120))
    assert fixed.for_shape((1, 3, 90, 120)) is fixed
    theirs = transformers.DetrImageProcessorPil(size={"height": 90, "width": 120})
    image = photo(300, 200)
    assert fixed.output_size == (90, 120)
    np.testing.assert_array_equal(fixed(image), theirs(Image.fromarray(image), return_tensors="np")["pixel_values"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "size"),
        ({"size": {"width": 3}}, "keys width"),
        ({"size": [1, 2, 3]}, "3 numbers"),
        ({"size": "large"}, "size"),
        ({"size": 1 << 40}, "size"),
        ({"resample": 9}, "resample is 9"),
        ({"image_mean": [0.5]}, "1 numbers"),
        ({"image_std": [0.5, 0, 0.5]}, "zero"),
        ({"do_resize": "yes"}, "do_resize"),
        ({"do_center_crop": True}, "crop_size"),
        ({"image_processor_type": "ConvNextImageProcessor", "size": {"height": 8, "width": 8}}, "shortest_edge"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=message) as caught:
        image_processor(write(tmp_path, **settings))
    assert "preprocessor_config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_files_that_are_no_settings(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_bytes(content)
    with pytest.raises(SourceError, match="makes no sense"):
        image_processor(tmp_path)


def test_no_settings_and_an_unknown_processor(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no settings of an image processor"):
        image_processor(tmp_path)
    write(tmp_path, image_processor_type="SamImageProcessor")
    with pytest.raises(UnsupportedModelError, match=r"SamImageProcessor.*does not know.*ViTImageProcessor"):
        image_processor(tmp_path)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((8, 8, 3), np.float32), "array of float32"),
        (np.zeros((3, 8, 8), np.uint8), "moveaxis"),
        (np.zeros((8, 8, 5), np.uint8), r"shape \(8, 8, 5\)"),
        (np.zeros((0, 8, 3), np.uint8), r"shape \(0, 8, 3\)"),
        (np.zeros(8, np.uint8), r"shape \(8,\)"),
        ([[1, 2]], "is a list"),
        (Image.new("I;16", (8, 8)), "more than 8 bits"),
        (Image.new("F", (8, 8)), "more than 8 bits"),
    ],
)
def test_what_is_no_image(image: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        image_processor(write(tmp_path))(image)


def test_an_image_too_narrow_for_the_size(tmp_path: Path) -> None:
    transformers.DetrImageProcessorPil().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="1 x 9000 would be resized to 0 x 1333"):
        image_processor(tmp_path)(np.zeros((1, 9000, 3), np.uint8))


def test_an_image_larger_than_what_it_is_padded_to(photo: Photo, tmp_path: Path) -> None:
    transformers.DetrImageProcessorPil(do_resize=False, pad_size={"height": 40, "width": 40}).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="50 x 20 pixels, and pad_size is 40 x 40"):
        image_processor(tmp_path)(photo(50, 20))


def _truncated(photo: Photo) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(photo(90, 90)).save(buffer, "JPEG")
    return buffer.getvalue()[:700]


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "truncated", "folder", "deep"])
def test_files_that_are_no_images(kind: str, photo: Photo, tmp_path: Path) -> None:
    ours = image_processor(write(tmp_path))
    path = tmp_path / "image.jpg"
    if kind == "folder":
        path.mkdir()
    elif kind == "deep":
        path = path.with_suffix(".png")
        Image.fromarray(photo(8, 8)[..., 0].astype(np.uint16) * 256).save(path)
    elif kind != "missing":
        path.write_bytes({"empty": b"", "text": b"hello" * 100, "truncated": _truncated(photo)}[kind])
    with pytest.raises(UsageError, match=r"image\.(jpg|png)") as caught:
        ours(path)
    assert "\n" not in str(caught.value)
