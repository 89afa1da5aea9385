from __future__ import annotations

import dataclasses
import math

import pytest

from edgeq.errors import ProfileError, UsageError
from edgeq.profiles.device import DeviceProfile, power_mode_of
from edgeq.profiles.llm.model_memory import kv_cache_bytes
from edgeq.profiles.llm.model_shape import LayerShape, ModelShape
from edgeq.profiles.llm.weight_schemes import (
    SCHEMES,
    Grid,
    decode_ms,
    find_scheme,
    ggml_read_bytes,
    kv_read_bytes,
    scheme_read_bytes,
)
from edgeq.profiles.loader import parse_profile

EMBD, FF, VOCAB = 256, 512, 1000
MATRICES = {"blk.0.attn_q.weight": (EMBD, EMBD), "blk.0.ffn_up.weight": (EMBD, FF), "blk.0.ffn_down.weight": (FF, EMBD)}
IN_BLOCKS = sum(math.prod(shape) for shape in MATRICES.values())
EMBEDDING = EMBD * VOCAB
PROFILE = """
name: board
summary: a board
arch: aarch64
cpu: {name: A78, cores: 6}
gpu: {name: Ampere, compute_capability: "8.7", sms: 8, int8_ops_per_s: 40TOPS}
memory: {total_bytes: 8GB, visible_bytes: 8GB, reserved_bytes: 1GB, unified: true, bandwidth_bytes_per_s: 100GB/s}
power_modes:
  slow: {bandwidth_bytes_per_s: 50GB/s, int8_ops_per_s: 20TOPS}
  fast: {}
power_mode: fast
backends:
  llama.cpp-cuda:
    precisions: [fp16]
    decode_efficiency: 0.5
    compute_efficiency: 0.5
    token_overhead_ms: 1ms
    layer_overhead_ms: 0.1ms
    runtime_bytes: 96MiB
  tensorrt:
    precisions: [fp16]
provenance: datasheet
sources: {cpu: x, gpu: x, memory: x, power_modes: x, backends: x}
"""


def shape(*, tied: bool = True, layers: int = 1) -> ModelShape:
    tensors = {"token_embd.weight": (EMBD, VOCAB), **MATRICES, "output_norm.weight": (EMBD,)}
    if not tied:
        tensors["output.weight"] = (EMBD, VOCAB)
    return ModelShape(
        tensors=tensors,
        layers=[LayerShape(128, 64, 4, 100 if i % 2 else None) for i in range(layers)],
        key_head_width=64,
        value_head_width=32,
        embedding_width=EMBD,
        feed_forward_width=FF,
        n_vocab=VOCAB,
        tied_embedding=tied,
        header_bytes=0,
    )


@pytest.fixture
def profile() -> DeviceProfile:
    return parse_profile(PROFILE, "board.yaml")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("name", "block_bits", "output_bits"),
    [
        ("fp16", 16, 16),
        ("int4_awq", 4 + 16 / 128, 16),
        ("w4a16", 4 + 16 / 128, 16),
        ("q4f16_1", 4.5, 4.5),
    ],
)
def test_bits_of_each_scheme(name: str, block_bits: float, output_bits: float, tied: bool) -> None:
    """One matrix of the size of the embedding is read, tied or not: the other is looked up only."""
    expected = (IN_BLOCKS * block_bits + EMBEDDING * output_bits) / 8 + 2 * EMBD
    assert scheme_read_bytes(shape(tied=tied), SCHEMES[name]) == expected


def test_a_scale_for_each_channel() -> None:
    rows = sum(dims[1] for dims in MATRICES.values())
    expected = IN_BLOCKS / 2 + 2 * rows + EMBEDDING * 4.5 / 8 + 2 * EMBD
    assert scheme_read_bytes(shape(), SCHEMES["q4f16_ft"]) == expected


def test_4_5_bits_are_those_of_q4_0() -> None:
    dims = (EMBD, FF)
    assert Grid(4, 16, 32).matrix_bytes(dims) == 18 * FF * EMBD // 32


def test_an_incomplete_group_has_a_scale_too() -> None:
    assert Grid(4, 16, 128).matrix_bytes((130, 3)) == 3 * (130 / 2 + 2 * 2)


@pytest.mark.parametrize("tied", [True, False])
def test_ggml_types(tied: bool) -> None:
    model = shape(tied=tied)
    types = {name: "f32" if len(dims) == 1 else "q8_0" for name, dims in model.tensors.items()}
    assert ggml_read_bytes(model, types) == (IN_BLOCKS + EMBEDDING) * 34 // 32 + 4 * EMBD
    assert ggml_read_bytes(model, {**types, "token_embd.weight": "q4_0"}) == (
        IN_BLOCKS * 34 // 32 + EMBEDDING * (18 if tied else 34) // 32 + 4 * EMBD
    )


def test_kv_cache_is_read_as_far_as_each_layer_sees() -> None:
    assert kv_read_bytes(shape(layers=2), 0) == 0
    assert kv_read_bytes(shape(layers=2), 80) == 2 * 80 * 2 * (128 + 64)
    assert kv_read_bytes(shape(layers=2), 300) == (300 + 100) * 2 * (128 + 64)
    whole = kv_cache_bytes(shape(), 512, "q8_0", "q8_0", 512)
    assert kv_read_bytes(shape(), 512, "q8_0") == whole


def test_milliseconds_by_memory(profile: DeviceProfile) -> None:
    """50 GB/s are reached: 200 MB take 4 ms, 50 MB of KV cache 1 ms, the token 1 ms, three layers 0.3 ms."""
    model, backend = shape(layers=3), profile.backend
    assert decode_ms(model, profile, backend, weight_bytes=2e8, kv_bytes=5e7) == pytest.approx(4 + 1 + 1 + 0.3)
    slow = power_mode_of(profile, "slow")
    assert decode_ms(model, slow, backend, weight_bytes=2e8) == pytest.approx(8 + 1.3)


def test_milliseconds_by_arithmetic(profile: DeviceProfile) -> None:
    """Half of 20 TFLOPS: two operations a weight, the embedding's counted once because it is the output too."""
    big = dataclasses.replace(shape(), tensors={"token_embd.weight": (50_000, 100_000)})
    expected = 1e3 * 2 * 5e9 / 10e12 + 1.1
    assert decode_ms(big, profile, profile.backend, weight_bytes=1.0) == pytest.approx(expected)


def test_a_backend_that_runs_no_language_models(profile: DeviceProfile) -> None:
    with pytest.raises(ProfileError, match="board does not say how fast tensorrt decodes"):
        decode_ms(shape(), profile, profile.backends[1], weight_bytes=1.0)


def test_names() -> None:
    assert find_scheme("Q4F16_1") is SCHEMES["q4f16_1"]
    with pytest.raises(UsageError, match="q4f16_1"):
        find_scheme("q4f16")
    assert all(scheme.name == name and scheme.source for name, scheme in SCHEMES.items())
