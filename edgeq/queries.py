"""Detectors answer with a set: which query of one answer is which of another one.

DETR and its relatives give class logits and a box for each of some hundred queries. Those that pick their queries out
of many candidates (RT-DETR, Deformable DETR in two stages) give them in the order of scores, which the last bit of two
nearly equal scores decides. Compared row by row, two answers that say the same then seem to be worlds apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["BOXES", "LOGITS", "in_order_of", "match_queries"]

LOGITS, BOXES = "logits", "pred_boxes"  # as transformers names them

Array = npt.NDArray[Any]


def in_order_of(expected: Mapping[str, Array], found: Mapping[str, Array]) -> dict[str, Array]:
    """The outputs of a detector with their queries in the order of another answer's nearest ones.

    Nothing changes for other models, and where shapes differ or an answer is not finite: that is for others to judge.

    Args:
        expected: ``logits`` of (batch, queries, classes), ``pred_boxes`` of (batch, queries, 4), and others.
        found: the same outputs; all that begin with (batch, queries) are put into order.
    """
    ordered = dict(found)
    if not _is_comparable(expected, found):
        return ordered
    heads = found[LOGITS].shape[:2]
    places = np.stack(
        [
            match_queries(
                (expected[LOGITS][image], expected[BOXES][image]), (found[LOGITS][image], found[BOXES][image])
            )
            for image in range(heads[0])
        ]
    )
    rows = np.arange(heads[0])[:, None]
    return {name: array[rows, places] if array.shape[:2] == heads else array for name, array in ordered.items()}


def _is_comparable(expected: Mapping[str, Array], found: Mapping[str, Array]) -> bool:
    for name in (LOGITS, BOXES):
        if name not in expected or name not in found:
            return False
        if expected[name].ndim != 3 or expected[name].shape != found[name].shape:
            return False
        # Logits of minus infinity are masks.
        sides = (expected[name], found[name])
        if any(np.isnan(side).any() or (name == BOXES and np.isinf(side).any()) for side in sides):
            return False
    one, other = expected[LOGITS].shape, expected[BOXES].shape
    return one[:2] == other[:2] and min(one[:2]) > 0


def match_queries(expected: tuple[Array, Array], found: tuple[Array, Array]) -> npt.NDArray[np.int64]:
    """For each query the one of another answer that is nearest to it, nearest pairs first, each taken once.

    Near is what DETR trains with, without its weights: the classes' scores by squared and the boxes by absolute
    difference. Two queries that are each other's nearest are a pair; the rest goes on without them.

    Args:
        expected: logits of (queries, classes) and boxes of (queries, 4).
        found: likewise. Logits without NaN, finite boxes.

    Returns:
        Places in ``found``, a permutation of (queries,).
    """
    cost = _costs(expected, found)
    order = np.full(len(cost), -1, np.int64)
    while True:
        left = np.flatnonzero(order < 0)
        if not len(left):
            return order
        nearest, back = cost[left].argmin(axis=1), cost.argmin(axis=0)
        mutual = back[nearest] == left  # of the pair that is nearest of all at least
        order[left[mutual]] = nearest[mutual]
        cost[left[mutual]] = np.inf
        cost[:, nearest[mutual]] = np.inf


def _costs(expected: tuple[Array, Array], found: tuple[Array, Array]) -> npt.NDArray[np.float64]:
    scores = [0.5 * (1 + np.tanh(logits.astype(np.float64) / 2)) for logits, _ in (expected, found)]
    squares = [(one**2).sum(axis=1) for one in scores]
    classes = np.maximum(squares[0][:, None] + squares[1][None, :] - 2 * scores[0] @ scores[1].T, 0)
    boxes = [array.astype(np.float64) for _, array in (expected, found)]
    apart: npt.NDArray[np.float64] = np.abs(boxes[0][:, None, :] - boxes[1][None, :, :]).sum(axis=2)
    total: npt.NDArray[np.float64] = classes + apart
    return total
