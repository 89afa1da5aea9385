"""How much of what a float model detects another one detects: mean average precision with the float model as truth."""

from __future__ import annotations

import dataclasses
from collections import defaultdict

import numpy as np
from numpy.typing import NDArray

__all__ = ["DetectionAgreement", "Detections", "detections_of", "overlaps"]

Floats = NDArray[np.float64]

_OVERLAPS = np.linspace(0.5, 0.95, 10)  # COCO's
_RECALLS = np.linspace(0.0, 1.0, 101)  # likewise
_MOST = 100  # detections of an image that count, likewise
_TRUE_SCORE = 0.5  # from which on the float model's detections are what there is to be found


@dataclasses.dataclass(frozen=True, eq=False)
class Detections:
    """What a model sees in one image, the surest first.

    Attributes:
        boxes: left, top, right, bottom; float64 of (detections, 4).
        scores: from 0 to 1, float64 of (detections,).
        classes: int64 of (detections,).
    """

    boxes: Floats
    scores: Floats
    classes: NDArray[np.int64]


def detections_of(logits: NDArray[np.generic], boxes: NDArray[np.generic], n_classes: int) -> Detections:
    """What the outputs of DETR and its relatives say of one image.

    Args:
        logits: (queries, classes) for independent classes, as of RT-DETR and Deformable DETR; one column more for
            classes that exclude each other and "nothing" as the last, as of DETR and YOLOS.
        boxes: (queries, 4): centre and size in shares of the image.
        n_classes: that the model knows.
    """
    numbers = logits.astype(np.float64)
    exclusive = numbers.shape[1] == n_classes + 1
    if exclusive:
        odds = np.exp(numbers - numbers.max(axis=1, keepdims=True))
        shares = (odds / odds.sum(axis=1, keepdims=True))[:, :-1]
        queries, classes = np.arange(len(shares)), shares.argmax(axis=1)
    else:
        shares = 0.5 * (1 + np.tanh(numbers / 2))  # the sigmoid, without overflow
        queries, classes = (place.reshape(-1) for place in np.indices(shares.shape))
    scores = shares[queries, classes]
    surest = np.argsort(-scores, kind="stable")[:_MOST]
    middle, half = boxes[:, :2].astype(np.float64), boxes[:, 2:].astype(np.float64) / 2
    corners = np.concatenate([middle - half, middle + half], axis=1)
    return Detections(corners[queries[surest]], scores[surest], classes[surest].astype(np.int64))


def overlaps(some: Floats, others: Floats) -> Floats:
    """Area of the intersection over area of the union of each pair of boxes, (some, others)."""
    least = np.maximum(some[:, None, :2], others[None, :, :2])
    most = np.minimum(some[:, None, 2:], others[None, :, 2:])
    shared = np.maximum(most - least, 0).prod(axis=2)
    areas = [np.maximum(boxes[:, 2:] - boxes[:, :2], 0).prod(axis=1) for boxes in (some, others)]
    united = areas[0][:, None] + areas[1][None, :] - shared
    ratio: Floats = np.divide(shared, united, out=np.zeros_like(shared), where=united > 0)
    return ratio


class DetectionAgreement:
    """Mean average precision over images, as COCO's ``AP`` (overlaps from 0.5 to 0.95, 101 recalls, 100 detections)."""

    def __init__(self) -> None:
        self._truths: dict[int, int] = defaultdict(int)
        self._scores: dict[int, list[Floats]] = defaultdict(list)
        self._hits: dict[int, list[NDArray[np.bool_]]] = defaultdict(list)
        self._overlap, self._found = 0.0, 0

    def update(self, reference: Detections, candidate: Detections) -> None:
        """Take in an image; of the reference, detections with a score of at least a half are the truth."""
        sure = reference.scores >= _TRUE_SCORE
        truths, kinds = reference.boxes[sure], reference.classes[sure]
        for kind in np.unique(np.concatenate([kinds, candidate.classes])):
            own, found = truths[kinds == kind], candidate.classes == kind
            self._truths[int(kind)] += len(own)
            self._scores[int(kind)].append(candidate.scores[found])
            hits, shared = _hits(own, candidate.boxes[found])
            self._hits[int(kind)].append(hits)
            self._overlap += float(shared.sum())
            self._found += int(hits[0].sum())

    def mean_average_precision(self) -> float | None:
        """Mean over classes that the reference found and over overlaps; None if it found nothing."""
        found = [
            _average_precision(np.concatenate(self._scores[kind]), np.concatenate(self._hits[kind], axis=1), truths)
            for kind, truths in self._truths.items()
            if truths
        ]
        return float(np.mean(found)) if found else None

    def mean_overlap(self) -> float | None:
        """Mean of intersection over union, over the boxes that find a truth at an overlap of a half; None if none does.

        How many find none is part of the average precision.
        """
        return self._overlap / self._found if self._found else None


def _hits(truths: Floats, boxes: Floats) -> tuple[NDArray[np.bool_], Floats]:
    """Which boxes find a truth of their own, the surest choosing first.

    Returns:
        Whether they do for each least overlap, (overlaps, boxes); and the overlaps themselves with the truths that are
        found at the first one, (boxes,), 0 for boxes that find none.
    """
    hits = np.zeros((len(_OVERLAPS), len(boxes)), np.bool_)
    shared = np.zeros(len(boxes))
    if not len(truths) or not len(boxes):
        return hits, shared
    ratios = overlaps(boxes, truths)
    for row, least in enumerate(_OVERLAPS):
        free = np.ones(len(truths), np.bool_)
        for box, near in enumerate(ratios):
            best = int(np.argmax(np.where(free, near, -1.0)))
            if free[best] and near[best] >= least:
                hits[row, box], free[best] = True, False
                shared[box] = near[best] if row == 0 else shared[box]
    return hits, shared


def _average_precision(scores: Floats, hits: NDArray[np.bool_], truths: int) -> float:
    """Mean over overlaps of the precision at 101 recalls, each the best at that recall or a higher one."""
    order = np.argsort(-scores, kind="stable")
    right = np.cumsum(hits[:, order], axis=1)
    precision = right / np.arange(1, len(order) + 1)
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    means = []
    for row, found in zip(precision, right / truths, strict=True):
        places = np.searchsorted(found, _RECALLS - 1e-12)
        means.append(np.append(row, 0.0)[places].mean())
    return float(np.mean(means))
