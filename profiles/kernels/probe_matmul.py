"""Measuring how fast this machine multiplies matrices of each type with many vectors at once, as a prompt is read.

The kernels are ggml's, on weights in the layout that llama.cpp would load them into. A product of quantized weights is
one of integers: ggml rounds the vectors to 8 bits first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Sequence

import numpy as np

from edgeq.ggml_backend import CpuBackend
from edgeq.ggml_kernels import Matrices, MatrixSet
from edgeq.ggml_types import ggml_type
from edgeq.probe_points import MatmulPoint
from edgeq.profiles.kernels.cost_measure import free_bytes, legal_matrices, undisturbed
from edgeq.profiles.kernels.sample_weights import sample_blocks, sample_vector
from edgeq.profiles.kernels.turns import MEMORY_SHARE, groups_that_fit, rounds

__all__ = ["BATCHES", "SHAPES", "TYPES", "measure_matmul"]

Progress = Callable[[int, int, str], None]

# Every type that a plan may choose without measuring importance, floats first.
TYPES = (
    *("f32", "f16", "bf16", "q8_0", "q6_k", "q5_1", "q5_0", "q5_k", "q4_1", "q4_0", "q4_k"),
    *("iq4_nl", "iq4_xs", "q3_k", "iq3_s", "q2_k"),
)
# Attention and feed-forward of SmolLM2-135M, which has no rows for K-quants, and of models of 1 to 2 billion weights.
SHAPES = ((576, 576), (576, 1536), (1536, 576), (2048, 2048), (2048, 8192))
# The pieces that a prompt is read in on a CPU, and what is left of it in the last one.
BATCHES = (16, 128)
_TIMED_FLOPS = 2e8  # some milliseconds, beside which it does not count that threads are started
_MOST_COPIES = 64
_MOST_WEIGHTS = 1 << 22  # of a larger matrix so many are multiplied: speed does not change with the rows beyond that
_WHOLE_ROWS = 64  # a multiple of what every repacked layout interleaves
_ROUNDS = 11
_FEWEST_ROUNDS = 3


def measure_matmul(
    shapes: Sequence[tuple[int, int]] = SHAPES,
    *,
    threads: int,
    types: Sequence[str] = TYPES,
    batches: Sequence[int] = BATCHES,
    progress: Progress | None = None,
    budget_s: float = 20.0,
) -> tuple[MatmulPoint, ...]:
    """Time products on this machine.

    Args:
        shapes: (columns, rows); a type whose block does not divide the columns is left out for that shape.
        threads: as many as the session will have.
        types: names of types.
        batches: vectors at once.
        progress: told products done, products in all, and what is in work.
        budget_s: about how long it may take; every product is timed at least three times whatever it takes.

    Raises:
        UsageError: a type that there is not, or a number of threads that cannot be.
        SessionError: too little memory.
    """
    products = [
        _sized(name, shape, batch) for name, shape in legal_matrices(shapes, types) for batch in dict.fromkeys(batches)
    ]
    points: list[MatmulPoint] = []
    with CpuBackend(threads) as backend:
        sized = ((product, product.total_bytes) for product in products)
        for group in groups_that_fit(sized, free_bytes() // MEMORY_SHARE):
            share = budget_s * len(group) / len(products)
            points += _measure_group(backend, group, share, len(points), len(products), progress)
    return tuple(points)


@dataclasses.dataclass(frozen=True)
class _Product:
    """One point to be: so many copies of so many rows of a matrix."""

    type: str
    shape: tuple[int, int]
    batch: int
    rows: int
    copies: int

    @property
    def timed_flops(self) -> float:
        return 2.0 * self.shape[0] * self.rows * self.batch * self.copies

    @property
    def total_bytes(self) -> int:
        return self.copies * self.rows * ggml_type(self.type).row_bytes(self.shape[0])


def _sized(name: str, shape: tuple[int, int], batch: int) -> _Product:
    columns, rows = shape
    used = min(rows, max(_MOST_WEIGHTS // columns // _WHOLE_ROWS, 1) * _WHOLE_ROWS)
    copies = min(_MOST_COPIES, math.ceil(_TIMED_FLOPS / (2.0 * columns * used * batch)))
    return _Product(name, shape, batch, used, copies)


def _measure_group(
    backend: CpuBackend,
    group: Sequence[_Product],
    seconds: float,
    before: int,
    total: int,
    progress: Progress | None,
) -> list[MatmulPoint]:
    def tell(done: float, text: str) -> None:
        if progress is not None:
            progress(before + int(done), total, text)

    start = time.monotonic()
    with contextlib.ExitStack() as stack:
        tell(0, "products: filling matrices")
        matrices = stack.enter_context(MatrixSet(backend, [_filled(product) for product in group]))
        for index, product in enumerate(group):
            vector = sample_vector(product.shape[0])
            matrices.set_vectors(index, np.tile(vector, (product.batch, 1)))
        times: list[list[float]] = [[] for _ in group]
        # the first one is not timed: it fetches the results' memory
        for turn in rounds(_FEWEST_ROUNDS + 1, _ROUNDS + 1, start + seconds):
            for index, product in enumerate(group):
                tell(len(group) * (turn + index / len(group)) / (_ROUNDS + 1), f"products of {product.type}")
                begin = time.perf_counter_ns()
                matrices.compute(index)
                if turn:
                    times[index].append(float(time.perf_counter_ns() - begin))
    tell(len(group), "done")
    return [
        _point(product, buffer, backend.threads, found)
        for product, buffer, found in zip(group, matrices.buffers, times, strict=True)
    ]


def _filled(product: _Product) -> Matrices:
    columns = product.shape[0]
    blocks = sample_blocks(ggml_type(product.type), columns)[: product.rows]
    return Matrices(product.type, (columns, product.rows), blocks, product.copies, product.batch)


def _point(product: _Product, buffer: str, threads: int, times: Sequence[float]) -> MatmulPoint:
    ns, spread = undisturbed(times)
    return MatmulPoint(
        type=product.type,
        columns=product.shape[0],
        rows=product.shape[1],
        batch=product.batch,
        threads=threads,
        flops_per_s=1e9 * product.timed_flops / ns,
        spread=spread,
        n=len(times),
        buffer=buffer,
    )
