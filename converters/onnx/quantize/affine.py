"""The arithmetic of quantization: scales, zero points, rounding and clipping, exactly as ONNX defines them.

``QuantizeLinear``: ``saturate(round_half_even(x / scale) + zero_point)``; ``DequantizeLinear``:
``(q - zero_point) * scale`` (https://onnx.ai/onnx/operators/onnx__QuantizeLinear.html).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from edgeq.errors import ConversionError

__all__ = [
    "FP8_MAX",
    "Affine",
    "Bounds",
    "IntType",
    "affine_of",
    "fake_quantize",
    "least_scales",
    "quantize",
    "quantize_bias",
    "quantize_weight",
]

IntType = Literal["uint8", "int8"]

FP8_MAX = 448.0  # the largest finite number of float8e4m3fn
# Two of them still multiply to a normal float32, which the scale of a bias is.
_LEAST_SCALE = 2.0**-60
# A bias is an int32, and the sum that it is added to must not overflow either.
_LARGEST_BIAS = 2.0**30


class Bounds(Protocol):
    """Least and largest element of a tensor."""

    @property
    def low(self) -> float:
        """The least."""
        ...

    @property
    def high(self) -> float:
        """The largest."""
        ...


@dataclasses.dataclass(frozen=True)
class Affine:
    """How a tensor is put on a grid of 8-bit integers.

    Attributes:
        scale: of one step; exactly a float32.
        zero_point: the integer that stands for 0.
        dtype: of the integers.
    """

    scale: float
    zero_point: int
    dtype: IntType


def affine_of(name: str, bounds: Bounds, dtype: IntType, *, symmetric: bool) -> Affine:
    """The grid that holds a range of numbers, and 0 exactly.

    Args:
        name: of the tensor, for errors.
        bounds: of its elements; 0 is added to them.
        dtype: of the integers.
        symmetric: whether the zero point must be 0; then -128 is not used.

    Raises:
        ConversionError: bounds that are not finite, or in the wrong order.
    """
    low, high = float(bounds.low), float(bounds.high)
    if not (math.isfinite(low) and math.isfinite(high)) or low > high:
        raise ConversionError(
            f"The range of {name!r} is {low:g} to {high:g}", "Calibrate with inputs that give finite numbers"
        )
    low, high = min(low, 0.0), max(high, 0.0)
    least = -128 if dtype == "int8" else 0
    if symmetric:
        if dtype != "int8":
            raise ConversionError("A symmetric grid has signed integers", "Choose s8 activations")
        return Affine(_scale(max(-low, high) / 127), 0, dtype)
    scale = _scale((high - low) / 255)
    zero_point = least + round(min(max(-low / scale, 0.0), 255.0))
    return Affine(scale, zero_point, dtype)


def _scale(step: float) -> float:
    return float(np.float32(max(step, _LEAST_SCALE))) if step > 0 else 1.0


def quantize(x: NDArray[Any], affine: Affine) -> NDArray[Any]:
    """``QuantizeLinear`` of a whole tensor, in float32 as runtimes compute it."""
    info = np.iinfo(affine.dtype)
    steps = np.rint(x.astype(np.float32) / np.float32(affine.scale)) + affine.zero_point
    integers: NDArray[Any] = np.clip(steps, info.min, info.max).astype(affine.dtype)
    return integers


def fake_quantize(x: NDArray[Any], affine: Affine) -> NDArray[np.float32]:
    """What a tensor is after it was put on a grid: ``DequantizeLinear`` of `quantize`."""
    steps = quantize(x, affine).astype(np.int32) - affine.zero_point
    floats: NDArray[np.float32] = steps.astype(np.float32) * np.float32(affine.scale)
    return floats


def quantize_weight(
    weight: NDArray[Any], axis: int, *, steps: int = 127, least: NDArray[Any] | None = None
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Symmetric INT8 with a scale for each output channel.

    Args:
        weight: floats.
        axis: of output channels.
        steps: the largest integer; 63 where products of two bytes are added up in 16 bits.
        least: the smallest scale that each channel may have, shape [channels].

    Returns:
        Integers of the weight's shape, scales of shape [channels]. A channel of zeros has scale 1.
    """
    moved = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)
    peaks = np.abs(moved).max(axis=1, initial=0.0).astype(np.float64)
    scales = np.maximum(peaks / steps, 0.0 if least is None else least)
    scales = np.where(scales > 0, np.maximum(scales, _LEAST_SCALE), 1.0).astype(np.float32)
    shape = [1] * weight.ndim
    shape[axis] = -1
    integers = np.rint(weight.astype(np.float32) / scales.reshape(shape))
    return np.clip(integers, -steps, steps).astype(np.int8), scales


def least_scales(bias: NDArray[Any], input_scale: float) -> NDArray[np.float64]:
    """The smallest weight scales at which a bias fits into the 32-bit sum of its channel."""
    least: NDArray[np.float64] = np.abs(bias.astype(np.float64)) / (input_scale * _LARGEST_BIAS)
    return least


def quantize_bias(
    bias: NDArray[Any], input_scale: float, weight_scales: NDArray[np.float32]
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """A bias in steps of the products that it is added to.

    Args:
        bias: floats, shape [channels].
        input_scale: of the activation.
        weight_scales: shape [channels].

    Returns:
        Integers and their scales, shape [channels] each.
    """
    scales = (np.float32(input_scale) * weight_scales).astype(np.float32)
    info = np.iinfo(np.int32)
    steps = np.rint(bias.astype(np.float64) / scales.astype(np.float64))
    return np.clip(steps, info.min, info.max).astype(np.int32), scales
