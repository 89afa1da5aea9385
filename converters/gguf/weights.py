"""Weights from a checkpoint's dtype to the GGUF's, a few megabytes at a time, with every value looked at."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from edgeq.converters.checkpoint import Checkpoint, RawArray, TensorEntry
from edgeq.converters.gguf.architectures.base import Floats
from edgeq.converters.gguf.layout import PlannedTensor
from edgeq.errors import ConversionError, SourceError

__all__ = ["OutOfRangeError", "chunks", "interleave_halves"]

# 4 Mi weights: at most 16 MB each as read, as f32 and as written.
_CHUNK_WEIGHTS = 1 << 22
_EXPONENT = {"F32": np.uint32(0x7F800000), "F16": np.uint16(0x7C00), "BF16": np.uint16(0x7F80)}


class OutOfRangeError(ConversionError):
    """A finite weight is too large for the type that it should be stored in."""


def chunks(checkpoint: Checkpoint, planned: PlannedTensor, kind: str) -> Iterator[npt.NDArray[np.generic]]:
    """The tensor's data in order, little endian, in pieces of whole rows.

    Args:
        checkpoint: where it is read from.
        planned: the tensor.
        kind: ``"f32"``, ``"f16"`` or ``"bf16"`` (as uint16): what to store, in place of ``planned.type``.

    Raises:
        SourceError: it holds NaN or infinity; the whole tensor is read to count them.
        OutOfRangeError: a finite weight does not fit ``kind``.
    """
    if not isinstance(planned.source, TensorEntry):
        yield planned.source.astype("<f4")
        return
    entry = planned.source
    rows, step = entry.shape[0], _rows_per_chunk(planned)
    bad = 0
    for start in range(0, rows, step):
        raw = checkpoint.read_rows(entry.name, start, min(start + step, rows))
        bad += _count_not_finite(raw, entry.dtype)
        if bad == 0:
            if planned.interleave:
                raw = interleave_halves(raw, planned.interleave)
            yield _convert(raw, entry, kind, planned.add)
    if bad:
        raise SourceError(
            f"{entry.name} holds {bad} weights that are NaN or infinite", "Use a checkpoint that is not damaged"
        )


def _rows_per_chunk(planned: PlannedTensor) -> int:
    row = max(1, int(np.prod(planned.shape[1:], dtype=np.int64)))
    together = planned.interleave or 1
    return max(1, _CHUNK_WEIGHTS // (row * together)) * together


def _count_not_finite(raw: RawArray, dtype: str) -> int:
    """How many have all exponent bits set, in any of the three formats."""
    mask = _EXPONENT[dtype]
    bits = raw.view(mask.dtype)
    return int(np.count_nonzero((bits & mask) == mask))


def interleave_halves(rows: RawArray, head: int) -> RawArray:
    """Put row j of each head's first half before row j of its second half.

    Args:
        rows: whole heads of ``head`` rows, shape (heads * head, ...).
        head: rows of a head, even.

    Returns:
        The same rows in the order in which ``LLAMA_ROPE_TYPE_NORM`` rotates neighbours.
    """
    halves = rows.reshape(-1, 2, head // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


def _convert(raw: RawArray, entry: TensorEntry, kind: str, add: float) -> npt.NDArray[np.generic]:
    if entry.dtype.lower() == kind and add == 0.0:
        return raw
    values = _to_f32(raw, entry.dtype)
    if add != 0.0:
        values = values + np.float32(add)
    if kind == "f32":
        return values.astype("<f4", copy=False)
    if kind == "bf16":
        return _to_bf16(values, entry.name)
    with np.errstate(over="ignore"):
        halves = values.astype("<f2")
    if not np.isfinite(halves).all():
        raise OutOfRangeError(f"{entry.name} holds weights beyond the range of f16", "Store the model in bf16 or f32")
    return halves


def _to_f32(raw: RawArray, dtype: str) -> Floats:
    if dtype == "BF16":
        return np.left_shift(raw.astype(np.uint32), 16, dtype=np.uint32).view(np.float32)
    return raw.astype(np.float32)


def _to_bf16(values: Floats, name: str) -> npt.NDArray[np.uint16]:
    """Round to the nearest, ties to even: what torch and ggml do."""
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    halves: npt.NDArray[np.uint16] = rounded.astype("<u2")
    if _count_not_finite(halves, "BF16"):
        raise OutOfRangeError(f"{name} holds weights beyond the range of bf16", "Store the model in f32")
    return halves
