"""Compensated rounding against least squares solved directly, block by block."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeq.converters.gguf.sensitivity.compensate import (
    Compensation,
    compensation,
    quantize_compensated,
    refine,
)
from edgeq.ggml_blocks import dequantize, quantize_rows
from edgeq.ggml_types import ggml_type

Floats = npt.NDArray[np.float32]
DAMPING = 0.1


def _rows(n_rows: int, n_columns: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal((n_rows, n_columns)).astype(np.float32)


def _curvature(n_columns: int, rank: int, seed: int, *, spread: float = 0.5, common: float = 0.0) -> Floats:
    """The second moments of correlated inputs with columns of different size; ``common`` is shared by all."""
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((rank, n_columns)) + common * rng.standard_normal((rank, 1))
    inputs *= rng.lognormal(0.0, spread, n_columns)
    return np.asarray(inputs.T @ inputs / rank, np.float32)


def _cost(errors: Floats, h: Floats) -> float:
    return float(np.einsum("ij,jk,ik->", errors.astype(np.float64), h.astype(np.float64), errors.astype(np.float64)))


def _errors(rows: Floats, kind: str, h: Floats | None) -> Floats:
    compensations = {} if h is None else compensation(h, (32, 256))
    made = quantize_compensated(rows, kind, None, compensations)
    return dequantize(made, kind, rows.shape[1]) - rows


def _reference(rows: Floats, kind: str, h: Floats, block: int) -> Floats:
    """After each block all later columns are chosen anew, as the minimum of the whole damped error by lstsq."""
    damped = h.astype(np.float64) / (np.trace(h.astype(np.float64)) / len(h)) + DAMPING * np.eye(len(h))
    root = np.linalg.cholesky(damped).T  # the cost of e is |root @ e|^2
    target, done = rows.astype(np.float64), np.zeros(rows.shape)
    wanted = target.copy()
    for start in range(0, rows.shape[1], block):
        end = start + block
        made = quantize_rows(np.ascontiguousarray(wanted[:, start:end], np.float32), kind)
        done[:, start:end] = dequantize(made, kind, block)
        known = (done[:, :end] - target[:, :end]) @ root[:, :end].T
        change = np.linalg.lstsq(root[:, end:], -known.T, rcond=None)[0].T
        wanted[:, end:] = target[:, end:] + change
    return (done - target).astype(np.float32)


@pytest.mark.parametrize(("kind", "block", "n_columns"), [("q4_0", 32, 160), ("q5_1", 32, 96), ("q4_k", 256, 768)])
def test_the_later_columns_are_the_least_squares_answer_to_the_earlier_errors(
    kind: str, block: int, n_columns: int
) -> None:
    rows, h = _rows(6, n_columns), _curvature(n_columns, 2 * n_columns, seed=3, common=1.0)
    found, expected = _errors(rows, kind, h), _reference(rows, kind, h, block)
    # Where a weight lies half-way between two steps, the last bit decides; from there on a row goes another way.
    same = np.isclose(found, expected, atol=1e-4).all(axis=1)
    assert same.mean() >= 0.5
    assert _cost(found, h) == pytest.approx(_cost(expected, h), rel=0.05)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    rank=st.integers(1, 200),
    spread=st.floats(0.0, 3.0),
    common=st.floats(0.0, 5.0),
    kind=st.sampled_from(["q4_0", "q5_1", "iq4_nl", "q8_0"]),
)
def test_it_is_never_much_worse_than_plain_rounding(
    seed: int, rank: int, spread: float, common: float, kind: str
) -> None:
    rows, h = _rows(400, 96, seed), _curvature(96, rank, seed, spread=spread, common=common)
    plain = _errors(rows, kind, None)
    h = h + np.float32(DAMPING * np.trace(h) / len(h)) * np.eye(len(h), dtype=np.float32)  # what is really minimised
    assert _cost(_errors(rows, kind, h), h) <= 1.25 * _cost(plain, h)


@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q5_0", "iq4_nl", "q8_0"])
def test_strong_correlations_cancel_most_of_the_error(kind: str) -> None:
    rows, h = _rows(64, 256, 1), _curvature(256, 1024, 1, common=3.0)
    assert _cost(_errors(rows, kind, h), h) < 0.5 * _cost(_errors(rows, kind, None), h)


def test_without_correlations_nothing_changes() -> None:
    rows = _rows(8, 256)
    for h in (np.eye(256, dtype=np.float32), np.diag(np.linspace(0.1, 9, 256, dtype=np.float32))):
        compensations = compensation(h, (32, 256))
        assert compensations.keys() == {32, 256}
        assert all(not spread.any() for spread in compensations[32].spread)
        for kind in ("q4_0", "q4_k"):
            assert np.array_equal(quantize_compensated(rows, kind, None, compensations), quantize_rows(rows, kind))


def test_types_of_other_blocks_and_floats_are_rounded_as_usual() -> None:
    rows = _rows(4, 256)
    only_32 = compensation(_curvature(256, 512, 0, common=2.0), (32,))
    for kind in ("q4_k", "f16", "bf16"):
        assert np.array_equal(quantize_compensated(rows, kind, None, only_32), quantize_rows(rows, kind))
    assert not np.array_equal(quantize_compensated(rows, "q4_0", None, only_32), quantize_rows(rows, "q4_0"))


def test_only_blocks_that_divide_the_columns_have_a_spread() -> None:
    found = compensation(_curvature(96, 200, 0), (32, 64, 96, 256))
    assert found.keys() == {32, 96}
    assert [matrix.shape for matrix in found[32].spread] == [(32, 64), (32, 32)]
    assert found[96].spread == []
    assert all(matrix.dtype == np.float32 for matrix in found[32].spread)


@pytest.mark.parametrize("kind", ["q4_0", "q4_k"])
def test_rows_are_independent(kind: str) -> None:
    rows, h = _rows(48, 512), _curvature(512, 700, 2, common=1.0)
    compensations = compensation(h, (32, 256))
    whole = quantize_compensated(rows, kind, None, compensations)
    before = rows.copy()
    parts = [quantize_compensated(rows[a : a + 16], kind, None, compensations) for a in range(0, 48, 16)]
    assert np.array_equal(rows, before)
    # Products of matrices of other heights may be added up in another order.
    a, b = (dequantize(blocks, kind, 512) for blocks in (whole, np.concatenate(parts)))
    assert np.isclose(a, b, atol=1e-5).all(axis=1).mean() > 0.9


def test_importance_is_cut_as_the_blocks_are() -> None:
    """ggml weighs importance with the mean square of what it is given: here of a block, otherwise of a whole row."""
    rows, weights = _rows(32, 96), np.linspace(0.01, 10.0, 96, dtype=np.float32)
    nothing = Compensation(
        32, [np.zeros((32, 64), np.float32), np.zeros((32, 32), np.float32)], np.eye(96, dtype=np.float32)
    )
    found = quantize_compensated(rows, "q4_0", weights, {32: nothing})
    for start in range(0, 96, 32):
        block = quantize_rows(np.ascontiguousarray(rows[:, start : start + 32]), "q4_0", weights[start : start + 32])
        assert np.array_equal(found[:, start // 32 * 18 :][:, :18], block)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_a_curvature_that_says_nothing_gives_no_compensation(value: float) -> None:
    assert compensation(np.full((64, 64), value, np.float32), (32,)) == {}


def test_columns_that_were_never_used_are_rounded_like_others() -> None:
    h = _curvature(96, 200, 0, common=1.0)
    h[10:20], h[:, 10:20] = 0.0, 0.0
    errors = _errors(_rows(8, 96), "q4_0", h)
    assert np.isfinite(errors).all()
    assert np.abs(errors[:, 10:20]).max() < 2 * np.abs(errors).max()


def test_correlations_in_half_precision_may_be_indefinite() -> None:
    """A few columns carry nearly everything and almost agree, as massive activations do; f16 breaks what they share."""
    n_columns, outliers = 1024, 3
    correlation = np.eye(n_columns, dtype=np.float16)
    correlation[:outliers, :outliers] = np.array([[1, 1, 0.9985], [1, 1, 1], [0.9985, 1, 1]])
    columns = np.full(n_columns, 1e-3, np.float32)
    columns[:outliers] = 1e4
    scale = np.sqrt(columns)
    h = correlation.astype(np.float32) * scale * scale[:, None]
    assert np.linalg.eigvalsh(h.astype(np.float64) / np.diag(h).mean())[0] < -DAMPING
    rows = _rows(2, n_columns)
    compensations = compensation(h, (32,))
    assert compensations
    errors = dequantize(quantize_compensated(rows, "q4_0", None, compensations), "q4_0", n_columns) - rows
    plain = dequantize(quantize_rows(rows, "q4_0"), "q4_0", n_columns) - rows
    assert np.square(errors).mean() < 2 * np.square(plain).mean()


@pytest.mark.parametrize("kind", ["q4_0", "q5_1", "iq4_nl", "q4_k", "iq3_s"])
@pytest.mark.parametrize("rank", [8, 600])
def test_going_through_a_row_again_lowers_its_error(kind: str, rank: int) -> None:
    h = _curvature(512, rank, 3, common=1.0)
    rows = _rows(40, 512)
    compensations = compensation(h, (32, 256))
    importance = np.ascontiguousarray(np.diag(h))
    first = quantize_compensated(rows, kind, importance, compensations)
    again = refine(first, rows, kind, importance, compensations)
    assert again.shape == first.shape
    damped = compensations[ggml_type(kind).block_weights].curvature
    costs = [np.einsum("ij,ij->i", e @ damped, e) for e in (dequantize(b, kind, 512) - rows for b in (first, again))]
    assert (costs[1] <= costs[0] * (1 + 1e-4)).all(), "no row gets worse"
    assert costs[1].sum() < 0.99 * costs[0].sum()
    # Rows are independent, and what is right already stays.
    one = refine(first[7:9], rows[7:9], kind, importance, compensations)
    assert np.mean(one == again[7:9]) > 0.98
    exact = dequantize(again, kind, 512)
    settled = quantize_compensated(exact, "q8_0", importance, {})
    assert np.array_equal(refine(settled, exact, "q8_0", importance, {}), settled)


def test_floats_and_other_blocks_are_not_refined() -> None:
    compensations = compensation(_curvature(64, 80, 1), (32,))
    rows = _rows(3, 64)
    halves = quantize_rows(rows, "f16")
    assert refine(halves, rows, "f16", None, compensations) is halves
