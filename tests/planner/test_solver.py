"""The solver against brute force on small instances, and against its own claims on realistic ones."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import math
import random
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeq.ggml_types import TYPES
from edgeq.planner.branching import search
from edgeq.planner.knapsack import QUANTITIES, Item, Limits, Objective, Option, Quantity, Solution, Table, upper_limit
from edgeq.planner.lagrangian import relax
from edgeq.planner.solver import Infeasible, k_best, solve

_SHAPES = (
    ("attn_q", 576, 576, 1),
    ("attn_k", 576, 192, 1),
    ("attn_v", 576, 192, 8),
    ("attn_output", 576, 576, 2),
    ("ffn_gate", 576, 1536, 1),
    ("ffn_up", 576, 1536, 1),
    ("ffn_down", 1536, 576, 2),
)


def realistic(seed: int, *, layers: int = 30, k_quants: bool = False) -> list[Item]:
    """A small language model: one large embedding, seven matrices a layer, KL that falls by 4 a bit with noise."""
    rng = np.random.default_rng(seed)
    speed = {name: 1 + 0.35 * rng.random() for name in TYPES}

    def item(name: str, columns: int, rows: int, sensitivity: float) -> Item:
        columns = columns // 256 * 256 if k_quants else columns
        options = []
        for kind in TYPES.values():
            if kind.fits(columns) and kind.name not in {"f32", "bf16"}:
                n_bytes = kind.row_bytes(columns) * rows
                kld = sensitivity * columns * rows * 4.0**-kind.bits_per_weight * math.exp(rng.normal(0, 0.35))
                options.append(Option(kind.name, n_bytes, n_bytes + 64, speed[kind.name] * n_bytes / 12, kld))
        return Item(name, tuple(options))

    items = [item("token_embd.weight", 576, 49152, 1.5e-7)]
    for layer in range(layers):
        for name, columns, rows, factor in _SHAPES:
            sensitivity = 3e-7 * factor * math.exp(rng.normal(0, 0.8))
            items.append(item(f"blk.{layer}.{name}.weight", columns, rows, sensitivity))
    return items


def between(items: Sequence[Item], q: Quantity, share: float) -> float:
    """A limit that far between the least and the largest sum."""
    least, most = (math.fsum(f(getattr(o, q) for o in i.options) for i in items) for f in (min, max))
    return least + share * (most - least)


def mixes(items: Sequence[Item]) -> Iterator[dict[Quantity, float]]:
    for options in itertools.product(*(item.options for item in items)):
        yield {q: math.fsum(getattr(o, q) for o in options) for q in QUANTITIES}


def within(mix: dict[Quantity, float], limits: Limits) -> bool:
    return all(mix[q] <= upper_limit(q, value) for q, value in limits.given().items())


def assert_is_a_mix(items: Sequence[Item], limits: Limits, solution: Solution) -> None:
    assert solution.types.keys() == {item.name for item in items}
    chosen = [next(o for o in item.options if o.type == solution.types[item.name]) for item in items]
    for q in QUANTITIES:
        exact = math.fsum(getattr(o, q) for o in chosen)
        assert getattr(solution, q) == exact
        assert type(getattr(solution, q)) is (int if q.endswith("bytes") else float)
    for q, value in limits.given().items():
        assert getattr(solution, q) <= value * (1 if q.endswith("bytes") else 1 + 1e-9)


_FIGURES = st.tuples(
    st.integers(0, 60),
    st.integers(0, 60),
    st.one_of(st.integers(0, 40).map(float), st.floats(0.0, 1e6)),
    st.one_of(st.integers(0, 9).map(lambda n: n / 8), st.floats(0.0, 10.0, allow_subnormal=False)),
)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Item], Limits]:
    n_items = draw(st.integers(1, 5))
    items = []
    for i in range(n_items):
        figures = draw(st.lists(_FIGURES, min_size=1, max_size=5))
        scale = draw(st.sampled_from([1, 1, 1, 30, 1_000_003]))  # now and then one item far larger than the rest
        options = tuple(Option(f"t{j}", a * scale, b * scale, c, d) for j, (a, b, c, d) in enumerate(figures))
        items.append(Item(f"i{i}", options))
    limits: dict[Quantity, float] = {}
    mix = draw(st.sampled_from(list(mixes(items))))
    for q in draw(st.sets(st.sampled_from(QUANTITIES))):
        # A limit on a mix's own figure is the hard case: one byte less excludes it.
        limits[q] = mix[q] if draw(st.booleans()) else math.floor(between(items, q, draw(st.floats(-0.1, 1.0))))
    return items, Limits.of(limits)


@settings(max_examples=150)
@given(problems(), st.sampled_from(QUANTITIES))
def test_the_exact_solution_is_the_brute_force_one(problem: tuple[list[Item], Limits], objective: Objective) -> None:
    items, limits = problem
    allowed = [mix for mix in mixes(items) if within(mix, limits)]
    if not allowed:
        with pytest.raises(Infeasible) as caught:
            solve(items, limits, objective, gap=0.0, time_limit_s=60)
        assert_explains(items, limits, caught.value)
        return
    found = solve(items, limits, objective, gap=0.0, time_limit_s=60)
    assert_is_a_mix(items, limits, found)
    best = min(mix[objective] for mix in allowed)
    if objective.endswith("bytes"):
        assert getattr(found, objective) == best
    assert getattr(found, objective) == pytest.approx(best, rel=1e-7, abs=1e-9)
    assert found.gap <= 1e-7
    lowest = min(mix["kld"] for mix in allowed if mix[objective] <= best * (1 + 1e-10))
    assert found.kld <= lowest * (1 + 2e-7) + 1e-9, "of equally good mixes the one with the lower KL is taken"


def assert_explains(items: list[Item], limits: Limits, error: Infeasible) -> None:
    """Every claim of an `Infeasible` by brute force."""
    everything = list(mixes(items))
    wanted = limits.given()
    assert error.proven
    assert error.least == {q: pytest.approx(min(mix[q] for mix in everything)) for q in wanted}

    def possible(qs: Sequence[Quantity]) -> bool:
        return any(within(mix, Limits.of({q: wanted[q] for q in qs})) for mix in everything)

    size = len(error.contradiction)
    assert not possible(error.contradiction)
    assert all(possible(c) for n in range(size) for c in itertools.combinations(wanted, n)), "a smaller set exists"
    assert error.raise_to.keys() == set(error.contradiction)
    for q, value in error.raise_to.items():
        others = Limits.of({o: v for o, v in wanted.items() if o != q})
        least = min((mix[q] for mix in everything if within(mix, others)), default=None)
        assert value == (None if least is None else pytest.approx(least, rel=1e-7, abs=1e-9))
        assert type(value) is int or not q.endswith("bytes") or value is None
    assert any(within(mix, error.nearest) for mix in everything)
    assert all(error.nearest.given()[q] >= value for q, value in wanted.items())
    assert solve(items, error.nearest).types.keys() == {item.name for item in items}


@settings(max_examples=120)
@given(problems(), st.sampled_from(QUANTITIES))
def test_the_fast_path_keeps_what_it_claims(problem: tuple[list[Item], Limits], objective: Objective) -> None:
    items, limits = problem
    allowed = [mix[objective] for mix in mixes(items) if within(mix, limits)]
    try:
        found = solve(items, limits, objective, exact=False)
    except Infeasible as error:
        assert not (error.proven and allowed)
        return
    assert_is_a_mix(items, limits, found)
    value, best = getattr(found, objective), min(allowed)
    assert found.method == "lagrangian"
    distance = (value - best) / value if value else value - best
    assert distance <= found.gap + 1e-8


@settings(max_examples=120)
@given(problems(), st.sampled_from(QUANTITIES))
def test_the_bound_is_below_every_mix(problem: tuple[list[Item], Limits], objective: Objective) -> None:
    items, limits = problem
    knapsack = Table(items, prune=False).knapsack(objective, limits)
    bounds = [relax(knapsack).bound, search(knapsack, None, gap=0.0, deadline=math.inf).bound]
    allowed = [mix[objective] for mix in mixes(items) if within(mix, limits)]
    spread = between(items, objective, 1) - between(items, objective, 0)
    assert all(bound <= min(allowed, default=math.inf) + 1e-7 * spread for bound in bounds)


@pytest.mark.parametrize("n_limits", [1, 2, 3])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_bound_is_that_of_the_linear_relaxation(seed: int, n_limits: int) -> None:
    optimize = pytest.importorskip("scipy.optimize")
    items = realistic(seed, layers=6, k_quants=True)
    qs: tuple[Objective, ...] = ("file_bytes", "ns", "memory_bytes")
    limits = Limits.of(
        {q: between(items, q, share) for q, share in zip(qs[:n_limits], (0.3, 0.28, 0.299), strict=False)}
    )
    knapsack = Table(items, prune=True).knapsack("kld", limits)
    real = np.isfinite(knapsack.cost)
    one_each = np.repeat(np.eye(len(items)), real.sum(axis=1), axis=1)
    use = knapsack.use[:, real] / knapsack.limit[:, None]
    solved = optimize.linprog(
        knapsack.cost[real] * 1e6,  # HiGHS's tolerance of reduced costs is absolute
        A_ub=use,
        b_ub=np.ones(n_limits),
        A_eq=one_each,
        b_eq=np.ones(len(items)),
    )
    assert relax(knapsack).bound == pytest.approx(solved.fun / 1e6, rel=1e-6)


@settings(max_examples=50)
@given(problems(), st.integers(1, 3), st.integers(1, 6))
def test_the_best_few_are_those_of_brute_force(problem: tuple[list[Item], Limits], distance: int, k: int) -> None:
    items, limits = problem
    names = [item.name for item in items]
    allowed = []
    for options in itertools.product(*(item.options for item in items)):
        mix: dict[Quantity, float] = {q: math.fsum(getattr(o, q) for o in options) for q in QUANTITIES}
        if within(mix, limits):
            allowed.append((mix["kld"], [o.type for o in options]))
    if not allowed:
        with pytest.raises(Infeasible):
            k_best(items, limits, k=k, distance=distance, gap=0.0, time_limit_s=60)
        return
    found = k_best(items, limits, k=k, distance=distance, gap=0.0, time_limit_s=60)
    kept: list[list[str]] = []
    for solution in found:
        types = [solution.types[name] for name in names]
        far = [kld for kld, other in allowed if all(_differ(other, before) >= distance for before in kept)]
        assert all(_differ(types, before) >= distance for before in kept)
        assert solution.kld == pytest.approx(min(far), rel=1e-7, abs=1e-8)
        kept.append(types)
    if len(found) < k:
        assert not [other for _, other in allowed if all(_differ(other, before) >= distance for before in kept)]


def _differ(a: Sequence[str], b: Sequence[str]) -> int:
    return sum(x != y for x, y in zip(a, b, strict=True))


@settings(max_examples=150)
@given(problems())
def test_pruning_leaves_an_equal_or_better_option_for_each_that_it_drops(problem: tuple[list[Item], Limits]) -> None:
    items, _ = problem
    table = Table(items, prune=True)
    for item in items:
        kept = table.options[table.names.index(item.name)]
        assert set(kept) <= set(item.options)
        for option in item.options:
            assert any(all(getattr(o, q) <= getattr(option, q) for q in QUANTITIES) for o in kept)
        for a, b in itertools.permutations(kept, 2):
            assert any(getattr(a, q) < getattr(b, q) for q in QUANTITIES), "one of two kept options is useless"


@pytest.mark.parametrize("objective", QUANTITIES)
def test_the_order_of_items_and_options_does_not_matter(objective: Objective) -> None:
    items = realistic(3, layers=4)
    limits = Limits.of({"file_bytes": between(items, "file_bytes", 0.2), "kld": between(items, "kld", 0.1)})
    rng = random.Random(0)
    shuffled = [dataclasses.replace(i, options=tuple(rng.sample(i.options, len(i.options)))) for i in items]
    rng.shuffle(shuffled)
    assert solve(shuffled, limits, objective) == solve(items, limits, objective)


@pytest.mark.parametrize(
    ("seed", "k_quants", "share"), [(0, False, 0.1), (1, False, 0.3), (2, True, 0.15), (3, True, 0.3)]
)
def test_a_whole_model_is_solved_to_a_small_proven_gap(seed: int, k_quants: bool, share: float) -> None:
    items = realistic(seed, k_quants=k_quants)
    size, time = between(items, "file_bytes", share), between(items, "ns", share)
    for limits in (Limits.of({"file_bytes": size}), Limits.of({"file_bytes": size, "ns": time})):
        fast = solve(items, limits, exact=False)
        exact = solve(items, limits, gap=1e-3, time_limit_s=60)
        for found in (fast, exact):
            assert_is_a_mix(items, limits, found)
        assert exact.gap <= 1e-3
        assert fast.gap <= 0.02
        assert exact.kld * (1 - exact.gap) <= fast.kld * (1 + 1e-12)
        assert fast.kld * (1 - fast.gap) <= exact.kld * (1 + 1e-12)
        # The other way round: no more bytes are needed for that KL than it has.
        back = solve(items, Limits(kld=exact.kld, ns=limits.ns), "file_bytes", gap=1e-3, time_limit_s=60)
        assert back.file_bytes <= exact.file_bytes * (1 + 1e-3)


def test_without_scipy_the_lagrangian_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    items = realistic(0, layers=3)
    limits = Limits.of({"file_bytes": between(items, "file_bytes", 0.2), "ns": between(items, "ns", 0.2)})
    exact = solve(items, limits, gap=0.0, time_limit_s=60)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    fast = solve(items, limits, gap=0.0, time_limit_s=60)
    assert (exact.method, fast.method) == ("milp", "lagrangian")
    assert exact.gap <= 1e-9 < fast.gap
    assert exact.kld <= fast.kld <= exact.kld / (1 - fast.gap) * (1 + 1e-9)


def test_no_time_left_still_gives_a_mix_with_its_gap() -> None:
    items = realistic(1, layers=8)
    limits = Limits.of({"file_bytes": between(items, "file_bytes", 0.2)})
    hurried = solve(items, limits, gap=0.0, time_limit_s=0.0)
    assert_is_a_mix(items, limits, hurried)
    assert solve(items, limits, gap=0.0, time_limit_s=60).kld >= hurried.kld * (1 - hurried.gap) * (1 - 1e-9)


def test_thousands_of_items_take_the_fast_path() -> None:
    items = realistic(5, layers=500)
    limits = Limits.of({"file_bytes": between(items, "file_bytes", 0.2), "ns": between(items, "ns", 0.25)})
    found = solve(items, limits)
    assert_is_a_mix(items, limits, found)
    assert found.method == "lagrangian"
    assert found.gap <= 1e-3


def test_standard_output_stays_clean(capfd: pytest.CaptureFixture[str]) -> None:
    items = realistic(0, k_quants=True)
    for share in (0.05, 0.15):
        solve(items, Limits.of({"kld": between(items, "kld", share**3)}), "file_bytes", gap=0.0, time_limit_s=1.0)
    assert capfd.readouterr() == ("", "")


def test_a_forbidden_part_is_avoided() -> None:
    items = realistic(2, layers=2)
    limits = Limits.of({"file_bytes": between(items, "file_bytes", 0.3)})
    first = solve(items, limits, gap=0.0, time_limit_s=60)
    part = {"token_embd.weight": first.types["token_embd.weight"]}
    second = solve(items, limits, gap=0.0, forbidden=[part])
    assert second.types["token_embd.weight"] != first.types["token_embd.weight"]
    assert second.kld >= first.kld


def test_when_all_that_fits_is_forbidden_no_limit_is_blamed() -> None:
    items = [Item("a", (Option("q", 1, 1, 1.0, 1.0), Option("f", 9, 9, 1.0, 0.0)))]
    with pytest.raises(Infeasible, match="forbidden") as caught:
        solve(items, Limits(file_bytes=5), forbidden=[{"a": "q"}])
    assert caught.value.contradiction == ()
    assert caught.value.nearest == Limits(file_bytes=5)


def _option(kind: str = "q", **changes: float) -> Option:
    return dataclasses.replace(Option(kind, 1, 1, 1.0, 1.0), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("items", "arguments", "message"),
    [
        ([], {}, "no items"),
        ([Item("a", ())], {}, "no option"),
        ([Item("a", (_option(),)), Item("a", (_option(),))], {}, "same name"),
        ([Item("a", (_option(), _option()))], {}, "same type"),
        ([Item("a", (_option(kld=math.nan),))], {}, "not finite"),
        ([Item("a", (_option(ns=math.inf),))], {}, "not finite"),
        ([Item("a", (_option(file_bytes=2**60),))], {}, "any machine"),
        ([Item("a", (_option(),))], {"forbidden": [{"b": "q"}]}, "'b'"),
        ([Item("a", (_option(),))], {"limits": Limits(ns=math.nan)}, "not a finite"),
        ([Item("a", (_option(),))], {"gap": -1.0}, "gap"),
        ([Item("a", (_option(),))], {"distance": 0}, "differ"),
    ],
)
def test_what_makes_no_sense_is_refused(items: list[Item], arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solve(items, **{"limits": Limits(), **arguments})  # type: ignore[arg-type]
