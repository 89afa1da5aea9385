"""Nats for each (tensor, type): ggml's own blocks, read back and weighted by the curvature.

What is written is a little better, since its blocks are made again (`edgeq.converters.gguf.sensitivity.compensate`).
Each entry is made once and cached on disk under everything that it depends on, so that an interrupted search goes on
where it was and a further budget costs nothing.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import as_completed

import msgspec
import numpy as np
import numpy.typing as npt

from edgeq.converters.gguf.header import GgufHeader
from edgeq.converters.gguf.sensitivity.curvature import Curvature, Curvatures
from edgeq.converters.gguf.sensitivity.matrix import CHUNK_WEIGHTS, Importance, Matrix
from edgeq.converters.gguf.sensitivity.workers import matrix_workers
from edgeq.disk_cache import DiskCache, fingerprint
from edgeq.llama_library import versions

__all__ = ["weight_errors"]

Floats = npt.NDArray[np.float32]
Progress = Callable[[int, int, str], None]

# Weights of a tensor that are really quantized to price a type, at least; of larger tensors some rows stand for the
# others.
_PRICED_WEIGHTS, _PRICED_SHARE, _PRICED_ROWS = 1 << 18, 8, 16
# Types whose search over codebooks takes several times as long as a K-quant's get by with fewer.
_SLOW = frozenset({"iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq1_s", "iq1_m"})
_PRICED_WEIGHTS_SLOW = 1 << 17


class _Entry(msgspec.Struct, frozen=True):
    """What the cache keeps of one tensor: nats by type."""

    kld: dict[str, float]


def weight_errors(
    header: GgufHeader,
    menu: Mapping[str, Sequence[str]],
    curvatures: Curvatures,
    importance: Importance,
    *,
    cache: DiskCache,
    weights_key: str,
    threads: int,
    progress: Progress,
) -> dict[str, dict[str, float]]:
    """Predicted KL divergence from the rounding of weights alone, in nats, by tensor and type.

    Args:
        header: of a float GGUF.
        menu: types to price, by tensor.
        curvatures: of all these tensors.
        importance: column weights for the quantizer; tensors without an entry are quantized without.
        cache: where finished tensors are kept.
        weights_key: identifies the weights in ``header``'s file.
        threads: tensors in work at once.
        progress: told weights done, weights in all, and a tensor's name; an exception that it raises stops the work.
    """
    suffix = fingerprint(weights_key, curvatures.key, versions()["llama.cpp"])
    result: dict[str, dict[str, float]] = {}
    missing: dict[str, list[str]] = {}
    for name, types in menu.items():
        entry = cache.get(_key(name, curvatures.by_tensor[name], suffix), _Entry)
        known = {} if entry is None else {k: v for k, v in entry.kld.items() if math.isfinite(v)}
        result[name] = known
        if absent := [kind for kind in types if kind not in known]:
            missing[name] = absent
    total = sum(math.prod(header.tensors[name].shape) for name in missing)
    done, stop = 0, threading.Event()
    # Large tensors first, so that no thread is left with one at the end.
    order = sorted(missing, key=lambda name: -math.prod(header.tensors[name].shape))
    with matrix_workers(threads) as pool:
        try:
            jobs = {
                pool.submit(
                    _price, header, name, missing[name], curvatures.by_tensor[name], importance.get(name), stop
                ): name
                for name in order
            }
            for job in as_completed(jobs):
                name = jobs[job]
                result[name].update(job.result())
                cache.put(_key(name, curvatures.by_tensor[name], suffix), _Entry(result[name]))
                done += math.prod(header.tensors[name].shape)
                progress(done, total, name)
        except BaseException:
            stop.set()
            raise
    return {name: {kind: result[name][kind] for kind in types} for name, types in menu.items()}


def _key(tensor: str, curvature: Curvature, suffix: str) -> str:
    """Memory may have allowed no correlations, whatever the curvatures' own key says they are measured from."""
    return f"{suffix}-{fingerprint(tensor, curvature.correlation is not None)}"


def _price(
    header: GgufHeader,
    name: str,
    types: Sequence[str],
    curvature: Curvature,
    importance: Floats | None,
    stop: threading.Event,
) -> dict[str, float]:
    matrix = Matrix.of(header, name, curvature, importance)
    prices: dict[str, float] = {}
    for kind in types:
        if stop.is_set():
            return prices
        usual = max(_PRICED_WEIGHTS, matrix.n_weights // _PRICED_SHARE)
        prices[kind] = _price_type(matrix, kind, _PRICED_WEIGHTS_SLOW if kind in _SLOW else usual)
    return prices


def _price_type(matrix: Matrix, kind: str, priced_weights: int) -> float:
    """Nats for a matrix in a type, from all of its rows or from those that matter most and a sample of the others."""
    curvature = matrix.curvature
    if matrix.n_weights <= priced_weights:
        return sum(
            curvature.weight_kld(matrix.errors(weights, kind), start, matrix.column_matrix)
            for start, weights in matrix.parts()
        )
    n_rows = max(_PRICED_ROWS, priced_weights // matrix.n_columns)
    order = np.argsort(-curvature.rows, kind="stable")
    top, rest = order[: n_rows // 2], order[n_rows // 2 :]
    sample = rest[:: max(1, 2 * len(rest) // n_rows)]
    exact, sampled = _price_rows(matrix, kind, top), _price_rows(matrix, kind, sample)
    share = float(curvature.rows[sample].sum(dtype=np.float64))
    # Among the others a row's error hardly depends on its curvature: scale by the curvature that they stand for.
    return exact + (sampled * float(curvature.rows[rest].sum(dtype=np.float64)) / share if share > 0 else 0.0)


def _price_rows(matrix: Matrix, kind: str, picked: npt.NDArray[np.intp]) -> float:
    curvature = matrix.curvature
    part = Curvature(curvature.rows[picked], curvature.columns, {})
    step = max(1, CHUNK_WEIGHTS // matrix.n_columns)
    return sum(
        part.weight_kld(matrix.errors(matrix.rows(picked[i : i + step]), kind), i, matrix.column_matrix)
        for i in range(0, len(picked), step)
    )
