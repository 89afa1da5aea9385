"""Flash attention of llama.cpp's graph against softmax attention in numpy, on caches that ggml dequantizes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest

from edgeq.errors import SessionClosedError, UsageError
from edgeq.ggml_attention import AttentionBatch, AttentionSet, KvCaches, padded_cells, rotation
from edgeq.ggml_backend import CpuBackend
from edgeq.ggml_blocks import dequantize, quantize_rows

Floats = npt.NDArray[np.float32]

KV_HEADS = 2


@pytest.fixture(scope="module")
def backend() -> Iterator[CpuBackend]:
    with CpuBackend(1) as made:
        yield made


def random(seed: int, *shape: int) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def make_caches(kv_type: str, head_dim: int, rows: int = 600) -> KvCaches:
    width = KV_HEADS * head_dim
    keys, values = (quantize_rows(random(seed, rows, width), kv_type) for seed in (1, 2))
    return KvCaches(kv_type, head_dim, KV_HEADS, keys, values)


def rotated(array: Floats, kv_type: str, size: int) -> Floats:
    """Keys, queries and values as a quantized cache holds them."""
    if kv_type == "f16" or array.shape[-1] % 64:
        return array
    return (array.reshape(-1, size) @ rotation(size)).reshape(array.shape)


def expected(caches: KvCaches, first_cell: int, n_cached: int, queries: Floats, keys: Floats, values: Floats) -> Floats:
    """(tokens, heads, head_dim) by the textbook, in float64."""
    head_dim, kv_type = caches.head_dim, caches.type
    key_size = head_dim & -head_dim
    cells = (first_cell + np.arange(n_cached)) % len(caches.keys)
    parts = []
    for blocks, new, size in ((caches.keys, keys, key_size), (caches.values, values, 64)):
        old = dequantize(np.ascontiguousarray(blocks[cells]), kv_type, KV_HEADS * head_dim)
        stored = quantize_rows(rotated(new, kv_type, size).reshape(len(new), -1), kv_type)
        both = np.concatenate([old, dequantize(stored, kv_type, KV_HEADS * head_dim)])
        parts.append(both.reshape(-1, KV_HEADS, head_dim).astype(np.float64))
    group = queries.shape[1] // KV_HEADS
    all_keys, all_values = (np.repeat(part, group, axis=1) for part in parts)
    scores = np.einsum("thd,chd->thc", rotated(queries, kv_type, key_size), all_keys) / np.sqrt(head_dim)
    own = n_cached + np.arange(len(queries))
    scores[np.broadcast_to((np.arange(len(all_keys)) > own[:, None])[:, None], scores.shape)] = -np.inf
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    result = np.einsum("thc,chd->thd", weights, all_values)
    return rotated(result.astype(np.float32), kv_type, 64)


# One token over few and many cells, some tokens, and as many as take ggml's tiles: each has code of its own.
@pytest.mark.parametrize(("n_tokens", "n_cached"), [(1, 0), (1, 200), (1, 700), (5, 250), (64, 0), (70, 300)])
@pytest.mark.parametrize("kv_type", ["f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_attention_is_softmax_attention(
    backend: CpuBackend, kv_type: str, head_dim: int, n_tokens: int, n_cached: int
) -> None:
    caches = make_caches(kv_type, head_dim)
    batch = AttentionBatch(n_heads=6, n_tokens=n_tokens, n_cached=n_cached, layers=2)
    tokens = tuple(random(seed, n_tokens, heads, head_dim) for seed, heads in ((3, 6), (4, KV_HEADS), (5, KV_HEADS)))
    with AttentionSet(backend, caches, [batch]) as attention:
        attention.set_tokens(0, *tokens)
        attention.compute(0)
        for layer in range(2):
            want = expected(caches, layer * batch.n_cells, n_cached, *tokens)
            # ggml quantizes queries to 8 bits, and accumulates in float16 where the cache is of float16.
            assert np.abs(attention.output(0, layer) - want).max() < 0.02 * np.abs(want).max() + 0.005


def test_batches_have_caches_of_their_own(backend: CpuBackend) -> None:
    caches = make_caches("f16", 64, rows=16)
    batches = [AttentionBatch(2, 1, 15), AttentionBatch(2, 3, 15)]
    with AttentionSet(backend, caches, batches) as attention:
        loud = np.full((3, KV_HEADS, 64), 100, np.float32)
        attention.set_tokens(1, np.zeros((3, 2, 64), np.float32), loud, loud)
        attention.compute(1)
        attention.set_tokens(0, *(random(seed, 1, 2, 64) for seed in (3, 4, 5)))
        attention.compute(0)
        assert np.abs(attention.output(0, 0)).max() < 5
        assert attention.output(1, 0).max() > 15
    with pytest.raises(SessionClosedError):
        attention.compute(0)


def test_threads_give_the_same_result() -> None:
    results = []
    for threads in (1, 3):
        with (
            CpuBackend(threads) as backend,
            AttentionSet(backend, make_caches("q8_0", 64), [AttentionBatch(6, 4, 300)]) as attention,
        ):
            attention.set_tokens(0, *(random(seed, 4, heads, 64) for seed, heads in ((3, 6), (4, 2), (5, 2))))
            attention.compute(0)
            results.append(attention.output(0, 0))
    assert np.array_equal(results[0], results[1])


def test_cells_come_in_256s() -> None:
    assert [padded_cells(n) for n in (1, 256, 257)] == [256, 256, 512]


@pytest.mark.parametrize("size", [1, 2, 64, 128])
def test_the_rotation_is_its_own_inverse(size: int) -> None:
    assert np.allclose(rotation(size) @ rotation(size), np.eye(size), atol=1e-6)
    assert np.allclose(np.abs(rotation(size)), 1 / np.sqrt(size))


def test_what_ggml_would_die_of_is_refused(backend: CpuBackend) -> None:
    caches = make_caches("f16", 64)
    with pytest.raises(UsageError, match="heads of a multiple of 32"):
        AttentionSet(backend, KvCaches("q8_0", 80, 2, caches.keys, caches.values), [AttentionBatch(2, 1, 0)])
    with pytest.raises(UsageError, match="f32 cache"):
        AttentionSet(backend, KvCaches("f32", 64, 2, caches.keys, caches.values), [AttentionBatch(2, 1, 0)])
    with pytest.raises(ValueError, match="blocks of"):
        AttentionSet(backend, KvCaches("f16", 64, 3, caches.keys, caches.values), [AttentionBatch(3, 1, 0)])
    for batch in (AttentionBatch(3, 1, 0), AttentionBatch(2, 0, 0), AttentionBatch(2, 1, 0, layers=0)):
        with pytest.raises(ValueError, match="heads in the cache"):
            AttentionSet(backend, caches, [batch])
    with (
        AttentionSet(backend, caches, [AttentionBatch(2, 1, 0)]) as attention,
        pytest.raises(ValueError, match="array of"),
    ):
        attention.set_tokens(0, *(np.zeros((1, 4, 64), np.float32) for _ in range(3)))
