"""Agreement of detectors, on cases whose figures are known, and against average precision by scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgeq.converters.onnx.detection import DetectionAgreement, Detections, detections_of, overlaps

Floats = NDArray[np.float64]


def detections(boxes: list[list[float]], scores: list[float], classes: list[int]) -> Detections:
    return Detections(np.array(boxes, float).reshape(-1, 4), np.array(scores, float), np.array(classes, np.int64))


def agreement(*pairs: tuple[Detections, Detections]) -> float | None:
    judge = DetectionAgreement()
    for pair in pairs:
        judge.update(*pair)
    return judge.mean_average_precision()


A, B, C = [0.0, 0.0, 0.4, 0.4], [0.5, 0.5, 0.9, 0.9], [0.0, 0.5, 0.4, 0.9]
TRUTH = detections([A, B, C], [0.9, 0.8, 0.7], [0, 0, 1])


def test_a_model_agrees_with_itself() -> None:
    assert agreement((TRUTH, TRUTH)) == 1.0


def test_what_is_missed_costs_recall() -> None:
    # Class 0: one of two found, precision 1 up to recall 0.5, that is at 51 of 101 recalls. Class 1: all.
    found = detections([A, C], [0.9, 0.7], [0, 1])
    assert agreement((TRUTH, found)) == pytest.approx((51 / 101 + 1) / 2)


def test_a_wrong_box_costs_precision_if_it_is_surer() -> None:
    surer = detections([[0.9, 0.0, 1.0, 0.1], A, B, C], [0.95, 0.9, 0.8, 0.7], [0, 0, 0, 1])
    less_sure = detections([A, B, C, [0.9, 0.0, 1.0, 0.1]], [0.9, 0.8, 0.7, 0.1], [0, 0, 1, 0])
    assert agreement((TRUTH, surer)) == pytest.approx((2 / 3 + 1) / 2)
    assert agreement((TRUTH, less_sure)) == 1.0


def test_a_shifted_box_counts_at_small_overlaps_only() -> None:
    # Shifted by a fourth of its width: 0.75 / 1.25 = 0.6, which is enough for 0.5, 0.55 and 0.6 of ten overlaps.
    shifted = detections([[0.1, 0.0, 0.5, 0.4]], [0.9], [0])
    found = agreement((detections([A], [0.9], [0]), shifted))
    assert found == pytest.approx(0.3, abs=0.1001)
    assert found is not None
    assert found in (pytest.approx(0.2), pytest.approx(0.3))


def test_overlap_is_that_of_what_is_found() -> None:
    judge = DetectionAgreement()
    assert judge.mean_overlap() is None
    near = [0.0, 0.0, 0.4, 0.3]  # three quarters of A
    judge.update(TRUTH, detections([near, B, [0.6, 0.0, 0.9, 0.2]], [0.9, 0.8, 0.7], [0, 0, 1]))
    assert judge.mean_overlap() == pytest.approx((0.75 + 1) / 2)  # the third is found nowhere
    judge.update(TRUTH, TRUTH)
    assert judge.mean_overlap() == pytest.approx((0.75 + 1 + 3) / 5)


def test_one_truth_is_found_once() -> None:
    twice = detections([A, A, B, C], [0.95, 0.9, 0.8, 0.7], [0, 0, 0, 1])
    value = agreement((TRUTH, twice))
    # A right, A wrong, B right: precision 1 up to recall 0.5, then 2/3.
    assert value == pytest.approx(((51 + 50 * 2 / 3) / 101 + 1) / 2)


def test_without_truths_there_is_no_figure() -> None:
    faint = detections([A], [0.3], [0])
    assert agreement((faint, TRUTH)) is None
    assert agreement((TRUTH, detections([], [], []))) == 0.0


@given(st.integers(0, 10_000))
def test_order_of_images_does_not_matter(seed: int) -> None:
    rng = np.random.default_rng(seed)

    def some() -> Detections:
        corner = rng.random((6, 2))
        boxes = np.concatenate([corner, corner + 0.2], axis=1)
        return Detections(boxes, np.sort(rng.random(6))[::-1].copy(), rng.integers(0, 3, 6))

    pairs = [(some(), some()) for _ in range(3)]
    assert agreement(*pairs) == agreement(*pairs[::-1])
    value = agreement(*pairs)
    assert value is None or 0 <= value <= 1


@pytest.mark.parametrize("seed", range(5))
def test_precision_is_near_scikit_learns(seed: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(seed)
    # Boxes in a row that do not touch; every truth is found, between boxes that are none.
    boxes = [[i / 200, 0.0, i / 200 + 0.004, 0.5] for i in range(200)]
    right = rng.random(200) < 0.5
    scores = np.round(rng.random(200), 6) * 0.5 + right * 0.2
    truth = detections(
        [b for b, r in zip(boxes, right, strict=True) if r], [0.9] * int(right.sum()), [0] * int(right.sum())
    )
    order = np.argsort(-scores)
    found = detections([boxes[i] for i in order], scores[order].tolist(), [0] * 200)
    value = agreement((truth, found))
    precision, recall, _ = metrics.precision_recall_curve(right, scores)
    # COCO's interpolation takes the best precision at that recall or a higher one.
    expected = np.mean([precision[recall >= r - 1e-12].max() for r in np.linspace(0, 1, 101)])
    assert value == pytest.approx(expected, abs=0.005)


def test_boxes_of_softmax_heads() -> None:
    logits = np.array([[4.0, 0, 0], [0, 0, 5.0], [0, 3.0, 1.0]], np.float32)
    boxes = np.array([[0.5, 0.5, 0.2, 0.4], [0.1, 0.1, 0.1, 0.1], [0.3, 0.3, 0.2, 0.2]], np.float32)
    found = detections_of(logits, boxes, 2)
    assert found.classes.tolist() == [0, 1, 0]  # the last one is surely nothing
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert found.scores == pytest.approx([shares[0, 0], shares[2, 1], shares[1, 0]])
    assert found.boxes[0] == pytest.approx([0.4, 0.3, 0.6, 0.7])


def test_boxes_of_sigmoid_heads() -> None:
    logits = np.array([[4.0, 2.0], [-900.0, 900.0]], np.float32)
    boxes = np.array([[0.5, 0.5, 0.2, 0.4], [0.1, 0.1, 0.1, 0.1]], np.float32)
    found = detections_of(logits, boxes, 2)
    assert found.classes.tolist() == [1, 0, 1, 0]
    assert found.scores == pytest.approx([1.0, 1 / (1 + np.exp(-4)), 1 / (1 + np.exp(-2)), 0.0])
    assert found.boxes[:, 0] == pytest.approx([0.05, 0.4, 0.4, 0.05])


@given(st.lists(st.floats(0, 1), min_size=8, max_size=8))
def test_overlaps_are_shares(numbers: list[float]) -> None:
    some, other = np.array(numbers).reshape(2, 1, 4)
    value = float(overlaps(some, other)[0, 0])
    assert 0 <= value <= 1
    assert value == pytest.approx(float(overlaps(other, some)[0, 0]))
    if some[0, 2] - some[0, 0] > 1e-3 and some[0, 3] - some[0, 1] > 1e-3:
        assert overlaps(some, some)[0, 0] == pytest.approx(1.0)
