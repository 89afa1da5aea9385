"""Measuring what attention costs in one layer of a model on this machine, with llama.cpp's own graph.

Every layer of a model has a cache of its own, which comes from memory for each token. So each point has layers of its
own, and points take turns: until a point's turn comes again, the others, hundreds of megabytes by default, have passed
through the processor's caches.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Sequence

import numpy as np

from edgeq.ggml_attention import AttentionBatch, AttentionSet, KvCaches
from edgeq.ggml_backend import CpuBackend
from edgeq.ggml_blocks import quantize_rows
from edgeq.ggml_types import ggml_type
from edgeq.probe_points import AttentionPoint
from edgeq.profiles.kernels.attention_costs import AttentionShape, Kernel, attention_kernel
from edgeq.profiles.kernels.cost_measure import free_bytes, undisturbed
from edgeq.profiles.kernels.turns import MEMORY_SHARE, groups_that_fit, rounds

__all__ = ["BATCHES", "KV_TYPES", "SHAPES", "measure_attention"]

Progress = Callable[[int, int, str], None]

# SmolLM2-135M, Llama-3.2-1B, Qwen3-0.6B and 1.7B, Llama-3.1-8B and Qwen3-4B and 8B: what a robot's models look like.
SHAPES = (
    AttentionShape(64, 9, 3),
    AttentionShape(64, 32, 8),
    AttentionShape(128, 16, 8),
    AttentionShape(128, 32, 8),
)
KV_TYPES = ("f16", "q8_0", "q4_0")
# (tokens, tokens before them): one token, rows one by one, tiles; each where its time starts and where it goes.
BATCHES = (
    *((1, cached) for cached in (15, 255, 1023, 4095, 8191)),
    *((8, cached) for cached in (0, 1024, 4096)),
    *((64, cached) for cached in (0, 1024, 4096)),
)
# Larger than any other effect of launching a graph: some milliseconds of attention for each time that is taken.
_TIMED_WORK = 12e6  # values of keys that are multiplied: rows times cells times head size
_MOST_LAYERS = 64
_ROUNDS = 15
_FEWEST_ROUNDS = 3
_SAMPLE_CELLS = 512


def measure_attention(
    shapes: Sequence[AttentionShape] = SHAPES,
    *,
    threads: int,
    kv_types: Sequence[str] = KV_TYPES,
    batches: Sequence[tuple[int, int]] = BATCHES,
    progress: Progress | None = None,
    budget_s: float = 20.0,
) -> tuple[AttentionPoint, ...]:
    """Time attention on this machine.

    Args:
        shapes: of layers; a type whose block does not divide a head is left out for that shape.
        threads: as many as the session will have.
        kv_types: of keys and values.
        batches: (tokens that attend at once, tokens in the cache before them); larger batches that a type has no
            kernel of its own for are left out.
        progress: told points done, points in all, and what is in work.
        budget_s: about how long it may take; every point is timed at least three times whatever it takes.

    Raises:
        UsageError: a type that there is not, or a number of threads that cannot be.
        SessionError: too little memory.
    """
    sets = [
        _Plan(ggml_type(name).name, shape, _sized(name, shape, batches))
        for shape in dict.fromkeys(shapes)
        for name in dict.fromkeys(kv_types)
        if ggml_type(name).fits(shape.head_dim)
    ]
    points: list[AttentionPoint] = []
    total = sum(len(plan.batches) for plan in sets)
    with CpuBackend(threads) as backend:
        for group in groups_that_fit(((plan, plan.total_bytes) for plan in sets), free_bytes() // MEMORY_SHARE):
            share = budget_s * len(group) / len(sets)
            points += _measure_group(backend, group, share, len(points), total, progress)
    return tuple(points)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Everything that one cache type is measured with in one shape."""

    kv_type: str
    shape: AttentionShape
    batches: tuple[AttentionBatch, ...]

    @property
    def total_bytes(self) -> int:
        cell = 2 * ggml_type(self.kv_type).row_bytes(self.shape.head_dim * self.shape.n_kv_heads)
        return cell * sum(batch.layers * batch.n_cells for batch in self.batches)


def _sized(kv_type: str, shape: AttentionShape, batches: Sequence[tuple[int, int]]) -> tuple[AttentionBatch, ...]:
    """Each batch with as many layers as give a time worth taking.

    Of the batches that one kernel does row by row, the smallest say everything.
    """
    fewest: dict[Kernel, int] = {}
    for n_tokens, _ in sorted(batches):
        fewest.setdefault(attention_kernel(kv_type, n_tokens), n_tokens)
    made: list[AttentionBatch] = []
    for n_tokens, n_cached in dict.fromkeys(batches):
        if attention_kernel(kv_type, n_tokens) == "rows" and n_tokens > fewest["rows"]:
            continue
        work = n_tokens * shape.n_heads * shape.head_dim * (n_cached + (n_tokens + 1) / 2)
        layers = min(_MOST_LAYERS, max(1, math.ceil(_TIMED_WORK / work)))
        made.append(AttentionBatch(shape.n_heads, n_tokens, n_cached, layers))
    return tuple(made)


def _measure_group(
    backend: CpuBackend,
    group: Sequence[_Plan],
    seconds: float,
    before: int,
    total: int,
    progress: Progress | None,
) -> list[AttentionPoint]:
    count = sum(len(plan.batches) for plan in group)

    def tell(done: float, text: str) -> None:
        if progress is not None:
            progress(before + int(done), total, text)

    start = time.monotonic()
    with contextlib.ExitStack() as stack:
        tell(0, "attention: filling caches")
        sets = [stack.enter_context(_filled(backend, plan)) for plan in group]
        times: list[list[list[float]]] = [[[] for _ in plan.batches] for plan in group]
        # the first one is not timed: it fetches the results' memory
        for turn in rounds(_FEWEST_ROUNDS + 1, _ROUNDS + 1, start + seconds):
            for index, plan in enumerate(group):
                tell(count * turn / (_ROUNDS + 1), f"attention over {plan.kv_type}")
                _time_all(sets[index], plan, times[index], timed=turn > 0)
    tell(count, "done")
    return [
        _point(plan, batch, backend.threads, values)
        for plan, found in zip(group, times, strict=True)
        for batch, values in zip(plan.batches, found, strict=True)
    ]


def _time_all(attention: AttentionSet, plan: _Plan, times: Sequence[list[float]], *, timed: bool) -> None:
    for index, batch in enumerate(plan.batches):
        before = time.perf_counter_ns()
        attention.compute(index)
        if timed:
            times[index].append((time.perf_counter_ns() - before) / batch.layers)


def _filled(backend: CpuBackend, plan: _Plan) -> AttentionSet:
    """Caches and tokens of random values, always the same; scores spread as those of independent directions do."""
    random = np.random.default_rng(0)
    shape = plan.shape
    keys, values = (
        quantize_rows(
            random.standard_normal((_SAMPLE_CELLS, shape.n_kv_heads * shape.head_dim), np.float32), plan.kv_type
        )
        for _ in range(2)
    )
    caches = KvCaches(plan.kv_type, shape.head_dim, shape.n_kv_heads, keys, values)
    attention = AttentionSet(backend, caches, plan.batches)
    for index, batch in enumerate(plan.batches):
        heads = (shape.n_heads, shape.n_kv_heads, shape.n_kv_heads)
        tokens = [random.standard_normal((batch.n_tokens, n, shape.head_dim), np.float32) for n in heads]
        attention.set_tokens(index, *tokens)
    return attention


def _point(plan: _Plan, batch: AttentionBatch, threads: int, times: Sequence[float]) -> AttentionPoint:
    ns, spread = undisturbed(times)
    return AttentionPoint(
        kv_type=plan.kv_type,
        head_dim=plan.shape.head_dim,
        n_heads=plan.shape.n_heads,
        n_kv_heads=plan.shape.n_kv_heads,
        n_tokens=batch.n_tokens,
        n_cached=batch.n_cached,
        threads=threads,
        ns=ns,
        spread=spread,
        n=len(times),
    )
