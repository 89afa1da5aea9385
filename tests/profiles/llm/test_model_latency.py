from __future__ import annotations

import dataclasses

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeq.ggml_types import tensor_bytes
from edgeq.probe_points import AttentionPoint, MatmulPoint
from edgeq.profiles.kernels.cost_table import CostEntry, DecodeCosts
from edgeq.profiles.llm.model_latency import (
    Speeds,
    decode_ms,
    measured_speeds,
    prompt_chunks,
    speeds_of,
    tensor_decode_ns,
    tensor_prompt_ns,
    ttft_ms,
)
from edgeq.profiles.llm.model_shape import EMBEDDING, OUTPUT, LayerShape, ModelShape
from edgeq.profiles.loader import load_profile
from edgeq.profiles.measured import LanguageCosts

F16 = ("f16", "f16")
FFN = "blk.0.ffn_down.weight"
SHAPE = ModelShape(
    tensors={EMBEDDING: (512, 1000), FFN: (2048, 512), "norm": (512,)},
    layers=[LayerShape(128, 128, 8), LayerShape(128, 128, 8, window=512)],
    key_head_width=64,
    value_head_width=64,
    embedding_width=512,
    feed_forward_width=2048,
    n_vocab=1000,
    tied_embedding=True,
    header_bytes=0,
)
TYPES = {EMBEDDING: "q8_0", FFN: "q8_0", "norm": "f32"}
LAPTOP = load_profile("laptop-cpu")
PLAIN = speeds_of(LAPTOP)


def test_a_token_goes_through_the_experts_that_are_used() -> None:
    stack = "blk.0.ffn_down_exps.weight"
    shape = dataclasses.replace(SHAPE, tensors={stack: (2048, 512, 16)}, experts_used=2)
    one = tensor_decode_ns(SHAPE, FFN, "q8_0", PLAIN)
    assert tensor_decode_ns(shape, stack, "q8_0", PLAIN) == pytest.approx(2 * one)
    assert tensor_decode_ns(dataclasses.replace(shape, experts_used=None), stack, "q8_0", PLAIN) == 16 * one
    # A long prompt reaches every expert, each with an eighth of the tokens.
    eighth = tensor_prompt_ns(SHAPE, FFN, "q8_0", PLAIN, {64: 1})
    assert tensor_prompt_ns(shape, stack, "q8_0", PLAIN, {512: 1}) == pytest.approx(16 * eighth)
    # Two tokens reach less than four of them.
    assert 3 * one < tensor_prompt_ns(shape, stack, "q8_0", PLAIN, {2: 1}) < 4 * one


def _attention(n_tokens: int, n_cached: int, ns: float, kv_type: str = "f16") -> AttentionPoint:
    return AttentionPoint(
        kv_type=kv_type,
        head_dim=64,
        n_heads=8,
        n_kv_heads=2,
        n_tokens=n_tokens,
        n_cached=n_cached,
        threads=2,
        ns=ns,
        spread=0.0,
        n=5,
    )


COSTS = LanguageCosts(
    decode=DecodeCosts(
        measured=True,
        machine="m",
        arch="x86_64",
        threads=2,
        llama_cpp="1",
        entries=(
            CostEntry(type="q8_0", columns=512, rows=1000, ns=30_000.0, spread=0.0, n=5, buffer="CPU"),
            CostEntry(type="q8_0", columns=2048, rows=512, ns=70_000.0, spread=0.0, n=5, buffer="CPU"),
        ),
    ),
    matmuls=tuple(
        MatmulPoint(
            type="q8_0", columns=2048, rows=512, batch=b, threads=2, flops_per_s=s, spread=0.0, n=5, buffer="CPU"
        )
        for b, s in ((16, 50e9), (128, 100e9))
    ),
    attention=(
        *(_attention(1, cached, 1_000.0 + 10.0 * cached) for cached in (15, 1023, 4095)),
        *(_attention(8, cached, 8_000.0 + 80.0 * cached) for cached in (0, 1024, 4096)),
        *(_attention(64, cached, 64_000.0 + 320.0 * cached) for cached in (0, 1024, 4096)),
    ),
    token_ns=20_000.0,
    layer_ns=5_000.0,
    layer_ns_per_value=1.0,
    runtime_bytes=50 << 20,
    reference_decode_ns=300_000.0,
    reference_prompt_ns=2_000_000.0,
)
KNOWN = measured_speeds(COSTS, 2)


def test_a_token_is_its_matrices_its_layers_and_what_it_looks_back_at() -> None:
    short = decode_ms(SHAPE, TYPES, KNOWN, kv_types=F16, cached_tokens=16)
    attention = 2 * (1_000 + 10 * 15)
    assert short == pytest.approx((100_000 + 20_000 + 2 * (5_000 + 512) + attention) / 1e6, rel=0.01)
    longer = decode_ms(SHAPE, TYPES, KNOWN, kv_types=F16, cached_tokens=4096)
    # One layer sees all 4096 tokens, the other its window.
    assert longer - short == pytest.approx(10 * (4095 - 15 + 512 - 15) / 1e6, rel=0.05)


def test_the_first_token_takes_matrices_by_chunks_and_logits_once() -> None:
    one, two = (ttft_ms(SHAPE, TYPES, KNOWN, kv_types=F16, prompt_tokens=n, ubatch_tokens=128) for n in (128, 256))
    chunk = 2 * 2048 * 512 * 128 / 100 + 20_000 + 2 * (5_000 + 128 * 512) + 2 * (64_000 * 2)
    assert 1e6 * one == pytest.approx(chunk + 30_000, rel=0.05)
    assert 1e6 * (two - one) == pytest.approx(chunk + 2 * 320 * 128 * 2, rel=0.2)


def test_many_tokens_at_once_read_the_weights_too() -> None:
    slow = dataclasses.replace(PLAIN, decode=msgspec.structs.replace(PLAIN.decode, bytes_per_s=1e6, flops_per_s=None))
    reading = 1e9 * tensor_bytes("q8_0", (2048, 512)) / 1e6
    assert tensor_prompt_ns(SHAPE, FFN, "q8_0", slow, {4: 3}) == pytest.approx(3 * reading)
    assert tensor_prompt_ns(SHAPE, "norm", "f32", slow, {4: 3}) == 0


def test_an_embedding_that_is_not_tied_is_looked_up() -> None:
    untied = dataclasses.replace(SHAPE, tensors={**SHAPE.tensors, OUTPUT: (512, 1000)}, tied_embedding=False)
    types = {**TYPES, OUTPUT: "q8_0"}
    for speeds in (PLAIN, KNOWN):
        tied = decode_ms(SHAPE, TYPES, speeds, kv_types=F16, cached_tokens=100)
        assert decode_ms(untied, types, speeds, kv_types=F16, cached_tokens=100) == pytest.approx(tied)


@pytest.mark.parametrize("speeds", [PLAIN, KNOWN, speeds_of(load_profile("jetson-orin"))], ids=["cpu", "probed", "gpu"])
@given(tokens=st.integers(1, 9_000), more=st.integers(1, 5_000), ubatch=st.integers(1, 1024))
def test_longer_is_never_faster(speeds: Speeds, tokens: int, more: int, ubatch: int) -> None:
    def decode(n: int) -> float:
        return decode_ms(SHAPE, TYPES, speeds, kv_types=F16, cached_tokens=n)

    def first(n: int) -> float:
        return ttft_ms(SHAPE, TYPES, speeds, kv_types=F16, prompt_tokens=n, ubatch_tokens=ubatch)

    assert decode(tokens + more) >= decode(tokens) * (1 - 1e-9)
    whole = tokens // ubatch * ubatch
    if whole:
        assert first(whole + ubatch) > first(whole)


@given(prompt=st.integers(1, 20_000), ubatch=st.integers(1, 4096))
def test_chunks_make_up_the_prompt(prompt: int, ubatch: int) -> None:
    chunks = prompt_chunks(prompt, ubatch)
    assert sum(size * count for size, count in chunks.items()) == prompt
    assert all(0 < size <= ubatch and count > 0 for size, count in chunks.items())


def test_a_datasheet_knows_bytes_and_operations() -> None:
    rate = LAPTOP.bandwidth_bytes_per_s * (LAPTOP.backend.decode_efficiency or 0)
    for kind in ("q4_0", "q8_0"):
        assert PLAIN.decode.ns(kind, (576, 1536)) == pytest.approx(1e9 * tensor_bytes(kind, (576, 1536)) / rate)
    weak = msgspec.structs.replace(PLAIN.decode, flops_per_s=1e9)
    assert weak.ns("q4_0", (576, 1536)) == pytest.approx(2 * 576 * 1536)
