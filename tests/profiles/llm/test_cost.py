from __future__ import annotations

import dataclasses
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeq.converters.gguf.header import read_header
from edgeq.converters.gguf.shape import model_shape
from edgeq.llama import Context, Model
from edgeq.profiles.llm.cost import predict
from edgeq.profiles.llm.model_memory import compute_buffer_bytes, file_bytes, kv_cache_bytes, weights_bytes
from edgeq.profiles.llm.model_shape import EMBEDDING, LayerShape, ModelShape
from edgeq.profiles.loader import load_profile

# A copy, so that a shipped figure may change.
_LAPTOP = load_profile(str(Path(__file__).parents[1] / "samples" / "laptop-cpu.yaml"))
_SHAPE = ModelShape(
    tensors={EMBEDDING: (576, 1000), "blk.0.ffn_down.weight": (1536, 576), "norm": (576,)},
    layers=[LayerShape(192, 192, 9), LayerShape(192, 192, 9, window=512)],
    key_head_width=64,
    value_head_width=64,
    embedding_width=576,
    feed_forward_width=1536,
    n_vocab=1000,
    tied_embedding=True,
    header_bytes=4096,
)
_TYPES = {EMBEDDING: "q8_0", "blk.0.ffn_down.weight": "q4_k", "norm": "f32"}


def _mib(value: int) -> float:
    return value / 2**20


@pytest.fixture(scope="module")
def model(smollm2_gguf: Path) -> Model:
    return Model.load(smollm2_gguf)


@pytest.mark.parametrize("context_tokens", [256, 300, 2048])
@pytest.mark.parametrize("kv_type", ["f16", "q8_0", "q4_0"])
def test_kv_cache_is_exactly_what_llama_cpp_allocates(model: Model, context_tokens: int, kv_type: str) -> None:
    shape = model_shape(read_header(model.path))
    with Context(model, context_tokens=context_tokens, type_k=kv_type, type_v=kv_type) as context:
        predicted = kv_cache_bytes(shape, context_tokens, kv_type, kv_type, 512)
        # llama.cpp prints two decimals of a MiB
        assert _mib(context.buffer_bytes["kv"]) == pytest.approx(_mib(predicted), abs=0.01)


@pytest.mark.parametrize(("context_tokens", "ubatch"), [(512, 512), (4096, 512), (4096, 64)])
def test_compute_buffer_is_close_and_not_below(model: Model, context_tokens: int, ubatch: int) -> None:
    shape = model_shape(read_header(model.path))
    with Context(model, context_tokens=context_tokens, ubatch_tokens=ubatch) as context:
        predicted = compute_buffer_bytes(shape, context_tokens, ubatch)
        assert 0.98 <= predicted / context.buffer_bytes["compute"] <= 1.3


def test_weights_are_exactly_what_llama_cpp_holds(model: Model) -> None:
    header = read_header(model.path)
    types = {name: tensor.type for name, tensor in header.tensors.items()}
    assert _mib(model.buffer_bytes) == pytest.approx(_mib(weights_bytes(model_shape(header), types, _LAPTOP)), abs=0.02)
    assert file_bytes(model_shape(header), types) == header.file_bytes


def test_a_tied_embedding_that_is_repacked_or_offloaded_counts_twice() -> None:
    plain = weights_bytes(_SHAPE, _TYPES, _LAPTOP)
    embedding = 576 // 32 * 34 * 1000
    assert weights_bytes(_SHAPE, _TYPES, load_profile("jetson-orin")) == plain + embedding
    repacked = {**_TYPES, EMBEDDING: "q4_0"}
    assert weights_bytes(_SHAPE, repacked, _LAPTOP) == plain - embedding + 2 * (576 // 32 * 18 * 1000)
    untied = dataclasses.replace(_SHAPE, tied_embedding=False)
    assert weights_bytes(untied, repacked, _LAPTOP) == plain - embedding + 576 // 32 * 18 * 1000


def test_sliding_windows_save_cells() -> None:
    row = 192 * 2 * 2
    assert kv_cache_bytes(_SHAPE, 4096, "f16", "f16", 512) == (4096 + 1024) * row
    assert kv_cache_bytes(_SHAPE, 256, "f16", "f16", 512) == 2 * 256 * row


@given(context=st.integers(1, 10_000), more=st.integers(0, 10_000), ubatch=st.integers(1, 512))
def test_more_context_never_costs_less(context: int, more: int, ubatch: int) -> None:
    small, large = (
        predict(
            _SHAPE, _TYPES, _LAPTOP, context_tokens=n, kv_types=("f16", "f16"), ubatch_tokens=ubatch, prompt_tokens=64
        )
        for n in (context, context + more)
    )
    assert large.peak_memory_bytes >= small.peak_memory_bytes
    assert large.itl_ms >= small.itl_ms
    parts = (small.weights_bytes, small.kv_cache_bytes, small.compute_bytes, small.runtime_bytes)
    assert small.peak_memory_bytes == sum(parts)


def test_twice_the_bandwidth_is_faster_but_for_the_overhead() -> None:
    memory = msgspec.structs.replace(_LAPTOP.memory, bandwidth_bytes_per_s=2 * _LAPTOP.memory.bandwidth_bytes_per_s)
    fast = msgspec.structs.replace(_LAPTOP, memory=memory)
    overhead = _LAPTOP.backend.token_overhead_ms + len(_SHAPE.layers) * _LAPTOP.backend.layer_overhead_ms
    a, b = (
        predict(_SHAPE, _TYPES, p, context_tokens=256, kv_types=("f16", "f16"), ubatch_tokens=64, prompt_tokens=64)
        for p in (_LAPTOP, fast)
    )
    assert a.itl_ms - overhead == pytest.approx(2 * (b.itl_ms - overhead))
