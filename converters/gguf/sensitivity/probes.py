"""Curvature without torch: inputs say which columns matter and how they are correlated, real measurements how much.

The mean squared error of a matrix's output is ``sum_i dW_i E[x x^T] dW_i^T``. How many nats such an error costs differs
by role and depth, so for each group of matrices of one role in one part of the depth the group alone is quantized, and
the model's real KL divergence is measured: once in 4 bits, where the weights dominate, and once in 8 bits, where the
rounding of activations does. Inputs say nothing of which tokens matter, so that making up for errors by their
correlations may also do harm: each group is tried with and without.
"""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from edgeq.converters.gguf.assemble import assemble, read_tensor
from edgeq.converters.gguf.divergence import Judge
from edgeq.converters.gguf.header import GgufHeader
from edgeq.converters.gguf.sensitivity.curvature import Curvature
from edgeq.converters.gguf.sensitivity.matrix import Matrix
from edgeq.converters.gguf.sensitivity.workers import matrix_workers
from edgeq.disk_cache import DiskCache, fingerprint
from edgeq.ggml_blocks import dequantize

__all__ = ["groups_of", "probed_curvatures"]

Progress = Callable[[int, int, str], None]

_LAYER = re.compile(r"^blk\.(\d+)\.(.+)$")
_PARTS = 4  # of the depth
_PROBE_TOKENS = 1024
_COARSE, _FINE, _WIDE = "q4_0", "q8_0", "q6_k"


class _Probe(msgspec.Struct, frozen=True):
    """What a group costs.

    Attributes:
        scale: nats for an output error of one.
        noise: nats from the rounding of activations in a block of so many, all matrices together.
        correlated: whether it is better to make up for errors by the correlations of the inputs.
    """

    scale: float
    noise: dict[int, float]
    correlated: bool


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
    inputs: Mapping[str, Curvature],
    chunks: Sequence[npt.NDArray[np.int32]],
    *,
    cache: DiskCache,
    key: str,
    work: Path,
    threads: int,
    progress: Progress,
) -> dict[str, Curvature]:
    """The curvature of every matrix, from real KL divergences.

    Args:
        header: of the float GGUF.
        inputs: curvature of each matrix's own output, with mean squared inputs as columns and ones as rows.
        chunks: calibration text; its beginning is used.
        cache: where finished probes are kept.
        key: names everything that ``inputs`` and ``chunks`` depend on.
        work: a folder for the probes' files.
        threads: of llama.cpp.
        progress: told probes done, probes in all, and a detail.

    Raises:
        ConversionError: the reference gives NaN or infinity.
        DiskFullError: no room for a probe.
    """
    groups = groups_of(list(inputs))
    places = {group: f"probe-{key}-{fingerprint(*group)}" for group in groups}
    probes = {group: cache.get(place, _Probe) for group, place in places.items()}
    missing = [group for group, probe in probes.items() if probe is None]
    if missing:
        with Judge(header.path, _beginning(chunks), threads=threads) as judge:
            for index, group in enumerate(missing):
                progress(index, len(missing), group[0])
                with matrix_workers(threads) as pool:
                    bench = _Bench(header, judge, work, pool)
                    probes[group] = _probe(bench, {name: inputs[name] for name in group})
                cache.put(places[group], probes[group])
    return {
        name: _scaled(inputs[name], probe, 1 / len(group))
        for group, probe in probes.items()
        if probe is not None
        for name in group
    }


def _scaled(inputs: Curvature, probe: _Probe, share: float) -> Curvature:
    noise = {block: value * share for block, value in probe.noise.items()}
    correlation = inputs.correlation if probe.correlated else None
    return Curvature(inputs.rows * np.float32(probe.scale), inputs.columns, noise, correlation)


def _beginning(chunks: Sequence[npt.NDArray[np.int32]]) -> list[npt.NDArray[np.int32]]:
    taken, n_tokens = [], 0
    for chunk in chunks:
        if n_tokens >= _PROBE_TOKENS:
            break
        taken.append(chunk)
        n_tokens += len(chunk)
    return taken


@dataclasses.dataclass(frozen=True)
class _Bench:
    """Where matrices are rounded and judged."""

    header: GgufHeader
    judge: Judge
    work: Path
    pool: ThreadPoolExecutor

    def matrices(self, inputs: Mapping[str, Curvature]) -> list[Matrix]:
        """With factorised correlations."""
        return list(self.pool.map(lambda name: Matrix.of(self.header, name, inputs[name], None), inputs))

    def measure(self, matrices: Sequence[Matrix], kind: str) -> tuple[float, float]:
        """Round these matrices alone: the sum of half their squared output errors, and the real mean KL divergence."""
        rounded = dict(zip((m.name for m in matrices), self.pool.map(lambda m: _round(m, kind), matrices), strict=True))
        header, out = self.header, self.work / "probe.gguf"
        types = {name: kind if name in rounded else tensor.type for name, tensor in header.tensors.items()}
        assemble(header, types, lambda n, _kind: rounded[n][0] if n in rounded else read_tensor(header, n), out)
        try:
            return sum(error for _, error in rounded.values()), max(0.0, self.judge.compare([out])[0].mean_kld)
        finally:
            out.unlink(missing_ok=True)


def _probe(bench: _Bench, inputs: Mapping[str, Curvature]) -> _Probe:
    matrices = bench.matrices({name: dataclasses.replace(c, correlation=None) for name, c in inputs.items()})
    coarse, coarse_kld = bench.measure(matrices, _COARSE)
    correlated = any(c.correlation is not None for c in inputs.values())
    if correlated:
        others = bench.matrices(inputs)
        other, other_kld = bench.measure(others, _COARSE)
        correlated = other_kld < coarse_kld
        if correlated:
            matrices, coarse, coarse_kld = others, other, other_kld
    fine, fine_kld = bench.measure(matrices, _FINE)
    scale, noise = _scale_and_noise(coarse, coarse_kld, fine, fine_kld)
    by_block = {32: noise}
    if all(matrix.n_columns % 256 == 0 for matrix in matrices):
        wide, wide_kld = bench.measure(matrices, _WIDE)
        by_block[256] = max(noise, wide_kld - scale * wide)
    return _Probe(scale, by_block, correlated)


def _scale_and_noise(coarse: float, coarse_kld: float, fine: float, fine_kld: float) -> tuple[float, float]:
    """The line through two measurements of nats against squared errors: its slope, and what is left without error.

    Both are at least 0; where the line says otherwise, what the 4 bits cost counts as the weights'.
    """
    if coarse <= 0.0:
        return 0.0, fine_kld
    if coarse <= fine or coarse_kld <= fine_kld:
        scale = coarse_kld / coarse
        return scale, max(0.0, fine_kld - scale * fine)
    scale = (coarse_kld - fine_kld) / (coarse - fine)
    noise = fine_kld - scale * fine
    return (scale, noise) if noise >= 0.0 else (coarse_kld / coarse, 0.0)


def _round(matrix: Matrix, kind: str) -> tuple[npt.NDArray[np.uint8], float]:
    """A matrix's blocks, and half the squared error of its output, in the units that the scale turns into nats."""
    blocks = matrix.blocks(kind, refined=False)
    error = 0.0
    for start, weights in matrix.parts():
        errors = dequantize(blocks[start : start + len(weights)], kind, matrix.n_columns)
        errors -= weights
        error += matrix.curvature.weight_kld(errors, start, matrix.column_matrix)
    return blocks, error
