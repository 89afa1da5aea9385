"""Posing a model as a problem: the menu, the float types, where times come from."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import msgspec
import numpy as np
import pytest

from edgeq.converters.gguf.header import read_header
from edgeq.converters.gguf.quantize import quantizable_tensors
from edgeq.converters.gguf.recipe import Override
from edgeq.converters.gguf.sensitivity.evidence import EvidenceRequest, Workshop
from edgeq.errors import UsageError
from edgeq.planner import problem as module
from edgeq.planner.candidates import Settings
from edgeq.planner.knapsack import Limits
from edgeq.planner.problem import Problem, SearchOptions, pose
from edgeq.planner.solver import solve
from edgeq.profiles.kernels.cost_table import CostEntry, DecodeCosts
from edgeq.profiles.llm.cost import predict
from edgeq.profiles.loader import load_profile

# A copy, so that a shipped figure may change.
LAPTOP = load_profile(str(Path(__file__).parents[1] / "profiles" / "samples" / "laptop-cpu.yaml"))
JETSON = load_profile("jetson-orin")
HERE = msgspec.structs.replace(LAPTOP, arch=platform.machine())
OPTIONS = SearchOptions(evidence=EvidenceRequest(tokens=300, estimator="imatrix"), decode_costs="profile")
MEASURE = dataclasses.replace(OPTIONS, decode_costs="auto")
SETTINGS = Settings(context_tokens=256, kv_type="f16", ubatch_tokens=64)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[tuple[int, int]], list[str]]]:
    """What would have been measured: the table comes at once, and each type costs what it says."""
    calls: list[tuple[list[tuple[int, int]], list[str]]] = []

    def table(shapes: Sequence[tuple[int, int]], types: Sequence[str], **_options: Any) -> DecodeCosts:
        calls.append((list(shapes), list(types)))
        entries = tuple(
            CostEntry(type=t, columns=c, rows=r, ns=float(c * r + 7 * i), spread=0.1, n=5, buffer="CPU")
            for i, t in enumerate(types)
            for c, r in shapes
            if c % 32 == 0
        )
        return DecodeCosts(
            measured=True, machine="cpu", arch=platform.machine(), threads=1, llama_cpp="b1", entries=entries
        )

    monkeypatch.setattr(module, "costs_for", table)
    return calls


def _pose(path: Path, shop: Workshop, *pins: Override, options: SearchOptions = OPTIONS, **changes: Any) -> Problem:
    shop = dataclasses.replace(shop, weights_key=str(path))
    return pose(path, None, msgspec.structs.replace(HERE, **changes), pins, options, shop)


def test_every_matrix_is_an_item_and_the_rest_stays(tiny_hf: Callable[..., Path], shop: Workshop) -> None:
    path = tiny_hf("llama-tied").with_suffix(".gguf")
    problem = _pose(path, shop)
    assert {item.name for item in problem.items} == quantizable_tensors(path)
    assert problem.base == {name: tensor.type for name, tensor in read_header(path).tensors.items()}
    assert problem.costs_note == "bytes over the bandwidth of the profile laptop-cpu; no kernel was timed"
    smallest = problem.types(solve(problem.items, Limits(), "file_bytes"))
    assert {kind for name, kind in smallest.items() if "norm" in name} == {"f32"}
    assert set(smallest.values()) <= {"f32", "q4_0", "iq4_nl"}
    plain = predict(
        problem.pricing.shape,
        smallest,
        HERE,
        context_tokens=256,
        kv_types=("f16", "f16"),
        ubatch_tokens=64,
        prompt_tokens=128,
    )
    assert problem.predict(smallest, SETTINGS, 128) == plain
    assert problem.predict(smallest, SETTINGS, 1000).prompt_tokens == 256


def test_kernels_are_timed_where_the_target_is_like_this_machine(
    tiny_hf: Callable[..., Path], shop: Workshop, asked: list[tuple[list[tuple[int, int]], list[str]]]
) -> None:
    path = tiny_hf("llama-tied").with_suffix(".gguf")
    problem = _pose(path, shop, options=MEASURE)
    assert asked == [([(64, 32), (64, 64), (64, 128), (64, 320), (128, 64)], asked[0][1])]
    assert set(asked[0][1]) == {"f16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl"}
    assert problem.costs_note == "kernels timed on cpu with 1 threads"
    types = problem.types(solve(problem.items, Limits(), "file_bytes"))
    matrices = sum(problem.pricing.ns(name, kind) for name, kind in types.items()) / 1e6
    layers = len(problem.pricing.shape.layers)
    overhead = HERE.backend.token_overhead_ms + layers * HERE.backend.layer_overhead_ms
    assert problem.predict(types, SETTINGS, 64).itl_ms == pytest.approx(
        overhead
        + matrices
        + 1e3
        * problem.predict(types, SETTINGS, 64).kv_cache_bytes
        / (HERE.memory.bandwidth_bytes_per_s * (HERE.backend.decode_efficiency or 0))
    )
    for elsewhere in ({"arch": "riscv64"}, {"gpu": JETSON.gpu, "backends": JETSON.backends}):
        assert "no kernel was timed" in _pose(path, shop, options=MEASURE, **elsewhere).costs_note
    assert len(asked) == 1


def test_what_every_pin_leaves_out_has_a_time_all_the_same(
    tiny_hf: Callable[..., Path], shop: Workshop, asked: list[tuple[list[tuple[int, int]], list[str]]]
) -> None:
    """With all matrices pinned, the float type is on no menu; the time of the file as it is counts anyway."""
    path = tiny_hf("llama-tied").with_suffix(".gguf")
    names = "|".join(sorted(quantizable_tensors(path)))
    problem = _pose(path, shop, Override(f"^({names})$", "q4_0"), options=MEASURE)
    assert asked[-1][1] == ["f16", "q4_0"]
    assert problem.predict(problem.base, SETTINGS, 64).itl_ms > 0
    assert all(len(item.options) == 1 for item in problem.items)


def _mixture(path: Path) -> Path:
    """A random llama with four experts a layer and a byte vocabulary."""
    width, inner, n_experts = 64, 96, 4
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(512)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    writer.add_expert_count(n_experts)
    writer.add_expert_used_count(2)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL, *[gguf.TokenType.BYTE] * 256]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types(kinds)
    rng = np.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        dtype = np.float32 if len(shape) == 1 or "inp" in name else np.float16
        values = np.ones(shape) if len(shape) == 1 else 0.2 * rng.standard_normal(shape)
        writer.add_tensor(f"{name}.weight", values.astype(dtype))

    for name in ("token_embd", "output"):
        add(name, len(tokens), width)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        add(name, width)
    for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
        add(f"blk.0.{part}", width, width)
    add("blk.0.ffn_gate_inp", n_experts, width)
    add("blk.0.ffn_gate_exps", n_experts, inner, width)
    add("blk.0.ffn_up_exps", n_experts, inner, width)
    add("blk.0.ffn_down_exps", n_experts, width, inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_experts_are_priced_together_and_their_router_has_a_time(
    tmp_path: Path, shop: Workshop, asked: list[tuple[list[tuple[int, int]], list[str]]]
) -> None:
    path = _mixture(tmp_path / "moe.gguf")
    problem = _pose(path, shop, options=MEASURE)
    assert "f32" in asked[0][1]
    router, experts = "blk.0.ffn_gate_inp.weight", "blk.0.ffn_up_exps.weight"
    assert problem.pricing.ns(router, "f32") > 0
    assert problem.pricing.shape.tensors[experts] == (64, 96, 4)
    item = next(item for item in problem.items if item.name == experts)
    prices = {option.type: option for option in item.options}
    assert prices["f16"].kld == 0 < prices["q8_0"].kld < prices["q4_0"].kld
    # A token goes through two of the four experts.
    assert prices["q4_0"].ns == 2 * problem.pricing.speeds.decode.ns("q4_0", (64, 96))
    assert router not in {i.name for i in problem.items}
    seen: list[str] = []
    again = dataclasses.replace(shop, progress=lambda stage, *_: seen.append(stage))
    assert _pose(path, again, options=MEASURE).items == problem.items
    assert seen == []


def test_pins_that_make_no_sense_are_refused_before_any_work(tiny_hf: Callable[..., Path], shop: Workshop) -> None:
    def stop(*_: object) -> None:
        pytest.fail("work began")

    path = tiny_hf("llama-tied").with_suffix(".gguf")
    for pin in (Override("ghost", "q8_0"), Override("attn_q", "q4_k"), Override("output_norm", "q8_0")):
        with pytest.raises(UsageError):
            _pose(path, dataclasses.replace(shop, progress=stop), pin)
