"""Curvature without torch: the importance matrix says which columns matter, a few real measurements say how much.

The error of a matrix's output is ``sum_ij E[x_j^2] dW_ij^2``, with E[x_j^2] from the importance matrix. How many nats
such an error costs differs by role and depth, so for each group of matrices of one role in one part of the depth the
group alone is quantized, and the model's real KL divergence is measured: once in 4 bits, where the weights dominate,
and once in 8 bits, where the rounding of activations does.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgeq.converters.gguf.assemble import assemble, read_tensor
from edgeq.converters.gguf.divergence import Judge
from edgeq.converters.gguf.header import GgufHeader, GgufTensor
from edgeq.converters.gguf.sensitivity.curvature import Curvature
from edgeq.converters.gguf.sensitivity.matrix import Importance, Matrix

__all__ = ["groups_of", "probed_curvatures"]

Progress = Callable[[int, int, str], None]
Floats = npt.NDArray[np.float32]

_LAYER = re.compile(r"^blk\.(\d+)\.(.+)$")
_PARTS = 4  # of the depth
_PROBE_TOKENS = 1024
_COARSE, _FINE, _WIDE = "q4_0", "q8_0", "q6_k"


def groups_of(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Matrices of one role in one part of the depth; those outside of layers stand alone."""
    layers = [int(match[1]) for name in names if (match := _LAYER.match(name))]
    n_layers = max(layers, default=0) + 1
    groups: dict[tuple[str, int], list[str]] = defaultdict(list)
    for name in names:
        match = _LAYER.match(name)
        key = (match[2], int(match[1]) * min(_PARTS, n_layers) // n_layers) if match else (name, 0)
        groups[key].append(name)
    return [tuple(group) for group in groups.values()]


def probed_curvatures(
    header: GgufHeader,
    names: Sequence[str],
    importance: Importance,
    chunks: Sequence[npt.NDArray[np.int32]],
    *,
    work: Path,
    threads: int,
    progress: Progress,
) -> dict[str, Curvature]:
    """The curvature of every matrix, from real KL divergences.

    Args:
        header: of the float GGUF.
        names: matrices.
        importance: mean squared inputs, for all of them.
        chunks: calibration text; its beginning is used.
        work: a folder for the probes' files.
        threads: of llama.cpp.
        progress: told probes done, probes in all, and a detail.

    Raises:
        ConversionError: the reference gives NaN or infinity.
        DiskFullError: no room for a probe.
    """
    groups = groups_of(names)
    result: dict[str, Curvature] = {}
    with Judge(header.path, _beginning(chunks), threads=threads) as judge:
        for index, group in enumerate(groups):
            progress(index, len(groups), f"probe {group[0]}")
            result |= _probe(header, group, importance, judge, work)
    return result


def _beginning(chunks: Sequence[npt.NDArray[np.int32]]) -> list[npt.NDArray[np.int32]]:
    taken, n_tokens = [], 0
    for chunk in chunks:
        if n_tokens >= _PROBE_TOKENS:
            break
        taken.append(chunk)
        n_tokens += len(chunk)
    return taken


def _probe(
    header: GgufHeader, group: Sequence[str], importance: Importance, judge: Judge, work: Path
) -> dict[str, Curvature]:
    matrices = [
        Matrix.of(header, name, Curvature(_ones(header.tensors[name]), importance[name], {}), None) for name in group
    ]
    coarse = _output_errors(matrices, _COARSE)
    coarse_kld = max(0.0, _measure(header, matrices, _COARSE, judge, work))
    scale = coarse_kld / sum(coarse) if sum(coarse) > 0 else 0.0
    fine_kld = _measure(header, matrices, _FINE, judge, work)
    fine = _output_errors(matrices, _FINE)
    noise = {32: max(0.0, fine_kld - scale * sum(fine))}
    if all(matrix.n_columns % 256 == 0 for matrix in matrices):
        wide_kld = _measure(header, matrices, _WIDE, judge, work)
        noise[256] = max(noise[32], wide_kld - scale * sum(_output_errors(matrices, _WIDE)))
    share = 1.0 / len(matrices)
    return {
        matrix.name: Curvature(
            np.full(len(matrix.raw), scale, np.float32),
            importance[matrix.name],
            {block: value * share for block, value in noise.items()},
        )
        for matrix in matrices
    }


def _ones(tensor: GgufTensor) -> Floats:
    """One for each row, of all matrices where a tensor holds several."""
    return np.ones(math.prod(tensor.shape[1:]), np.float32)


def _output_errors(matrices: Sequence[Matrix], kind: str) -> list[float]:
    """Half the weighted squared error of each matrix, in the units that the scale turns into nats."""
    return [
        sum(m.curvature.weight_kld(m.errors(weights, kind), start) for start, weights in m.parts()) for m in matrices
    ]


def _measure(header: GgufHeader, matrices: Sequence[Matrix], kind: str, judge: Judge, work: Path) -> float:
    by_name: Mapping[str, Matrix] = {matrix.name: matrix for matrix in matrices}
    types = {name: kind if name in by_name else tensor.type for name, tensor in header.tensors.items()}
    out = work / "probe.gguf"
    assemble(
        header,
        types,
        lambda name, wanted: by_name[name].blocks(wanted) if name in by_name else read_tensor(header, name),
        out,
    )
    try:
        return judge.compare([out])[0].mean_kld
    finally:
        out.unlink(missing_ok=True)
