"""What the gate asks of a candidate."""

from __future__ import annotations

import math

import msgspec
import pytest

from edgeq.planner.tensors.accuracy import SENTENCE, missed, worst_cosine
from edgeq.planner.tensors.job import Gate
from edgeq.tensor_types import OutputQuality, TensorQuality


def _quality(*cosines: float, **figures: float) -> TensorQuality:
    outputs = tuple(
        OutputQuality(name=f"out{index}", mean_cosine=cosine, min_cosine=cosine, sqnr_db=20.0, max_error=1.0)
        for index, cosine in enumerate(cosines)
    )
    plain = TensorQuality(inputs=4, outputs=outputs, source="tests", sha256="0" * 64)
    return msgspec.structs.replace(plain, **figures)


def _missed(quality: TensorQuality, gate: Gate) -> str | None:
    found = missed(quality, gate)
    return None if found is None else found.reason


def test_the_worst_output_counts() -> None:
    assert _missed(_quality(0.999, 0.996), Gate()) is None
    assert _missed(_quality(0.999, 0.99), Gate()) == "cosine 0.9900 of out1, at least 0.995 is asked for"
    assert _missed(_quality(math.nan), Gate()) is not None


def test_classes_count_if_they_are_asked_for() -> None:
    assert _missed(_quality(0.999, top1=0.8), Gate()) is None
    assert _missed(_quality(0.999, top1=0.8), Gate(min_top1=0.9)) == (
        "top-1 agreement 80.0%, at least 90.0% is asked for"
    )


def test_classes_that_were_not_measured_fall_short() -> None:
    assert (
        _missed(_quality(0.999), Gate(min_top1=0.9)) == "top-1 agreement was not measured, at least 90.0% is asked for"
    )


@pytest.mark.parametrize("cosine", [0.5, 0.999])
def test_detectors_are_judged_by_what_they_detect(cosine: float) -> None:
    assert _missed(_quality(cosine, detection_map=0.85), Gate()) is None
    told = _missed(_quality(cosine, detection_map=0.7), Gate())
    assert told is not None
    assert told.startswith("mean average precision 70.0% against the float model's detections, at least 80.0%")


def test_text_encoders_are_judged_by_the_vectors_of_texts() -> None:
    tokens, texts = _quality(0.9, 0.999).outputs
    quality = msgspec.structs.replace(_quality(), outputs=(tokens, msgspec.structs.replace(texts, name=SENTENCE)))
    assert worst_cosine(quality) == 0.999
    assert _missed(quality, Gate()) is None
    assert _missed(quality, Gate(min_cosine=0.9995)) == (
        "cosine 0.9990 of sentence embedding, at least 0.9995 is asked for"
    )


def test_a_cosine_has_the_digits_that_show_it_is_below() -> None:
    assert _missed(_quality(0.9999996), Gate(min_cosine=1.0)) == "cosine 0.999999600 of out0, at least 1 is asked for"
    assert _missed(_quality(0.99996), Gate(min_cosine=1.0)) == "cosine 0.999960 of out0, at least 1 is asked for"


def test_the_option_that_asks_for_less_is_known() -> None:
    found = [
        missed(_quality(0.9), Gate()),
        missed(_quality(0.9, detection_map=0.7), Gate()),
        missed(_quality(0.999, top1=0.8), Gate(min_top1=0.9)),
    ]
    assert [miss.option for miss in found if miss is not None] == ["--min-cosine", "--min-detection-map", "--min-top1"]
