"""Rows of weights to ggml's blocks and back, by ggml's own code, so that what is judged is what will be written."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from edgeq.errors import ConversionError
from edgeq.ggml_library import ggml_call
from edgeq.ggml_types import ggml_type

__all__ = ["dequantize", "quantize_rows"]

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


def quantize_rows(rows: Floats, type_name: str, importance: Floats | None = None) -> Bytes:
    """``ggml_quantize_chunk`` of whole rows; it releases the GIL, so threads may share the work.

    Args:
        rows: finite float32 of (n_rows, n_columns).
        type_name: any type whose block divides ``n_columns``.
        importance: float32 of (n_columns,), the weight of each column's squared error; None for ggml's own default.

    Returns:
        uint8 of (n_rows, row bytes).

    Raises:
        ConversionError: a type that needs ``importance`` got none, or ggml wrote another number of bytes.
        ValueError: the block does not divide the rows, where ggml would end the process; or ``importance`` is of
            another length.
    """
    kind = ggml_type(type_name)
    if kind.needs_imatrix and importance is None:
        raise ConversionError(f"{kind.name} needs an importance matrix", "Give one with --imatrix, or another type")
    n_rows, n_columns = rows.shape
    if not kind.fits(n_columns):
        message = f"rows of {n_columns} weights have no blocks of {kind.block_weights}"
        raise ValueError(message)
    if importance is not None and importance.shape != (n_columns,):
        message = f"importance of {importance.shape} for rows of {n_columns}"
        raise ValueError(message)
    source = np.ascontiguousarray(rows, np.float32)
    weights = None if importance is None else np.ascontiguousarray(importance, np.float32)
    out = np.empty((n_rows, kind.row_bytes(n_columns)), np.uint8)
    written = ggml_call(
        "ggml_quantize_chunk",
        kind.id,
        source.ctypes.data,
        out.ctypes.data,
        0,
        n_rows,
        n_columns,
        weights.ctypes.data if weights is not None else None,
    )
    if written != out.nbytes:
        raise ConversionError(
            f"ggml wrote {written} bytes of {kind.name} where {out.nbytes} belong", "Report this with the model's name"
        )
    return out


@functools.cache
def _to_float(type_id: int) -> Callable[[int, int, int], None]:
    traits = ggml_call("ggml_get_type_traits", type_id).contents
    address = ctypes.cast(traits.to_float, ctypes.c_void_p).value
    if address is None:
        message = f"ggml has no conversion of type {type_id} to floats"
        raise ConversionError(message, "Install a llama-cpp-python that edgeq was tested with")
    prototype = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
    function: Callable[[int, int, int], None] = prototype(address)
    return function


def dequantize(blocks: Bytes, type_name: str, n_columns: int) -> Floats:
    """What ggml's kernels take blocks for.

    Args:
        blocks: uint8 of (n_rows, row bytes), C-contiguous.
        type_name: of the blocks.
        n_columns: weights in a row.

    Returns:
        float32 of (n_rows, n_columns).
    """
    kind = ggml_type(type_name)
    if kind.name == "f32":
        plain: Floats = blocks.view(np.float32).reshape(len(blocks), n_columns).copy()
        return plain
    out = np.empty((len(blocks), n_columns), np.float32)
    _to_float(kind.id)(blocks.ctypes.data, out.ctypes.data, out.size)
    return out
