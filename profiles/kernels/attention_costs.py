"""The rule between measured points of attention: what a layer costs at other lengths, batches and heads.

llama.cpp's CPU backend has three kernels (``ggml_compute_forward_flash_attn_ext_f16`` in ops.cpp). One token over a
cache of f16 shares the cells among the threads, once there are 512. From 64 tokens on, a cache of f16 is worked on in
tiles of 64 by 64. All else goes row by row, a row being one token in one query head, and the rows are shared out.
In each the time is a fixed part and a part for each cell that is visible. The latter grows where the cache of a head no
longer fits in the processor's, and differs by the layout of a cell: hence points, and straight lines between them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal

from edgeq.errors import UsageError
from edgeq.ggml_types import ggml_type
from edgeq.probe_points import AttentionPoint

__all__ = ["AttentionShape", "Kernel", "attention_kernel", "attention_ns"]

Kernel = Literal["token", "rows", "tiles"]

_FLOATS = "f16"
_TILE = 64  # GGML_FA_TILE_Q and GGML_FA_TILE_KV
_SPLIT_CELLS = 512
_CHUNKS_PER_THREAD = 4
_PAD_CELLS = 256
# A wrong head size is worse than a wrong ratio of heads: it alone decides which vector code runs.
_HEAD_DIM_WEIGHT = 2.0


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """The heads of a layer.

    Attributes:
        head_dim: values of one head.
        n_heads: query heads.
        n_kv_heads: heads of keys and values.
    """

    head_dim: int
    n_heads: int
    n_kv_heads: int


def attention_kernel(kv_type: str, n_tokens: int) -> Kernel:
    """Which points belong together: one token, rows one by one, or tiles.

    Raises:
        UsageError: no such type.
    """
    kind = _computed_as(kv_type)
    if n_tokens == 1:
        return "token"
    return "tiles" if kind == _FLOATS and n_tokens >= _TILE else "rows"


def _computed_as(kv_type: str) -> str:
    """The type whose kernel runs: a cache of f32 is copied to f16 first, which is little beside attention."""
    name = ggml_type(kv_type).name
    return _FLOATS if name == "f32" else name


def attention_ns(
    points: Sequence[AttentionPoint],
    kv_type: str,
    shape: AttentionShape,
    *,
    n_tokens: int,
    n_cached: int,
    threads: int,
) -> float:
    """Nanoseconds that one layer takes for attention.

    Points of the same type, threads and kernel count, of the shape that is nearest in size, ratio and number of heads.
    Between them the time of a row is linear in the cells that it sees; beyond the last it goes on as before it.

    Args:
        points: as measured.
        kv_type: of keys and values.
        shape: of the layer.
        n_tokens: that attend at once.
        n_cached: tokens in the cache before them.
        threads: that work.

    Raises:
        UsageError: no such type, or nothing was measured that could say.
    """
    name, kernel = _computed_as(kv_type), attention_kernel(kv_type, n_tokens)
    known = [
        p for p in points if p.kv_type == name and p.threads == threads and attention_kernel(name, p.n_tokens) == kernel
    ]
    if not known:
        raise UsageError(
            f"attention over a cache of {name} was not measured for {n_tokens} tokens on {threads} threads",
            "Choose another --kv-type, or probe the device again",
        )
    nearest = min(
        {_shape(p) for p in known}, key=lambda other: (_distance(shape, other), other.head_dim, other.n_heads)
    )
    line = {
        _visible(kernel, p.n_tokens, p.n_cached): p.ns / _rows(name, nearest, p.n_tokens, p.n_cached, threads)
        for p in sorted(known, key=lambda p: p.ns, reverse=True)
        if _shape(p) == nearest
    }
    row_ns = _along(line, _visible(kernel, n_tokens, n_cached)) * shape.head_dim / nearest.head_dim
    return row_ns * _rows(name, shape, n_tokens, n_cached, threads)


def _shape(point: AttentionPoint) -> AttentionShape:
    return AttentionShape(point.head_dim, point.n_heads, point.n_kv_heads)


def _distance(one: AttentionShape, other: AttentionShape) -> float:
    """Zero for equal shapes; the bytes of a cell and the queries that share it decide what comes from which cache."""

    def apart(a: float, b: float) -> float:
        return abs(math.log2(a / b))

    return (
        _HEAD_DIM_WEIGHT * apart(one.head_dim, other.head_dim)
        + apart(one.n_heads / one.n_kv_heads, other.n_heads / other.n_kv_heads)
        + apart(one.n_kv_heads * one.head_dim, other.n_kv_heads * other.head_dim)
    )


def _visible(kernel: Kernel, n_tokens: int, n_cached: int) -> float:
    """Cells that a row is worked on with on average: a token sees what came before it and itself, tiles whole tiles."""
    if kernel != "tiles":
        return n_cached + (n_tokens + 1) / 2
    lasts = [n_cached + min(last, n_tokens) for last in range(_TILE, n_tokens + _TILE, _TILE)]
    return sum(-(-last // _TILE) * _TILE for last in lasts) / len(lasts)


def _rows(kv_type: str, shape: AttentionShape, n_tokens: int, n_cached: int, threads: int) -> float:
    """Rows of work that the thread with the most has to do."""
    kernel = attention_kernel(kv_type, n_tokens)
    if kernel == "tiles":
        return -(-n_tokens // _TILE) * _TILE * shape.n_heads / threads
    rows = n_tokens * shape.n_heads
    cells = -(-(n_cached + n_tokens) // _PAD_CELLS) * _PAD_CELLS
    if kernel == "token" and ggml_type(kv_type).name == _FLOATS and cells >= _SPLIT_CELLS:
        return rows / threads
    return _most_rows(rows, threads)


def _most_rows(rows: int, threads: int) -> int:
    """Rows of the busiest thread: ggml hands out about four chunks for each thread, in turn."""
    chunk = -(-rows // (_CHUNKS_PER_THREAD * threads))
    chunks = -(-rows // chunk)
    if threads == 1 or chunks < threads:
        chunks = threads
    chunk = -(-rows // chunks)
    shares = [0] * threads
    for index in range(chunks):
        shares[index % threads] += max(0, min(chunk, rows - index * chunk))
    return max(shares)


def _along(line: Mapping[float, float], cells: float) -> float:
    """The time of a row that sees so many cells, on straight lines through the times by cells."""
    marks = sorted(line)
    if len(marks) == 1:
        return line[marks[0]] * cells / marks[0]
    right = next((i for i in range(1, len(marks)) if cells <= marks[i]), len(marks) - 1)
    x0, x1 = marks[right - 1], marks[right]
    y0, y1 = line[x0], line[x1]
    slope = (y1 - y0) / (x1 - x0)
    if cells > x1:
        return y1 + max(0.0, slope) * (cells - x1)  # noise must not make a longer cache cheaper
    if cells < x0:
        return max(y0 + slope * (cells - x0), y0 * cells / x0)  # a fixed part is not below zero
    return y0 + slope * (cells - x0)
