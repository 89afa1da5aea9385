"""Correlations of inputs: the sums against numpy's, and which matrices share them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeq.converters.gguf import grams as module
from edgeq.converters.gguf.grams import Grams, correlation, correlation_bytes


@given(
    n_columns=st.integers(1, 40), passes=st.lists(st.integers(1, 30), min_size=1, max_size=4), seed=st.integers(0, 99)
)
def test_sums_over_passes_are_those_of_all_inputs_together(n_columns: int, passes: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    inputs = [rng.standard_normal((n, n_columns)).astype(np.float32) for n in passes]
    grams = Grams()
    for address, x in enumerate(inputs):
        grams.begin_pass()
        grams.add("a", address, x)
    whole = np.concatenate(inputs).astype(np.float64)
    gram = whole.T @ whole
    scale = np.sqrt(np.diag(gram))
    found = grams.correlations()["a"]
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, gram / np.outer(scale, scale), atol=2e-3)
    assert np.array_equal(found, found.T)
    assert (np.diag(found) == 1).all()


def test_matrices_of_one_input_share_one_array() -> None:
    rng = np.random.default_rng(0)
    one, other = (rng.standard_normal((9, 8)).astype(np.float32) for _ in range(2))
    grams = Grams()
    for swap in (0, 100):  # addresses mean nothing from one pass to the next
        grams.begin_pass()
        for name, address, x in (("q", 1, one), ("k", 1, one), ("up", 2, other), ("gate", 2, other)):
            grams.add(name, abs(address - swap), x)
    found = grams.correlations()
    assert list(found) == ["q", "k", "up", "gate"]
    assert found["q"] is found["k"]
    assert found["up"] is found["gate"]
    assert not np.array_equal(found["q"], found["up"])


def test_an_address_of_an_earlier_pass_is_another_input() -> None:
    x = np.eye(4, dtype=np.float32)
    grams = Grams()
    grams.begin_pass()
    grams.add("q", 7, x)
    grams.begin_pass()
    grams.add("late", 7, x + 1)
    found = grams.correlations()
    assert not np.array_equal(found["q"], found["late"])


def test_wide_inputs_have_no_correlations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_CORRELATED", 8)
    grams = Grams()
    grams.begin_pass()
    grams.add("wide", 1, np.ones((3, 9), np.float32))
    grams.add("narrow", 2, np.ones((3, 8), np.float32))
    assert list(grams.correlations()) == ["narrow"]
    assert correlation_bytes([8, 9, 8]) == 2 * 10 * 64


def test_columns_that_were_never_used_are_correlated_with_nothing() -> None:
    gram = np.diag([4.0, 0.0, 1.0]).astype(np.float32)
    assert np.array_equal(correlation(gram), np.eye(3, dtype=np.float16))
