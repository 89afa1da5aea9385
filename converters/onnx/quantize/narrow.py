"""Weights for CPUs that add two products of bytes in 16 bits: as many steps as never overflow.

``vpmaddubsw`` (https://www.felixcloutier.com/x86/pmaddubsw) multiplies unsigned activations by signed weights and
saturates the sum of two neighbours at 32,767. With 63 steps nothing overflows, whatever the weights are. But only
neighbours of one sign add up, and large ones are rare: it is enough that the two largest of one sign among each four
inputs have at most 128 steps together, since 255 times 128 is 32,640. ONNX Runtime's kernels for matrix products pack
four inputs into one word, of which two and two are added up.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.onnx.quantize.affine import quantize_weight

__all__ = ["quantize_narrow"]

_GROUP = 4
_MOST_TOGETHER = 128
_SAFE, _MOST = 63, 127


def quantize_narrow(
    weight: NDArray[Any], axis: int, *, least: NDArray[Any] | None = None
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Like `quantize_weight`, each output channel with the most steps, of 63 to 127, whose sums fit into 16 bits.

    Args:
        weight: floats of two axes, those of a matrix product.
        axis: of output channels.
        least: the smallest scale that each channel may have, shape [channels].

    Returns:
        Integers of the weight's shape, scales of shape [channels].
    """
    peaks = np.abs(weight).max(axis=1 - axis, initial=0.0).astype(np.float64)
    floor = np.zeros(peaks.shape) if least is None else least.astype(np.float64)
    integers, scales = quantize_weight(weight, axis, steps=_SAFE, least=floor)
    left = np.arange(weight.shape[axis])
    for steps in range(_MOST, _SAFE, -1):
        part = np.take(weight, left, axis=axis)
        found, wider = quantize_weight(part, axis, steps=_MOST, least=np.maximum(peaks / steps, floor)[left])
        fits = _fits(found if axis == 1 else found.T)
        done = left[fits]
        scales[done] = wider[fits]
        if axis == 1:
            integers[:, done] = found[:, fits]
        else:
            integers[done] = found[fits]
        left = left[~fits]
        if not left.size:
            break
    return integers, scales


def _fits(integers: NDArray[np.int8]) -> NDArray[np.bool_]:
    """Of integers of shape [inputs, channels], whether no two of one sign in a group are too large together."""
    inputs, channels = integers.shape
    padded = np.zeros((-(-inputs // _GROUP) * _GROUP, channels), np.int16)
    padded[:inputs] = integers
    ordered = np.sort(padded.reshape(-1, _GROUP, channels), axis=1)
    positive = np.maximum(ordered[:, -2:], 0).sum(axis=1).max(axis=0, initial=0)
    negative = np.minimum(ordered[:, :2], 0).sum(axis=1).min(axis=0, initial=0)
    fits: NDArray[np.bool_] = (positive <= _MOST_TOGETHER) & (negative >= -_MOST_TOGETHER)
    return fits
