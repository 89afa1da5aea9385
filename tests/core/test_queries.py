"""Queries of detectors in any order."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeq.queries import in_order_of, match_queries

Array = npt.NDArray[Any]


def _answer(batch: int, queries: int, seed: int = 0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {
        "logits": rng.standard_normal((batch, queries, 6)).astype(np.float32),
        "pred_boxes": rng.random((batch, queries, 4), np.float32),
        "scores": rng.standard_normal((batch, queries)).astype(np.float32),
        "features": rng.standard_normal((batch, 50, 5)).astype(np.float32),
    }


@given(st.integers(1, 3), st.integers(1, 40), st.integers(0, 1000))
def test_a_permutation_is_undone(batch: int, queries: int, seed: int) -> None:
    expected = _answer(batch, queries, seed)
    rng = np.random.default_rng(seed)
    shuffled = {name: array.copy() for name, array in expected.items()}
    for image in range(batch):
        order = rng.permutation(queries)
        for name in ("logits", "pred_boxes", "scores"):
            shuffled[name][image] = expected[name][image][order]
    found = in_order_of(expected, shuffled)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


def test_rounding_does_not_mislead() -> None:
    expected = _answer(1, 300)
    noise = np.random.default_rng(1)
    order = noise.permutation(300)
    near = {
        name: expected[name][:, order] + noise.normal(0, 1e-3, expected[name].shape).astype(np.float32)
        for name in ("logits", "pred_boxes")
    }
    places = match_queries(
        (expected["logits"][0], expected["pred_boxes"][0]), (near["logits"][0], near["pred_boxes"][0])
    )
    np.testing.assert_array_equal(order[places], np.arange(300))


def test_pairs_are_taken_the_nearest_first() -> None:
    """As the plain rule does it, which looks at all pairs in the order of their distance."""
    one, other = _answer(1, 25, 2), _answer(1, 25, 3)
    logits, boxes = [[side[name][0].astype(np.float64) for side in (one, other)] for name in ("logits", "pred_boxes")]
    sure = [1 / (1 + np.exp(-array)) for array in logits]
    costs = {
        (i, j): float(((sure[0][i] - sure[1][j]) ** 2).sum() + np.abs(boxes[0][i] - boxes[1][j]).sum())
        for i, j in itertools.product(range(25), repeat=2)
    }
    wanted: dict[int, int] = {}
    for i, j in sorted(costs, key=lambda pair: costs[pair]):
        if i not in wanted and j not in wanted.values():
            wanted[i] = j
    found = match_queries((logits[0], boxes[0]), (logits[1], boxes[1]))
    assert found.tolist() == [wanted[i] for i in range(25)]


@pytest.mark.parametrize("fault", ["nan", "infinite", "shape", "other", "none"])
def test_what_cannot_be_matched_is_left_as_it_is(fault: str) -> None:
    expected = _answer(2, 5)
    found = {name: array[:, ::-1].copy() for name, array in expected.items()}
    if fault == "nan":
        found["logits"][0, 0, 0] = np.nan
    elif fault == "infinite":
        expected["pred_boxes"][0, 0, 0] = np.inf
    elif fault == "shape":
        found["pred_boxes"] = found["pred_boxes"][:, :4]
    elif fault == "other":
        del found["pred_boxes"]
    else:
        expected, found = _answer(2, 0), _answer(2, 0)
    result = in_order_of(expected, found)
    assert result.keys() == found.keys()
    for name, array in found.items():
        np.testing.assert_array_equal(result[name], array)


def test_infinite_logits_are_scores_of_nought_and_one() -> None:
    logits = np.array([[-np.inf, np.inf], [np.inf, -np.inf]])
    boxes = np.full((2, 4), 0.5)
    assert match_queries((logits, boxes), (logits[::-1], boxes)).tolist() == [1, 0]


def test_logits_of_three_axes_without_boxes_are_no_detector() -> None:
    """Speech recognition and the classification of tokens give such ones."""
    logits = np.zeros((1, 4, 8), np.float32)
    assert in_order_of({"logits": logits}, {"logits": logits})["logits"] is logits
