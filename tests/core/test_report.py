"""Verdicts and reports: every transition between PASS, FAIL and INSUFFICIENT, and the file they are kept in."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeq import report as reports
from edgeq.errors import BundleError
from edgeq.tensor_types import TensorPrediction
from edgeq.types import BUDGET_LINES, Budget, Prediction, from_json, to_json
from edgeq.verdicts import Verdict, judge, metric, overall_result, predictions, tensor_floors, tensor_predictions

LINES = {line.field: line for line in BUDGET_LINES}
PREDICTED = Prediction(
    file_bytes=90, weights_bytes=90, kv_cache_bytes=5, compute_bytes=3, runtime_bytes=2, peak_memory_bytes=100,
    itl_ms=10, tokens_per_s=100, ttft_ms=300, prompt_tokens=128,
)  # fmt: skip

TENSOR_PREDICTED = TensorPrediction(
    file_bytes=1, weights_bytes=1, activation_bytes=1, runtime_bytes=1, peak_memory_bytes=4, latency_ms=2
)


def line(field: str, limit: float, samples: list[float], **options: object) -> Verdict:
    """The verdict on one constrained line."""
    measured = {field: metric(LINES[field].unit, "a test", samples)} if samples else {}
    budget = msgspec.convert({field: limit}, Budget)
    verdicts = judge(budget, measured, **options)  # type: ignore[arg-type]
    return next(verdict for verdict in verdicts if verdict.field == field)


@pytest.mark.parametrize(
    ("field", "limit", "samples", "result", "missing"),
    [
        # p95 at 95 %: 59 samples without a miss, 93 with one.
        ("ttft_ms", 100, [90.0] * 59, "PASS", None),
        ("ttft_ms", 100, [90.0] * 58, "INSUFFICIENT", 1),
        ("ttft_ms", 100, [90.0] * 58 + [101.0], "INSUFFICIENT", 34),
        ("ttft_ms", 100, [90.0] * 92 + [101.0], "PASS", None),
        ("ttft_ms", 100, [101.0] * 2 + [90.0], "FAIL", None),
        ("ttft_ms", 100, [101.0], "FAIL", None),  # one sample above a p95 is below it with 95 % confidence
        ("itl_ms", 10, [9.0] * 299, "PASS", None),
        ("itl_ms", 10, [9.0] * 298, "INSUFFICIENT", 1),
        ("itl_ms", 10, [9.0] * 290 + [11.0] * 9, "FAIL", None),
        ("load_ms", 10, [9.0] * 5, "PASS", None),
        ("load_ms", 10, [9.0] * 4, "INSUFFICIENT", 1),
        ("load_ms", 10, [11.0] * 5, "FAIL", None),
        ("load_ms", 10, [9.0] * 3 + [11.0] * 2, "INSUFFICIENT", 6),
        ("tokens_per_s", 20, [21.0] * 5, "PASS", None),
        ("tokens_per_s", 20, [20.0] * 5, "PASS", None),
        ("tokens_per_s", 20, [21.0] * 4, "INSUFFICIENT", 1),
        ("tokens_per_s", 20, [19.0] * 5, "FAIL", None),
        ("peak_memory_bytes", 1000, [1000.0], "PASS", None),
        ("peak_memory_bytes", 1000, [1001.0], "FAIL", None),
        ("peak_memory_bytes", 1000, [], "INSUFFICIENT", 1),
        ("ttft_ms", 100, [], "INSUFFICIENT", 59),
        ("power_w", 10, [], "INSUFFICIENT", 1),
    ],
)
def test_verdict_of_a_constrained_line(
    field: str, limit: float, samples: list[float], result: str, missing: int | None
) -> None:
    verdict = line(field, limit, samples)
    assert (verdict.result, verdict.missing_samples, verdict.n_samples) == (result, missing, len(samples))
    assert verdict.reason


def test_verdict_names_what_is_missing() -> None:
    assert (
        line("itl_ms", 10, [9.0] * 100).reason
        == "only 100 samples; 199 more without a miss would pass with 95 % confidence"
    )
    assert line("ttft_ms", 100, [90.0] * 58 + [101.0]).reason.startswith("1 of 59 samples miss the limit; 34 more")
    assert line("power_w", 10, [], unmeasured={"power_w": "no sensor"}).reason == "no sensor"
    assert line("peak_memory_bytes", 1000, [1100.0]).reason == "the peak is 10.0 % over the limit"


def test_bound_is_the_one_that_decided() -> None:
    samples = [float(value) for value in range(1, 101)]
    passed, failed = line("ttft_ms", 100, samples), line("ttft_ms", 50, samples)
    assert (passed.result, passed.measured, passed.bound) == ("PASS", 95, 99)
    assert failed.result == "FAIL"
    assert failed.bound is not None
    assert 50 < failed.bound < 95
    slow = line("tokens_per_s", 40, samples)
    assert (slow.result, slow.measured) == ("PASS", 50)
    assert slow.bound is not None
    assert 40 <= slow.bound <= 50


def test_higher_confidence_needs_more() -> None:
    assert line("ttft_ms", 100, [90.0] * 59, confidence=0.95).result == "PASS"
    assert line("ttft_ms", 100, [90.0] * 59, confidence=0.99).result == "INSUFFICIENT"


@pytest.mark.parametrize("field", [name for name in LINES if name != "power_w"])
def test_an_invalid_run_never_passes(field: str) -> None:
    good = 1e9 if field == "tokens_per_s" else 1.0
    assert line(field, 100, [good] * 400).result == "PASS"
    verdict = line(field, 100, [good] * 400, invalid=["host loaded: 40 %"])
    assert (verdict.result, verdict.reason) == ("INSUFFICIENT", "invalid run: host loaded: 40 %")
    assert verdict.missing_samples is None


def test_an_invalid_run_fails_on_memory_only() -> None:
    assert line("peak_memory_bytes", 100, [200.0], invalid=["host loaded"]).result == "FAIL"
    assert line("itl_ms", 100, [200.0] * 400, invalid=["host loaded"]).result == "INSUFFICIENT"
    assert line("power_w", 100, [200.0], invalid=["host loaded"]).result == "INSUFFICIENT"


def test_free_lines_are_shown_without_a_verdict() -> None:
    measured = {"ttft_ms": metric("ms", "a test", [1.0] * 100)}
    verdicts = judge(Budget(), measured, predicted=predictions(PREDICTED, 128), unmeasured={"power_w": "no sensor"})
    assert [verdict.field for verdict in verdicts] == list(LINES)
    assert {verdict.result for verdict in verdicts} == {None}
    by_field = {verdict.field: verdict for verdict in verdicts}
    assert (by_field["ttft_ms"].measured, by_field["ttft_ms"].predicted, by_field["ttft_ms"].reason) == (1.0, 300, "")
    assert by_field["power_w"].reason == "no sensor"
    assert overall_result(verdicts) is None


def test_overall_result_is_the_worst_line() -> None:
    measured = {
        "ttft_ms": metric("ms", "a test", [1.0] * 59),
        "itl_ms": metric("ms", "a test", [1.0] * 59),
        "peak_memory_bytes": metric("bytes", "a test", [1.0]),
    }

    def overall(**limits: float) -> object:
        return overall_result(judge(msgspec.convert(limits, Budget), measured))

    assert overall(ttft_ms=2, peak_memory_bytes=2) == "PASS"
    assert overall(ttft_ms=2, peak_memory_bytes=2, itl_ms=2) == "INSUFFICIENT"
    assert overall(ttft_ms=0.5, peak_memory_bytes=2, itl_ms=2) == "FAIL"


@given(
    samples=st.lists(st.floats(0, 200), min_size=1, max_size=300),
    limit=st.floats(1, 199),
    field=st.sampled_from([name for name, entry in LINES.items() if entry.percentile is not None]),
)
def test_verdicts_never_contradict_the_samples(samples: list[float], limit: float, field: str) -> None:
    verdict = line(field, limit, samples)
    assert verdict.measured is not None
    met = verdict.measured <= limit if LINES[field].at_most else verdict.measured >= limit
    if verdict.result == "PASS":
        assert met
        assert verdict.bound is not None
    if verdict.result == "FAIL":
        assert verdict.misses > 0
    # A tighter limit is never judged better.
    order = {"FAIL": 0, "INSUFFICIENT": 1, "PASS": 2}
    tighter = line(field, limit * 0.9 if LINES[field].at_most else limit * 1.1, samples)
    assert verdict.result is not None
    assert tighter.result is not None
    assert order[tighter.result] <= order[verdict.result]


def test_predicted_ttft_needs_the_same_prompt_length() -> None:
    assert predictions(PREDICTED, 128)["ttft_ms"] == 300
    assert "ttft_ms" not in predictions(PREDICTED, 64)


def test_metric_keeps_raw_samples_and_bounds() -> None:
    entry = metric("ms", "a test", [3.0, 1.0, 2.0, 5.0, 4.0])
    assert entry.samples == (3.0, 1.0, 2.0, 5.0, 4.0)
    middle = entry.at(50)
    assert (middle.value, middle.lower, middle.upper) == (3.0, 1.0, 5.0)
    assert entry.at(99).upper is None
    with pytest.raises(KeyError):
        entry.at(42)
    assert metric("ms", "a test", []).percentiles == ()


def make_report(**changes: object) -> reports.Report:
    """A report with plausible contents."""
    metrics = {"ttft_ms": metric("ms", "a test", [1.0, 2.0])}
    verdicts = judge(Budget(ttft_ms=5), metrics)
    base = reports.Report(
        bundle="b",
        manifest_sha256="0" * 64,
        profile="laptop-cpu",
        device=reports.Device(
            machine="x86_64", model=None, cpu="c", logical_cpus=2, physical_cores=2, memory_bytes=1, kernel="6",
            system=None, governor=None, frequency_mhz=(2596.1,), frequency_limit_mhz=(),
        ),
        simulated=False,
        workload=reports.LanguageWorkload(),
        details=reports.LanguageDetails(context_tokens=2048, predicted=PREDICTED),
        threads=2,
        repetitions=2,
        planned_repetitions=59,
        duration_s=1.5,
        confidence=0.95,
        metrics=metrics,
        warmup={},
        unmeasured={"power_w": "no sensor"},
        memory=None,
        budget=Budget(ttft_ms=5),
        host_load=reports.HostLoad(before=0.1, during=0.2, steal=0.0, own=0.5, allowed=0.1),
        temperatures=(reports.Temperature(zone="z", before_c=40, after_c=50),),
        throttle_events=None,
        valid=False,
        invalid_reasons=("host loaded",),
        verdicts=verdicts,
        result=overall_result(verdicts),
        notes=(),
        tools={"edgeq": "0"},
        created_utc="2026-11-22T00:00:00.000Z",
    )  # fmt: skip
    return msgspec.structs.replace(base, **changes)


def test_report_survives_json() -> None:
    report = make_report()
    assert from_json(to_json(report), reports.Report) == report


def test_a_report_of_the_first_schema_is_still_read(tmp_path: Path) -> None:
    report = make_report()
    old = json.loads(to_json(report))
    details, workload = old.pop("details"), old["workload"]
    old |= {"schema_version": 1, "context_tokens": details["context_tokens"], "predicted": details["predicted"]}
    del workload["kind"]
    (tmp_path / "r.json").write_text(json.dumps(old))
    assert reports.read_report(tmp_path / "r.json") == report


def test_a_report_of_a_tensor_bundle_survives_json() -> None:
    details = reports.TensorDetails(
        backend="onnxruntime-cpu", scheme="int8-static", providers=("CPUExecutionProvider",), inputs="random numbers",
        calls=1, held_bytes=32, shapes=({"x": (1, 8)},), predicted=TENSOR_PREDICTED,
    )  # fmt: skip
    report = make_report(workload=reports.TensorWorkload(axes={"batch": 1}), details=details)
    assert from_json(to_json(report), reports.Report) == report


def test_predicted_latency_is_for_the_usual_sizes() -> None:
    assert tensor_predictions(TENSOR_PREDICTED, usual=True) == {"peak_memory_bytes": 4, "latency_ms": 2}
    assert tensor_predictions(TENSOR_PREDICTED, usual=False) == {"peak_memory_bytes": 4}
    unknown = msgspec.structs.replace(TENSOR_PREDICTED, latency_ms=None)
    assert tensor_predictions(unknown, usual=True) == {"peak_memory_bytes": 4}


def test_a_latency_from_a_datasheet_is_no_prediction() -> None:
    assert tensor_floors(TENSOR_PREDICTED) == ()
    least = msgspec.structs.replace(TENSOR_PREDICTED, latency_is_floor=True)
    verdicts = judge(Budget(), {}, predicted=tensor_predictions(least, usual=True), floors=tensor_floors(least))
    assert [verdict.field for verdict in verdicts if verdict.predicted_is_floor] == ["latency_ms"]
    unlike = judge(Budget(), {}, predicted=tensor_predictions(least, usual=False), floors=tensor_floors(least))
    assert not any(verdict.predicted_is_floor for verdict in unlike)


def test_a_report_without_floors_is_still_read(tmp_path: Path) -> None:
    report = make_report()
    old = json.loads(to_json(report))
    assert old["verdicts"]
    for verdict in old["verdicts"]:
        del verdict["predicted_is_floor"]
    (tmp_path / "r.json").write_text(json.dumps(old))
    assert reports.read_report(tmp_path / "r.json") == report


def test_report_file_is_replaced_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "made" / "r.json"
    reports.write_report(make_report(), path)
    reports.write_report(make_report(bundle="newer"), path)
    assert reports.read_report(path).bundle == "newer"
    assert [entry.name for entry in path.parent.iterdir()] == ["r.json"]


def test_report_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    for target in (tmp_path / "file" / "r.json", tmp_path):
        for attempt in (reports.check_writable, lambda path: reports.write_report(make_report(), path)):
            with pytest.raises(BundleError, match=r"cannot be written.*--output"):
                attempt(target)

    def full(self: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(BundleError, match="No space left"):
        reports.write_report(make_report(), tmp_path / "r.json")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_check_writable_leaves_nothing(tmp_path: Path) -> None:
    reports.check_writable(tmp_path / "reports" / "r.json")
    assert list((tmp_path / "reports").iterdir()) == []


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b"{", "no valid report"),
        (b"\xff\xfe", "no valid report"),
        (b'{"schema_version": 99}', "schema version 99"),
        (b'{"schema_version": 1, "bundle": 3}', "no valid report"),
        (b'{"schema_version": 1, "workload": 3}', "no valid report"),
        (b'{"schema_version": 2, "bundle": 3}', "no valid report"),
    ],
)
def test_bad_report_is_one_line(tmp_path: Path, text: bytes, match: str) -> None:
    (tmp_path / "r.json").write_bytes(text)
    with pytest.raises(BundleError, match=match):
        reports.read_report(tmp_path / "r.json")


def test_missing_report_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="No such file"):
        reports.read_report(tmp_path / "r.json")


def test_a_limit_of_nothing_is_missed_by_everything() -> None:
    assert line("peak_memory_bytes", 0, [5.0]).result == "FAIL"
