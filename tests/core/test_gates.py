from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeq.gates import check_gates
from edgeq.quality import Interval, Quality
from edgeq.types import from_json, to_json
from edgeq.verdicts import overall_result

_SOME = Interval(low=0.04, high=0.06)


def _quality(**changes: Any) -> Quality:
    values: dict[str, Any] = {
        "tokens": 10_000,
        "chunks": 20,
        "chunk_tokens": 512,
        "mean_kld": 0.05,
        "mean_kld_interval": _SOME,
        "p99_kld": 0.5,
        "p999_kld": 1.0,
        "max_kld": 3.0,
        "top1": 0.9,
        "top1_interval": Interval(low=0.88, high=0.92),
        "ppl_ratio": 1.02,
        "ppl_ratio_interval": Interval(low=1.0, high=1.04),
        "noise_floor_kld": 1e-6,
        "confidence": 0.95,
        "reference": "f16",
        "text": "prose",
        "text_sha256": "a" * 64,
        "overlap": None,
    }
    return Quality(**{**values, **changes})


@pytest.mark.parametrize(
    ("limit", "result"),
    [(0.061, "PASS"), (0.06, "PASS"), (0.055, "INSUFFICIENT"), (0.04, "INSUFFICIENT"), (0.039, "FAIL")],
)
def test_kl_is_judged_by_its_bound(limit: float, result: str) -> None:
    (verdict,) = check_gates(_quality(), max_kld=limit, predicted_kld=0.045)
    assert (verdict.field, verdict.result, verdict.limit, verdict.measured) == ("mean_kld", result, limit, 0.05)
    assert verdict.bound == (0.04 if result == "FAIL" else 0.06)
    assert verdict.predicted == 0.045
    assert (verdict.missing_samples is not None) is (result == "INSUFFICIENT")


@pytest.mark.parametrize(("limit", "result"), [(0.88, "PASS"), (0.885, "INSUFFICIENT"), (0.93, "FAIL")])
def test_top1_is_a_lower_limit(limit: float, result: str) -> None:
    (verdict,) = check_gates(_quality(), min_top1=limit)
    assert (verdict.field, verdict.result, verdict.measured) == ("top1", result, 0.9)
    assert verdict.bound == (0.92 if result == "FAIL" else 0.88)


def test_what_is_missing_is_told() -> None:
    # Half the width has to become a half of 0.01, which takes four times the text.
    (verdict,) = check_gates(_quality(), max_kld=0.055)
    assert verdict.missing_samples == pytest.approx(30_000, abs=1)
    assert "about 30" in verdict.reason
    (verdict,) = check_gates(_quality(), max_kld=0.05)
    assert verdict.missing_samples is None
    assert "no amount of text" in verdict.reason


def test_no_interval_is_no_verdict() -> None:
    nothing = Interval(low=None, high=None)
    verdicts = check_gates(_quality(chunks=1, mean_kld_interval=nothing), max_kld=10, min_top1=0.5)
    assert [verdict.result for verdict in verdicts] == ["INSUFFICIENT", "PASS"]
    assert overall_result(verdicts) == "INSUFFICIENT"
    assert "1 chunk" in verdicts[0].reason


def test_no_limit_no_verdict() -> None:
    assert check_gates(_quality()) == ()


@given(st.floats(0, 1), st.floats(0, 0.2), st.floats(0, 0.2), st.floats(0, 1))
def test_pass_and_fail_exclude_each_other(mean: float, below: float, above: float, limit: float) -> None:
    quality = _quality(mean_kld=mean, mean_kld_interval=Interval(low=mean - below, high=mean + above))
    (verdict,) = check_gates(quality, max_kld=limit)
    assert (verdict.result == "PASS") == (mean + above <= limit)
    assert (verdict.result == "FAIL") == (mean - below > limit)


def test_json_is_an_exact_inverse() -> None:
    assert from_json(to_json(_quality()), Quality) == _quality()
    with pytest.raises(Exception, match="top1"):
        from_json(to_json(_quality()).replace(b'"top1": 0.9', b'"top1": 1.9'), Quality)
