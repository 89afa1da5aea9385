"""Options of the solver against the cost model and the device's rules; limits against predictions, both ways."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeq.converters.gguf.header import read_header
from edgeq.converters.gguf.quantize import quantizable_tensors
from edgeq.converters.gguf.recipe import Override
from edgeq.converters.gguf.sensitivity.curvature import Curvature, Curvatures
from edgeq.converters.gguf.shape import model_shape
from edgeq.errors import ConversionError, UsageError
from edgeq.ggml_types import TYPES
from edgeq.planner.candidates import misses
from edgeq.planner.knapsack import Item, Limits
from edgeq.planner.search_items import Pricing, items_of, legal_types, limits_of, token_limits_ms, with_prompt
from edgeq.planner.solver import Infeasible, solve
from edgeq.profiles.device import DeviceProfile
from edgeq.profiles.kernels.cost_table import CostEntry, DecodeCosts
from edgeq.profiles.llm.cost import predict
from edgeq.profiles.llm.model_latency import prompt_chunks, speeds_of
from edgeq.profiles.llm.model_memory import file_bytes
from edgeq.profiles.llm.model_shape import EMBEDDING
from edgeq.profiles.loader import load_profile
from edgeq.types import Budget, Prediction

LAPTOP, JETSON = load_profile("laptop-cpu"), load_profile("jetson-orin")
Menu = dict[str, tuple[str, ...]]
CHUNKS = prompt_chunks(64, 64)


@dataclasses.dataclass(frozen=True)
class World:
    """A model with made-up sensitivities on a device, in all that limits depend on."""

    pricing: Pricing
    base: dict[str, str]
    menu: Menu
    curvatures: Curvatures
    errors: Mapping[str, Mapping[str, float]]

    @property
    def items(self) -> list[Item]:
        items = items_of(self.pricing, self.menu, self.curvatures, self.errors)
        return with_prompt(items, self.pricing, CHUNKS)

    def predict(self, types: Mapping[str, str]) -> Prediction:
        return predict(
            self.pricing.shape,
            types,
            self.pricing.profile,
            context_tokens=256,
            kv_types=("f16", "f16"),
            ubatch_tokens=64,
            prompt_tokens=64,
            speeds=self.pricing.speeds,
        )

    def limits(self, budget: Budget, max_file_bytes: int | None = None) -> Limits:
        return limits_of(
            budget,
            self.pricing,
            self.base,
            self.predict(self.base),
            names=self.menu,
            chunks=CHUNKS,
            max_file_bytes=max_file_bytes,
            max_kld=None,
        )


def _measured() -> DecodeCosts:
    """A table in which the order of types is not that of their bytes."""
    rng = np.random.default_rng(0)
    entries = tuple(
        CostEntry(type=name, columns=64, rows=64, ns=float(rng.uniform(500, 4000)), spread=0.1, n=9, buffer="CPU")
        for name in TYPES
        if TYPES[name].fits(64)
    )
    return DecodeCosts(measured=True, machine="m", arch="x86_64", threads=1, llama_cpp="", entries=entries)


@pytest.fixture(scope="module")
def make_world(tiny_hf: Callable[..., Path]) -> Callable[..., World]:
    def make(
        case: str = "llama-tied", profile: DeviceProfile = LAPTOP, *, width: int = 64, measured: bool = False
    ) -> World:
        header = read_header(tiny_hf(case, width=width).with_suffix(".gguf"))
        stored = {name: tensor.type for name, tensor in header.tensors.items()}
        speeds = speeds_of(profile)
        if measured:
            speeds = dataclasses.replace(speeds, decode=_measured())
        pricing = Pricing(model_shape(header), profile, speeds)
        menu = legal_types(pricing.shape.tensors, stored, quantizable_tensors(header.path), ())
        rng = np.random.default_rng(1)
        flat = Curvature(np.ones(1, np.float32), np.ones(1, np.float32), {32: 1e-3, 256: 5e-3})
        errors = {
            name: {k: 4.0 ** -TYPES[k].bits_per_weight * rng.uniform(0.5, 2) for k in kinds}
            for name, kinds in menu.items()
        }
        return World(pricing, stored, menu, Curvatures(dict.fromkeys(menu, flat), "fisher", 1, ""), errors)

    return make


# The menu


@pytest.mark.parametrize("stored", ["f16", "bf16", "f32"])
@given(width=st.integers(1, 40).map(lambda n: 32 * n) | st.integers(1, 1000))
def test_every_type_that_rows_allow_and_one_float(stored: str, width: int) -> None:
    menu = legal_types({"w": (width, 4), "norm": (width,)}, {"w": stored, "norm": "f32"}, ["w"], ())
    fitting = {name for name, kind in TYPES.items() if not kind.is_float and kind.fits(width)}
    assert menu.keys() == {"w"}
    assert len(set(menu["w"])) == len(menu["w"])
    assert set(menu["w"]) == {stored} | fitting - {"iq1_s", "iq1_m"}


def test_pins_leave_one_type_and_the_first_that_matches_decides() -> None:
    shapes = {"a.weight": (256, 4), "b.weight": (256, 4), "norm": (256,)}
    stored = {"a.weight": "f16", "b.weight": "f16", "norm": "f32"}
    pins = [Override("^a", "iq2_xs"), Override("weight", "q8_0"), Override("norm", "f32")]
    menu = legal_types(shapes, stored, ["a.weight", "b.weight"], pins)
    assert menu == {"a.weight": ("iq2_xs",), "b.weight": ("q8_0",)}


@pytest.mark.parametrize(
    ("pin", "match"),
    [
        (Override("ghost", "q8_0"), "changes nothing: no tensor has such a name"),
        (Override("a", "q4_k"), "a has rows of 64 weights, and q4_k needs a multiple of 256"),
        (Override("norm", "q8_0"), "norm always stays f32"),
    ],
)
def test_pins_that_no_tensor_can_take_are_refused(pin: Override, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        legal_types({"a": (64, 4), "norm": (64,)}, {"a": "f16", "norm": "f32"}, ["a"], [pin])


# What options cost


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(data=st.data())
@pytest.mark.parametrize("case", ["llama-tied", "llama-untied"])
@pytest.mark.parametrize("profile", [LAPTOP, JETSON], ids=["laptop", "jetson"])
def test_sums_differ_from_predictions_by_constants(
    case: str, profile: DeviceProfile, make_world: Callable[..., World], data: st.DataObject
) -> None:
    world = make_world(case, profile)
    by_name = {item.name: {option.type: option for option in item.options} for item in world.items}
    mixes = []
    for _ in range(2):
        types = {**world.base, **{name: data.draw(st.sampled_from(kinds)) for name, kinds in world.menu.items()}}
        options = [by_name[name][types[name]] for name in world.menu]
        mixes.append((types, world.predict(types), options))
    (a_types, a, a_options), (_, b, b_options) = mixes

    def difference(quantity: str) -> float:
        totals = [sum(float(getattr(o, quantity)) for o in options) for options in (a_options, b_options)]
        return totals[0] - totals[1]

    assert a.file_bytes == file_bytes(world.pricing.shape, a_types)
    assert difference("file_bytes") == a.file_bytes - b.file_bytes
    assert difference("memory_bytes") == a.peak_memory_bytes - b.peak_memory_bytes
    assert difference("ns") == pytest.approx(1e6 * (a.itl_ms - b.itl_ms), abs=1e-3)


def test_a_tied_embedding_counts_twice_where_it_is_held_twice(make_world: Callable[..., World]) -> None:
    tied, untied, device = make_world(), make_world("llama-untied"), make_world(profile=JETSON)
    for kind in ("q4_0", "iq4_nl"):
        size = tied.pricing.file_bytes(EMBEDDING, kind)
        assert tied.pricing.memory_bytes(EMBEDDING, kind) == 2 * size
        assert untied.pricing.memory_bytes(EMBEDDING, kind) == size
    assert tied.pricing.memory_bytes(EMBEDDING, "q8_0") == tied.pricing.file_bytes(EMBEDDING, "q8_0")
    assert device.pricing.memory_bytes(EMBEDDING, "q8_0") == 2 * device.pricing.file_bytes(EMBEDDING, "q8_0")
    assert tied.pricing.memory_bytes("blk.0.ffn_up.weight", "q4_0") == tied.pricing.file_bytes(
        "blk.0.ffn_up.weight", "q4_0"
    )


def test_what_is_looked_up_and_what_is_no_matrix_takes_no_time(make_world: Callable[..., World]) -> None:
    world = make_world("llama-untied", measured=True)
    assert world.pricing.ns(EMBEDDING, "q8_0") == 0
    assert world.pricing.ns("output_norm.weight", "f32") == 0
    assert world.pricing.ns("output.weight", "q8_0") > 0
    assert make_world(measured=True).pricing.ns(EMBEDDING, "q8_0") > 0


def test_experts_of_a_stack_all_cost_time(make_world: Callable[..., World]) -> None:
    pricing = make_world(measured=True).pricing
    stack = dataclasses.replace(pricing.shape, tensors={"one": (64, 64), "four": (64, 64, 4)})
    pricing = dataclasses.replace(pricing, shape=stack)
    assert pricing.ns("four", "q4_0") == 4 * pricing.ns("one", "q4_0")


@pytest.mark.parametrize("profile", [LAPTOP, JETSON], ids=["laptop", "jetson"])
def test_rounded_activations_are_part_of_a_types_price(
    profile: DeviceProfile, make_world: Callable[..., World]
) -> None:
    """A CPU rounds them in the block of the weights' type, CUDA always in blocks of 32, and floats not at all."""
    world = make_world(profile=profile, width=256)
    for item in world.items:
        for option in item.options:
            rounding = option.kld - world.errors[item.name][option.type]
            block = TYPES[option.type].block_weights
            expected = 0 if block == 1 else 5e-3 if block == 256 and profile is LAPTOP else 1e-3
            assert rounding == pytest.approx(expected)


def test_rows_that_are_no_multiple_of_256_have_one_rounding(make_world: Callable[..., World]) -> None:
    world = make_world()
    only = Curvature(np.ones(1, np.float32), np.ones(1, np.float32), {32: 1e-3})
    world = dataclasses.replace(world, curvatures=Curvatures(dict.fromkeys(world.menu, only), "imatrix", 1, ""))
    for item in world.items:
        for option in item.options:
            assert option.kld >= (0 if option.type == "f16" else 1e-3)


def test_a_type_that_cannot_hold_the_weights_is_no_option(make_world: Callable[..., World]) -> None:
    world = make_world()
    name = next(iter(world.menu))
    for bad in (float("nan"), float("inf")):
        errors: dict[str, dict[str, float]] = {n: dict(prices) for n, prices in world.errors.items()}
        errors[name]["q4_0"] = bad
        items = dataclasses.replace(world, errors=errors).items
        assert "q4_0" not in [option.type for option in items[0].options]
        assert len(items[0].options) == len(world.menu[name]) - 1
        solve(items, Limits(), "file_bytes")
        with pytest.raises(ConversionError, match=f"q4_0 cannot hold the weights of {name}"):
            items_of(world.pricing, {name: ("q4_0",)}, world.curvatures, errors)


# Limits


def _budget(draw: Callable[[Any], Any], low: Prediction, high: Prediction) -> tuple[Budget, int | None]:
    """Limits around what mixes take, so that some are met and others are not."""

    def between(field: str) -> float | None:
        share = draw(st.none() | st.floats(-0.1, 1.1))
        a, b = getattr(low, field), getattr(high, field)
        return None if share is None else float(a + share * (b - a))

    memory, size, itl, first = (between(f) for f in ("peak_memory_bytes", "file_bytes", "itl_ms", "ttft_ms"))
    speed = between("tokens_per_s")
    budget = Budget(
        peak_memory_bytes=None if memory is None else round(memory), itl_ms=itl, ttft_ms=first, tokens_per_s=speed
    )
    return budget, None if size is None else round(size)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(data=st.data())
@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("flops", [1e6, 1e12], ids=["slow prompts", "fast prompts"])
def test_limits_hold_exactly_where_the_budget_does(
    measured: bool, flops: float, make_world: Callable[..., World], data: st.DataObject
) -> None:
    backend = msgspec.structs.replace(LAPTOP.backend, compute_flops_per_s=flops)
    world = make_world(profile=msgspec.structs.replace(LAPTOP, backends=(backend,)), measured=measured)
    options = {item.name: {option.type: option for option in item.options} for item in world.items}
    extremes = [world.predict({**world.base, **solve(world.items, Limits(), q).types}) for q in ("file_bytes", "kld")]
    budget, size = _budget(data.draw, *extremes)
    limits = world.limits(budget, size)
    mix = {name: data.draw(st.sampled_from(kinds)) for name, kinds in world.menu.items()}
    sums = {q: sum(getattr(options[n][k], q) for n, k in mix.items()) for q in limits.given()}
    # A millionth on either side is left to rounding.
    over = any(sums[q] > limit + 1e-6 * abs(limit) for q, limit in limits.given().items())
    under = all(sums[q] <= limit - 1e-6 * abs(limit) for q, limit in limits.given().items())
    missed = misses(world.predict({**world.base, **mix}), budget, size)
    assert not (over and not missed)
    assert not (under and missed)
    try:
        solution = solve(world.items, limits)
    except Infeasible:
        return
    assert all(miss.excess < 1e-6 for miss in misses(world.predict({**world.base, **solution.types}), budget, size))


def test_each_line_of_a_budget_limits_a_tokens_time() -> None:
    assert token_limits_ms(Budget(itl_ms=30.0, tokens_per_s=50.0)) == {"itl_ms": 30.0, "tokens_per_s": 20.0}
    assert token_limits_ms(Budget(ttft_ms=100.0)) == {}


def test_without_limits_nothing_is_limited(make_world: Callable[..., World]) -> None:
    world = make_world()
    assert world.limits(Budget()) == Limits()
