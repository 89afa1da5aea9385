"""Curvatures on disk: matrices that multiply the same input share one array of correlations, here as in memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from edgeq.converters.gguf.header import GgufHeader
from edgeq.converters.gguf.sensitivity.curvature import Curvature
from edgeq.disk_cache import DiskCache

__all__ = ["keep_curvatures", "load_curvatures"]


class _Record(msgspec.Struct, frozen=True):
    rows: bytes
    columns: bytes
    activation_kld: dict[int, float]
    correlation: int | None


class _Records(msgspec.Struct, frozen=True):
    by_tensor: dict[str, _Record]
    correlations: list[bytes]


def keep_curvatures(cache: DiskCache, key: str, by_tensor: Mapping[str, Curvature]) -> None:
    """Keep curvatures under a key that names everything that they depend on."""
    places: dict[int, int] = {}
    arrays: list[bytes] = []
    records = {}
    for name, c in by_tensor.items():
        place = None
        if c.correlation is not None:
            place = places.setdefault(id(c.correlation), len(arrays))
            if place == len(arrays):
                arrays.append(c.correlation.tobytes())
        records[name] = _Record(c.rows.tobytes(), c.columns.tobytes(), dict(c.activation_kld), place)
    cache.put(f"curvature-{key}", _Records(records, arrays))


def load_curvatures(
    cache: DiskCache, key: str, header: GgufHeader, names: Sequence[str]
) -> dict[str, Curvature] | None:
    """The curvatures of these matrices in that order, or None if one is missing or does not fit the header."""
    kept = cache.get(f"curvature-{key}", _Records)
    if kept is None or not set(names) <= set(kept.by_tensor):
        return None
    flat = [np.frombuffer(data, np.float16) for data in kept.correlations]
    matrices = [array.reshape(math.isqrt(array.size), -1) for array in flat]
    result = {}
    for name in names:
        record, (n_columns, *others) = kept.by_tensor[name], header.tensors[name].shape
        rows, columns = np.frombuffer(record.rows, np.float32), np.frombuffer(record.columns, np.float32)
        if len(rows) != math.prod(others) or len(columns) != n_columns:
            return None
        correlation = None if record.correlation is None else matrices[record.correlation]
        result[name] = Curvature(rows, columns, record.activation_kld, correlation)
    return result
