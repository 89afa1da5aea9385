"""Wishes that make no sense end in one line that names the field."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from edgeq.errors import ProfileError, UsageError
from edgeq.planner.tensors.job import Calibration, Gate, TensorJob
from edgeq.planner.tensors.refusals import refuse_contradictions, refuse_uncounted, refuse_unmeasured
from edgeq.tensor_types import TensorArtifact


def _job(**fields: Any) -> TensorJob:
    return TensorJob("model.onnx", "laptop-cpu", **fields)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"min_cosine": 0}, "Gate.min_cosine is 0, not above 0 and at most 1"),
        ({"min_cosine": "0.9"}, "Gate.min_cosine is '0.9'"),
        ({"min_cosine": math.nan}, "Gate.min_cosine is nan"),
        ({"min_top1": 95}, "Gate.min_top1 is 95, not from 0 to 1"),
        ({"min_detection_map": -0.1}, "Gate.min_detection_map is -0.1"),
        ({"min_coverage": 1.5}, "Gate.min_coverage is 1.5"),
        ({"max_slowdown": 0.0}, "Gate.max_slowdown is 0.0, not a number above 0"),
        ({"metric": lambda *_: 1.0, "max_metric_drop": math.inf}, "Gate.max_metric_drop is inf, not a finite number"),
        ({"max_metric_drop": 0.1}, "there is no metric"),
    ],
)
def test_gates(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError) as caught:
        refuse_contradictions(_job(gate=Gate(**fields)))
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"samples": 0}, "Calibration.samples is 0"),
        ({"judged": 2.5}, "Calibration.judged is 2.5"),
        ({"method": "best"}, "Calibration.method is 'best'"),
        ({"percentile": 0.5}, "Calibration.percentile is 0.5, not above 50 and at most 100"),
        ({"held_out": []}, "held_out has inputs to judge on, and there are none to calibrate with"),
    ],
)
def test_calibrations(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError) as caught:
        refuse_contradictions(_job(calibration=Calibration(**fields)))
    assert told in str(caught.value)


def test_what_makes_sense_is_let_through() -> None:
    refuse_contradictions(_job())
    numpys: Any = np.float32(0.9)
    refuse_contradictions(_job(gate=Gate(min_cosine=numpys)))
    gate = Gate(min_cosine=1.0, min_top1=0, min_coverage=0, max_slowdown=3, metric=lambda *_: 1.0, max_metric_drop=-0.1)
    refuse_contradictions(
        _job(gate=gate, calibration=Calibration([], held_out=[], samples=1, judged=1, percentile=100))
    )


def test_top1_of_what_has_no_classes() -> None:
    with pytest.raises(UsageError, match="answers of the task 'tensor' are not known to be classes"):
        refuse_unmeasured(Gate(min_top1=0.9), "tensor")
    refuse_unmeasured(Gate(min_top1=0.9), "image-classification")
    refuse_unmeasured(Gate(), "tensor")


def test_a_detector_whose_classes_nobody_counts() -> None:
    detector = TensorArtifact(architecture="Any", task="object-detection", opset=20, inputs=(), outputs=())
    with pytest.raises(UsageError, match="Nothing says how many classes the detector has") as caught:
        refuse_uncounted(detector, None)
    assert "id2label" in caught.value.remedy
    refuse_uncounted(detector, 4)


def test_devices_and_patterns() -> None:
    with pytest.raises(UsageError, match="made for jetson-orin-nano-8gb already"):
        refuse_contradictions(_job(also_for=("jetson-orin", "jetson-orin")))
    with pytest.raises(ProfileError, match="no-such-device"):
        refuse_contradictions(_job(also_for=("no-such-device",)))
    with pytest.raises(UsageError, match=r"'\(' is no regular expression"):
        refuse_contradictions(_job(keep_float=("head", "(")))
