"""The controls: within their bytes, what they say they are, and the same for the same seed."""

from __future__ import annotations

import itertools
import math
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edgeq.ggml_types import TYPES
from edgeq.planner.solver import Infeasible, Item, Limits, Option, solve


@pytest.fixture(scope="module")
def controls(repo: Path) -> Any:
    return SimpleNamespace(**runpy.run_path(str(repo / "scripts" / "quality_controls.py")))


@pytest.fixture(scope="module")
def items() -> list[Item]:
    rng = np.random.default_rng(0)
    made = []
    for i, rows in enumerate([49152, *[192, 576, 1536] * 12]):
        options = []
        for kind in (k for k in TYPES.values() if k.fits(576)):
            n_bytes = kind.row_bytes(576) * rows
            kld = rows * 4.0**-kind.bits_per_weight * math.exp(rng.normal(0, 1))
            options.append(Option(kind.name, n_bytes, n_bytes, float(n_bytes), kld))
        made.append(Item(f"tensor.{i:02}", tuple(options)))
    return made


def total(items: list[Item], types: dict[str, str]) -> int:
    assert types.keys() == {item.name for item in items}
    return sum(next(o.file_bytes for o in item.options if o.type == types[item.name]) for item in items)


def most(items: list[Item]) -> int:
    return sum(max(o.file_bytes for o in item.options) for item in items)


def least(items: list[Item]) -> int:
    return sum(min(o.file_bytes for o in item.options) for item in items)


def test_by_size_the_largest_tensor_is_lowered_first(controls: Any) -> None:
    def item(name: str, *sizes: int) -> Item:
        return Item(name, tuple(Option(f"t{size}", size, 0, 0.0, 1 / size) for size in sizes))

    items = [item("a", 100, 60, 30), item("b", 90, 50, 20), item("c", 10, 5)]
    for limit, expected in {
        200: ("t100", "t90", "t10"),
        199: ("t60", "t90", "t10"),
        159: ("t60", "t50", "t10"),
        119: ("t30", "t50", "t10"),
        89: ("t30", "t20", "t10"),
        59: ("t30", "t20", "t5"),
        55: ("t30", "t20", "t5"),
    }.items():
        assert tuple(controls.greedy_by_size(items, limit).values()) == expected, limit
    with pytest.raises(ValueError, match="55 bytes, more than 54"):
        controls.greedy_by_size(items, 54)


def test_by_size_takes_the_better_of_two_types_of_the_same_size(controls: Any) -> None:
    options = (Option("q4_0", 5, 5, 1.0, 2.0), Option("iq4_nl", 5, 5, 1.0, 1.0), Option("f16", 9, 9, 1.0, 0.0))
    assert controls.greedy_by_size([Item("a", options)], 8) == {"a": "iq4_nl"}


def test_by_size_stops_at_the_first_mix_that_fits(controls: Any, items: list[Item]) -> None:
    for share in np.linspace(0, 1, 9):
        limit = int(least(items) + share * (most(items) - least(items)))
        mix = controls.greedy_by_size(items, limit)
        assert total(items, mix) <= limit
        embedding = max(o.file_bytes for o in items[0].options)
        assert total(items, mix) > limit - embedding


def test_random_mixes_fill_the_window_and_differ(controls: Any, items: list[Item]) -> None:
    limit = int(least(items) + 0.3 * (most(items) - least(items)))
    mixes = controls.random_mixes(items, limit, 20, seed=7)
    assert len(mixes) == 20
    for mix in mixes:
        assert 0.995 * limit <= total(items, mix) <= limit
    for a, b in itertools.combinations(mixes, 2):
        assert sum(a[name] != b[name] for name in a) > len(items) / 3
    used = {kind for mix in mixes for kind in mix.values()}
    assert used == {o.type for o in items[0].options}, "every type has its chance"
    assert mixes == controls.random_mixes(items[::-1], limit, 20, seed=7)
    assert mixes != controls.random_mixes(items, limit, 20, seed=8)


def test_no_random_mix_where_there_is_none(controls: Any) -> None:
    items = [Item("a", (Option("x", 100, 0, 0.0, 0.0), Option("y", 300, 0, 0.0, 0.0)))]
    with pytest.raises(ValueError, match="199 to 200 bytes"):
        controls.random_mixes(items, 200, 1, seed=0)


def test_by_error_alone_sensitivities_do_not_count(controls: Any, items: list[Item]) -> None:
    limit = int(least(items) + 0.3 * (most(items) - least(items)))
    errors = {(i.name, o.type): 4.0 ** -TYPES[o.type].bits_per_weight for i in items for o in i.options}
    mix = controls.mse_only(items, errors, limit)
    assert total(items, mix) <= limit
    best = solve(items, Limits(file_bytes=limit), gap=0.0)

    def kld(types: Any) -> float:
        return math.fsum(o.kld for i in items for o in i.options if o.type == types[i.name])

    def error(types: Any) -> float:
        return math.fsum(errors[name, kind] for name, kind in types.items())

    assert kld(mix) > best.kld
    assert error(mix) < error(best.types)
    with pytest.raises(Infeasible):
        controls.mse_only(items, errors, least(items) - 1)
    with pytest.raises(KeyError):
        controls.mse_only(items, {}, limit)
