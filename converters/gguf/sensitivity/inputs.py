"""What each matrix is multiplied with, measured in llama.cpp: mean squares of the columns, and their correlations."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from edgeq.converters.calibration.texts import TokenText
from edgeq.converters.gguf.grams import correlation_bytes
from edgeq.converters.gguf.header import GgufHeader
from edgeq.converters.gguf.imatrix import ImportanceMatrix
from edgeq.converters.gguf.observe import observe_inputs
from edgeq.converters.gguf.sensitivity.curvature import Curvature
from edgeq.converters.gguf.sensitivity.curvature_cache import keep_curvatures, load_curvatures
from edgeq.converters.gguf.sensitivity.workers import one_blas_thread
from edgeq.disk_cache import DiskCache, fingerprint
from edgeq.profiles.llm.model_shape import EMBEDDING

__all__ = ["measured_inputs", "weighted_by"]

Halves = npt.NDArray[np.float16]

# Of a tied embedding's importance, what is taken to be its use as output matrix, whose inputs are correlated; as a
# table its columns are not. The estimator fisher measures it; with less than this, Q4_0 was worse (SmolLM2's
# embedding: 0.038 nats with a half, 0.059 with nothing, against 0.034), with all of it as good.
_OUTPUT_SHARE = 0.75


def measured_inputs(
    header: GgufHeader,
    names: Sequence[str],
    text: TokenText,
    *,
    cache: DiskCache,
    threads: int,
    progress: Callable[[int, int, str], None],
) -> dict[str, Curvature]:
    """The curvature of the squared error of each matrix's own output.

    Args:
        header: of the float GGUF.
        names: matrices.
        text: what the model runs.
        cache: where the result is kept.
        threads: of llama.cpp.
        progress: told pieces of text done, pieces in all, and a detail.

    Returns:
        Ones as rows, mean squared inputs as columns, and correlations where memory and the row's length allow. Columns
        are ones too where the model never multiplies, as with an embedding that is no output matrix.
    """
    key = f"inputs-{fingerprint(text.text_sha256, text.n_tokens)}"
    kept = load_curvatures(cache, key, header, names)
    if kept is not None:
        return kept
    fits = _correlations_fit(header, names)
    measured = _measure(header, names, text, threads, progress, correlations=fits)
    if fits:  # what memory did not allow now it may allow next time
        keep_curvatures(cache, key, measured)
    return measured


def weighted_by(given: ImportanceMatrix, inputs: dict[str, Curvature]) -> dict[str, Curvature]:
    """The same with the mean squares of an importance matrix where it has them; correlations stay."""
    weights = {name: given.weights(name) for name in inputs}
    return {
        name: inputs[name] if columns is None else dataclasses.replace(inputs[name], columns=columns)
        for name, columns in weights.items()
    }


def _correlations_fit(header: GgufHeader, names: Sequence[str]) -> bool:
    import psutil

    needed = correlation_bytes(header.tensors[name].shape[0] for name in names)
    return needed <= int(psutil.virtual_memory().available)


def _measure(
    header: GgufHeader,
    names: Sequence[str],
    text: TokenText,
    threads: int,
    progress: Callable[[int, int, str], None],
    *,
    correlations: bool,
) -> dict[str, Curvature]:
    with one_blas_thread():  # beside llama.cpp's threads
        observed = observe_inputs(
            header.path, text.chunks, threads=threads, progress=progress, correlations=correlations
        )
    found = dict(observed.correlations)
    if "output.weight" not in header.tensors and EMBEDDING in found:
        found[EMBEDDING] = _weakened(found[EMBEDDING])
    result = {}
    for name in names:
        shape = header.tensors[name].shape
        columns = observed.matrix.weights(name)
        result[name] = Curvature(
            np.ones(math.prod(shape[1:]), np.float32),
            np.ones(shape[0], np.float32) if columns is None else columns,
            {},
            found.get(name),
        )
    return result


def _weakened(correlation: Halves) -> Halves:
    result: Halves = (correlation * np.float16(_OUTPUT_SHARE)).astype(np.float16)
    np.fill_diagonal(result, 1.0)
    return result
