"""What the probe measured on a machine, point by point; `edgeq.profiles` measures them and says what lies between."""

from __future__ import annotations

from typing import Annotated

import msgspec

from edgeq.record import Count, Record, Threads

__all__ = ["AttentionPoint", "BandwidthPoint", "MatmulPoint"]

_Positive = Annotated[float, msgspec.Meta(gt=0, lt=1e18)]
_Spread = Annotated[float, msgspec.Meta(ge=0, lt=1e6)]
_Size = Annotated[int, msgspec.Meta(ge=1, le=2**48)]
_Times = Annotated[int, msgspec.Meta(ge=1)]


class BandwidthPoint(Record, frozen=True, kw_only=True):
    """What so many threads together move between processor and memory.

    Attributes:
        threads: that worked at once, each on a part of its own.
        triad_bytes_per_s: of STREAM's triad ``a = b + s * c``, three words an element as STREAM counts.
        read_bytes_per_s: of reading alone, which is what decoding does with weights.
        spread: half the distance between the quartiles, as a share: the larger of the two.
        buffer_bytes: of each of the triad's three arrays.
        n: times that were measured.
    """

    threads: Threads
    triad_bytes_per_s: _Positive
    read_bytes_per_s: _Positive
    spread: _Spread
    buffer_bytes: _Size
    n: _Times


class MatmulPoint(Record, frozen=True, kw_only=True):
    """The speed of one matrix with many vectors at once, as a prompt is read.

    Attributes:
        type: of the weights.
        columns: length of a row.
        rows: length of each result.
        batch: vectors.
        threads: that worked.
        flops_per_s: two for a multiply-add, whether of integers or of floats.
        spread: half the distance between the quartiles, as a share.
        n: times that were measured.
        buffer: llama.cpp's name for the memory that held it; ``"CPU_REPACK"`` and its like hold another layout.
    """

    type: str
    columns: _Size
    rows: _Size
    batch: _Size
    threads: Threads
    flops_per_s: _Positive
    spread: _Spread
    n: _Times
    buffer: str

    @property
    def ns(self) -> float:
        """The time of the product."""
        return 2e9 * self.columns * self.rows * self.batch / self.flops_per_s


class AttentionPoint(Record, frozen=True, kw_only=True):
    """The time of attention in one layer: rotate and store keys and values, attend, rotate back.

    Attributes:
        kv_type: of keys and values in the cache.
        head_dim: values of one head.
        n_heads: query heads.
        n_kv_heads: heads of keys and values.
        n_tokens: that attend at once: 1 when a token is decoded.
        n_cached: tokens in the cache before them.
        threads: that worked.
        ns: the time, caches read from memory as a model's many layers make it.
        spread: half the distance between the quartiles, as a share.
        n: times that were measured.
    """

    kv_type: str
    head_dim: _Size
    n_heads: _Size
    n_kv_heads: _Size
    n_tokens: _Size
    n_cached: Count
    threads: Threads
    ns: _Positive
    spread: _Spread
    n: _Times
