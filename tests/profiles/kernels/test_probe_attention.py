"""Attention is measured on this machine: what every processor shows, as ratios."""

from __future__ import annotations

import pytest

from edgeq.errors import UsageError
from edgeq.probe_points import AttentionPoint
from edgeq.profiles.kernels import probe_attention
from edgeq.profiles.kernels.attention_costs import AttentionShape
from edgeq.profiles.kernels.probe_attention import measure_attention

SHAPE = AttentionShape(64, 4, 2)


@pytest.fixture(scope="module")
def points() -> dict[tuple[str, int, int], AttentionPoint]:
    found = measure_attention(
        [SHAPE],
        threads=1,
        kv_types=("f16", "q8_0"),
        batches=((1, 15), (1, 511), (1, 4095), (8, 1024), (64, 1024)),
        budget_s=1.5,
    )
    return {(p.kv_type, p.n_tokens, p.n_cached): p for p in found}


def test_every_point_is_there_but_those_that_say_nothing_new(
    points: dict[tuple[str, int, int], AttentionPoint],
) -> None:
    batches = [(1, 15), (1, 511), (1, 4095), (8, 1024), (64, 1024)]
    assert set(points) == {("f16", *b) for b in batches} | {("q8_0", *b) for b in batches[:-1]}
    for p in points.values():
        assert (p.head_dim, p.n_heads, p.n_kv_heads, p.threads) == (64, 4, 2, 1)
        assert p.n >= 3


def test_time_grows_with_the_cells(points: dict[tuple[str, int, int], AttentionPoint]) -> None:
    for kv_type in ("f16", "q8_0"):
        few, some, many = (points[kv_type, 1, n].ns for n in (15, 511, 4095))
        assert few < some < many
        assert 2 < many / some < 32  # eight times the cells, on a machine that others use too


def test_tiles_make_many_tokens_cheaper(points: dict[tuple[str, int, int], AttentionPoint]) -> None:
    assert points["f16", 64, 1024].ns < 0.8 * 8 * points["f16", 8, 1024].ns


def test_progress_goes_from_none_to_all() -> None:
    told: list[tuple[int, int]] = []
    shapes = [SHAPE, AttentionShape(80, 2, 2)]  # q8_0 has no heads of 80
    found = measure_attention(
        shapes,
        threads=2,
        kv_types=("f16", "q8_0"),
        batches=((1, 0), (3, 0)),
        progress=lambda done, total, _: told.append((done, total)),
        budget_s=0,
    )
    assert {(p.kv_type, p.head_dim) for p in found} == {("f16", 64), ("q8_0", 64), ("f16", 80)}
    assert told[0] == (0, 6)
    assert told[-1] == (6, 6)
    assert told == sorted(told)
    assert {p.n for p in found} == {3}


def test_little_memory_means_more_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_attention, "free_bytes", lambda: 1)
    found = measure_attention([SHAPE], threads=1, kv_types=("f16", "q4_0"), batches=((1, 0),), budget_s=0)
    assert [p.kv_type for p in found] == ["f16", "q4_0"]


def test_nonsense_is_refused() -> None:
    with pytest.raises(UsageError, match="not a tensor type"):
        measure_attention([SHAPE], threads=1, kv_types=("q9",))
    with pytest.raises(UsageError, match="threads"):
        measure_attention([SHAPE], threads=0)
