"""The rule between points of attention: which points it takes, and what it makes of them."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeq.errors import UsageError
from edgeq.probe_points import AttentionPoint
from edgeq.profiles.kernels.attention_costs import AttentionShape, attention_kernel, attention_ns
from edgeq.types import from_json, to_json

SMALL = AttentionShape(64, 9, 3)
WIDE = AttentionShape(128, 32, 8)


def point(
    ns: float,
    n_cached: int,
    *,
    n_tokens: int = 1,
    shape: AttentionShape = SMALL,
    kv_type: str = "q8_0",
    threads: int = 1,
) -> AttentionPoint:
    return AttentionPoint(
        kv_type=kv_type,
        head_dim=shape.head_dim,
        n_heads=shape.n_heads,
        n_kv_heads=shape.n_kv_heads,
        n_tokens=n_tokens,
        n_cached=n_cached,
        threads=threads,
        ns=ns,
        spread=0.01,
        n=3,
    )


def ns(
    points: list[AttentionPoint],
    shape: AttentionShape = SMALL,
    *,
    kv_type: str = "q8_0",
    n_tokens: int = 1,
    n_cached: int = 999,
    threads: int = 1,
) -> float:
    return attention_ns(points, kv_type, shape, n_tokens=n_tokens, n_cached=n_cached, threads=threads)


@given(
    times=st.lists(st.floats(1.0, 1e9), min_size=1, max_size=5),
    batch=st.sampled_from([(1, "q8_0"), (1, "f16"), (8, "f16"), (8, "q4_0"), (64, "f16"), (100, "f16")]),
    shape=st.sampled_from([SMALL, WIDE]),
    threads=st.integers(1, 12),
)
def test_measured_points_are_given_back(
    times: list[float], batch: tuple[int, str], shape: AttentionShape, threads: int
) -> None:
    n_tokens, kv_type = batch
    points = [
        point(ns, 1000 * index, n_tokens=n_tokens, kv_type=kv_type, shape=shape, threads=threads)
        for index, ns in enumerate(times)
    ]
    for index, expected in enumerate(times):
        found = ns(points, shape, n_tokens=n_tokens, n_cached=1000 * index, threads=threads, kv_type=kv_type)
        assert found == pytest.approx(expected)


def test_between_two_points_and_beyond_them_the_time_is_a_straight_line() -> None:
    points = [point(1000 + 10 * 100, 99), point(1000 + 10 * 1000, 999)]  # a fixed part, and 10 for each visible cell
    for n_cached in (50, 500, 5000):
        assert ns(points, n_cached=n_cached) == pytest.approx(1000 + 10 * (n_cached + 1))


def test_noise_makes_no_long_cache_cheap() -> None:
    assert ns([point(500, 99), point(400, 999)], n_cached=9999) == pytest.approx(400)
    steep = [point(10, 99), point(1000, 999)]  # the line through both is below zero for an empty cache
    assert ns(steep, n_cached=9) == pytest.approx(1)


def test_one_point_is_a_line_through_nothing() -> None:
    assert ns([point(500, 99)], n_cached=199) == pytest.approx(1000)


@pytest.mark.parametrize(
    ("kv_type", "n_tokens", "kernel"),
    [
        ("f16", 1, "token"),
        ("q8_0", 1, "token"),
        ("f16", 63, "rows"),
        ("f16", 64, "tiles"),
        ("q8_0", 64, "rows"),
        ("bf16", 512, "rows"),
    ],
)
def test_kernels(kv_type: str, n_tokens: int, kernel: str) -> None:
    assert attention_kernel(kv_type, n_tokens) == kernel


def test_each_kernel_has_points_of_its_own() -> None:
    points = [point(5, 1000, n_tokens=n, kv_type="f16") for n in (1, 8, 64)]
    one, few, many = (ns(points, n_tokens=n, n_cached=1000, kv_type="f16") / n for n in (1, 63, 128))
    assert one == pytest.approx(5)
    assert few == pytest.approx(5 / 8, rel=0.05)
    assert many == pytest.approx(5 / 64, rel=0.05)
    with pytest.raises(UsageError, match="not measured for 8 tokens"):
        ns([points[0]], n_tokens=8, kv_type="f16")


def test_tiles_are_whole() -> None:
    points = [point(1000, 1024, n_tokens=64, kv_type="f16")]
    for n_tokens in (65, 128):
        # Two tiles of rows, the second of which sees one tile of cells more.
        assert ns(points, n_tokens=n_tokens, n_cached=1024, kv_type="f16") == pytest.approx(1000 * (17 + 18) / 17)


def test_another_shape_costs_by_its_heads_and_their_size() -> None:
    points = [point(900, 999), point(3200, 999, shape=AttentionShape(64, 32, 8))]
    assert ns(points, AttentionShape(64, 15, 5)) == pytest.approx(1500)
    assert ns(points, AttentionShape(80, 32, 8)) == pytest.approx(3200 * 80 / 64)


def test_rows_that_threads_cannot_share_evenly_wait_for_the_busiest() -> None:
    points = [point(500, 999, threads=2)]  # five of nine heads on one thread
    assert ns(points, AttentionShape(64, 12, 4), threads=2) == pytest.approx(600)
    # Cells of floats are shared out instead, however many heads there are.
    floats = [point(450, 999, threads=2, kv_type="f16")]
    assert ns(floats, AttentionShape(64, 12, 4), threads=2, kv_type="f16") == pytest.approx(600)


def test_what_was_not_measured_is_refused() -> None:
    points = [point(500, 999)]
    for kv_type, threads, n_tokens in (("q4_0", 1, 1), ("q8_0", 2, 1), ("q8_0", 1, 9)):
        with pytest.raises(UsageError, match="was not measured"):
            ns(points, kv_type=kv_type, threads=threads, n_tokens=n_tokens)
    with pytest.raises(UsageError, match="not a tensor type"):
        ns(points, kv_type="q9")


def test_points_are_records() -> None:
    points = (point(500, 999), point(600, 0, n_tokens=8))
    assert from_json(to_json(points), tuple[AttentionPoint, ...]) == points
    for change in ({"ns": 0.0}, {"n_cached": -1}, {"threads": 0}, {"colour": "red"}):
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert(msgspec.to_builtins(points[0]) | change, AttentionPoint)
