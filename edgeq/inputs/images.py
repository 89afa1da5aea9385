"""Images as the inputs of a model, equal to what transformers' PIL processors give, without transformers and torch."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgeq.errors import EdgeqError, UsageError, require_package
from edgeq.inputs.image_settings import ImageSettings, Rule, image_settings
from edgeq.inputs.image_sizes import Size, fit_both, fit_inside, fit_multiple, fit_shortest

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["ImageProcessor", "Pixels", "image_processor", "read_image"]

Pixels = npt.NDArray[np.uint8]

_MAX_PIXELS = 1 << 28
_CONVNEXT_WARPS_FROM = 384
_LEVIT_SHARE = 256 / 224
# Images whose sizes tell whether the output's size depends on them: lying, upright, long, small.
_PROBES = ((480, 640), (640, 480), (333, 1001), (97, 97))


def image_processor(folder: str | os.PathLike[str]) -> ImageProcessor:
    """The image processor of a Hugging Face folder or of a bundle.

    Args:
        folder: with ``preprocessor_config.json``.

    Raises:
        SourceError: no such file, or one that makes no sense.
        UnsupportedModelError: a processor that edgeq does not know.
        MissingPackageError: Pillow is not installed.
    """
    _pil()
    return ImageProcessor(image_settings(Path(folder)))


class ImageProcessor:
    """Prepares one image at a time. May be called from any thread.

    Attributes:
        settings: what it does.
    """

    def __init__(self, settings: ImageSettings) -> None:
        """Prepare the values of all 256 levels, so that a call only looks them up."""
        self.settings = settings
        self._levels = _levels(settings)

    @property
    def output_size(self) -> Size | None:
        """Height and width of what comes out; None if they depend on the image."""
        try:
            outcomes = {_planned(self.settings, probe) for probe in _PROBES}
        except UsageError:  # one of them is too small for the rule, so the image's size counts
            return None
        return outcomes.pop() if len(outcomes) == 1 else None

    def with_size(self, height: int, width: int) -> ImageProcessor:
        """The same processor for a model of one fixed size: images are resized to it whole, whatever their ratio."""
        size = {"height": height, "width": width}
        changed = dataclasses.replace(self.settings, rule="exact", size=size, crop=None, pad=None, pad_multiple=None)
        return ImageProcessor(changed)

    def for_shape(self, shape: Sequence[int | str]) -> ImageProcessor:
        """The processor for an input of a graph, (batch, channels, height, width) as numbers or names of axes.

        That is this one, unless height and width are fixed and are not what comes out: then that of `with_size`.
        """
        if len(shape) == 4 and isinstance(shape[2], int) and isinstance(shape[3], int):
            height, width = shape[2], shape[3]
            return self if self.output_size == (height, width) else self.with_size(height, width)
        return self

    def __call__(self, image: Pixels | Image.Image | str | os.PathLike[str]) -> npt.NDArray[np.float32]:
        """An image as a batch of one.

        Args:
            image: uint8 of (height, width, 3) in RGB, or with 1 or 4 channels; an image of Pillow; or a file.
                Transparent parts become white, except in files, whose transparency is ignored as
                ``transformers.image_utils.load_image`` does.

        Returns:
            float32 of (1, 3, height, width), contiguous.

        Raises:
            UsageError: a file that cannot be read, an array of another type or shape, or an image that the model's
                size makes too narrow.
        """
        pixels = _pixels(image)
        settings = self.settings
        if settings.size is not None:
            height, width, crop = _resized(settings, pixels.shape[:2])
            pixels = _resize(pixels, height, width, settings.resample)
            if crop is not None:
                pixels = _center(pixels, *crop)
        if settings.crop is not None:
            pixels = _center(pixels, *settings.crop)
        if settings.bgr:
            pixels = pixels[..., ::-1]
        values = np.empty((1, 3, *pixels.shape[:2]), np.float32)
        for channel in range(3):
            np.take(self._levels[channel], pixels[..., channel], out=values[0, channel], mode="clip")
        return _pad(values, settings)


def _levels(settings: ImageSettings) -> npt.NDArray[np.float32]:
    """What each level of each channel becomes, (3, 256), in the types and the order that transformers computes in."""
    levels = np.arange(256, dtype=np.uint8)[None].repeat(3, axis=0)
    values = levels.astype(np.float32)
    if settings.scale is not None:
        values = (levels.astype(np.float64) * settings.scale).astype(np.float32) - np.float32(settings.offset)
    std = np.array(settings.std, np.float32)[:, None]
    if settings.mean is not None:
        values = (values - np.array(settings.mean, np.float32)[:, None]) / std
    return values / std if settings.std_again else values


def _planned(settings: ImageSettings, image: Size) -> Size:
    """The size that comes out for an image of a size."""
    height, width = image
    if settings.size is not None:
        height, width, crop = _resized(settings, image)
        height, width = crop or (height, width)
    height, width = settings.crop or (height, width)
    if settings.pad is not None:
        return max(height, settings.pad[0]), max(width, settings.pad[1])
    multiple = settings.pad_multiple or 1
    return -(-height // multiple) * multiple, -(-width // multiple) * multiple


def _resized(settings: ImageSettings, image: tuple[int, ...]) -> tuple[int, int, Size | None]:
    """Height and width after resizing, and the crop that belongs to the rule."""
    size = _RULES.get(settings.rule, _plain)(settings, (image[0], image[1]))
    crop = None
    edge = (settings.size or {}).get("shortest_edge", 0)
    if settings.rule == "convnext" and edge < _CONVNEXT_WARPS_FROM:
        crop = (edge, edge)
    if min(size) < 1 or size[0] * size[1] > _MAX_PIXELS:
        raise UsageError(
            f"an image of {image[0]} x {image[1]} would be resized to {size[0]} x {size[1]}", "Cut the image first"
        )
    return *size, crop


def _glpn(settings: ImageSettings, image: Size) -> Size:
    return image[0] // settings.multiple * settings.multiple, image[1] // settings.multiple * settings.multiple


def _dpt(settings: ImageSettings, image: Size) -> Size:
    size = settings.size or {}
    wanted = size["height"], size["width"]
    return fit_multiple(image, wanted, settings.multiple, keep_ratio=settings.keep_ratio)


def _convnext(settings: ImageSettings, image: Size) -> Size:
    edge = (settings.size or {})["shortest_edge"]
    if edge >= _CONVNEXT_WARPS_FROM:
        return edge, edge
    return fit_shortest(image, int(edge / settings.crop_share))


def _levit(settings: ImageSettings, image: Size) -> Size:
    edge = (settings.size or {}).get("shortest_edge")
    return _plain(settings, image) if edge is None else fit_shortest(image, int(_LEVIT_SHARE * edge))


def _poolformer(settings: ImageSettings, image: Size) -> Size:
    size = settings.size or {}
    height, width = (size.get(side, size.get("shortest_edge", 0)) for side in ("height", "width"))
    grown = int(height / settings.crop_share), int(width / settings.crop_share)
    return fit_shortest(image, grown[0]) if height == width else grown


def _plain(settings: ImageSettings, image: Size) -> Size:
    size = settings.size or {}
    if "longest_edge" in size:
        return fit_both(image, size["shortest_edge"], size["longest_edge"], yolos=settings.rule == "yolos")
    if "shortest_edge" in size:
        return fit_shortest(image, size["shortest_edge"])
    if "max_height" in size:
        return fit_inside(image, (size["max_height"], size["max_width"]))
    return size["height"], size["width"]


# Of processors that do it differently.
_RULES: Mapping[Rule, Callable[[ImageSettings, Size], Size]] = {
    "convnext": _convnext,
    "dpt": _dpt,
    "glpn": _glpn,
    "levit": _levit,
    "poolformer": _poolformer,
}


def _resize(pixels: Pixels, height: int, width: int, resample: int) -> Pixels:
    # Pillow returns the image as it is where nothing changes, but copies it twice on the way.
    if pixels.shape[:2] == (height, width):
        return pixels
    pil = _pil()
    return np.asarray(pil.fromarray(np.ascontiguousarray(pixels)).resize((width, height), resample=resample))


def _center(pixels: Pixels, height: int, width: int) -> Pixels:
    """The middle of an image, with black around it where it is too small."""
    rows, columns = pixels.shape[:2]
    if rows < height or columns < width:
        larger = np.zeros((max(rows, height), max(columns, width), 3), np.uint8)
        # transformers rounds the border above and on the left up
        top, left = (len(larger) - rows + 1) // 2, (larger.shape[1] - columns + 1) // 2
        larger[top : top + rows, left : left + columns] = pixels
        # and takes the part that lies in the middle of the image, not of what surrounds it
        top, left = top + (rows - height) // 2, left + (columns - width) // 2
        return larger[max(0, top) : top + height, max(0, left) : left + width]
    top, left = (rows - height) // 2, (columns - width) // 2
    return pixels[top : top + height, left : left + width]


def _pad(values: npt.NDArray[np.float32], settings: ImageSettings) -> npt.NDArray[np.float32]:
    height, width = values.shape[2:]
    if settings.pad is not None:
        if height > settings.pad[0] or width > settings.pad[1]:
            raise UsageError(
                f"a resized image has {height} x {width} pixels, and pad_size is {settings.pad[0]} x {settings.pad[1]}",
                "Set a larger pad_size in preprocessor_config.json",
            )
        below, right = settings.pad[0] - height, settings.pad[1] - width
        return np.pad(values, ((0, 0), (0, 0), (0, below), (0, right)))
    if settings.pad_multiple is not None:
        missing = -height % settings.pad_multiple, -width % settings.pad_multiple
        around = [(lack // 2, lack - lack // 2) for lack in missing]
        return np.pad(values, ((0, 0), (0, 0), *around))
    return values


def read_image(path: str | os.PathLike[str]) -> Pixels:
    """A file as uint8 of (height, width, 3) in RGB, turned upright as its EXIF data say.

    Raises:
        UsageError: no image, a broken one, or one with more than 8 bits a channel.
        MissingPackageError: Pillow is not installed.
    """
    pil = _pil()
    operations = require_package("PIL.ImageOps", "perception", "to read images")
    name = os.fspath(path)
    try:
        with pil.open(name) as image:
            _refuse_deep(image.mode, name)
            return np.asarray(operations.exif_transpose(image).convert("RGB"))
    except EdgeqError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever broken data makes them
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UsageError(f"{name} cannot be read as an image: {reason}", "Remove it, or save it again") from error


def _pixels(image: Pixels | Image.Image | str | os.PathLike[str]) -> Pixels:
    """Any image as uint8 of (height, width, 3) in RGB."""
    if isinstance(image, np.ndarray):
        return _from_array(image)
    if isinstance(image, (str, os.PathLike)):
        return read_image(image)
    pil = _pil()
    if not isinstance(image, pil.Image):
        raise UsageError(
            f"an image is a {type(image).__name__}", "Give a uint8 array (height, width, 3), a PIL image or a path"
        )
    return _from_pil(image, pil)


def _from_array(image: npt.NDArray[Any]) -> Pixels:
    if image.dtype != np.uint8:
        raise UsageError(f"an image is an array of {image.dtype}", "Give uint8 from 0 to 255")
    if image.ndim == 2:
        image = image[..., None]
    if image.ndim != 3 or image.shape[-1] not in {1, 3, 4} or 0 in image.shape:
        remedy = "Give (height, width, 3)"
        if image.ndim == 3 and image.shape[0] in {1, 3, 4}:
            remedy += ", as numpy.moveaxis(image, 0, -1) makes it"
        raise UsageError(f"an image is an array of the shape {image.shape}", remedy)
    if image.shape[-1] == 1:
        return image.repeat(3, axis=-1)
    if image.shape[-1] == 4:
        opaque = image[..., 3:] / 255
        blended: Pixels = np.round(opaque * image[..., :3] + (1 - opaque) * 255).astype(np.uint8)
        return blended
    return image


def _from_pil(image: Image.Image, pil: ModuleType) -> Pixels:
    _refuse_deep(image.mode, "an image")
    try:
        if "A" in image.getbands() or image.info.get("transparency") is not None:
            image = image.convert("RGBA")
            image = pil.alpha_composite(pil.new("RGBA", image.size, (255, 255, 255, 255)), image)
        return np.asarray(image.convert("RGB"))
    except Exception as error:  # files are decoded here at last, and decoders raise whatever broken data makes them
        raise UsageError(f"an image cannot be read: {error}", "Remove it, or save it again") from error


def _refuse_deep(mode: str, what: str) -> None:
    # Pillow would cut such values off at 255 instead of scaling them.
    if mode == "F" or mode.startswith("I"):
        raise UsageError(f"{what} has more than 8 bits a channel (mode {mode})", "Scale it to 8 bits and save it again")


def _pil() -> ModuleType:
    return require_package("PIL.Image", "perception", "to read and resize images")
