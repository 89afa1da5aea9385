"""From samples to verdicts.

A line of a budget passes only if the one-sided confidence bound of its percentile (`edgeq.stats`) meets the limit, and
fails only if the opposite bound misses it; between the two the samples are insufficient. What was not measured never
passes, and neither does anything in a run whose conditions were wrong.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Literal

import msgspec

from edgeq import stats
from edgeq.record import Record
from edgeq.tensor_types import TensorPrediction
from edgeq.types import BUDGET_LINES, Budget, BudgetLine, Prediction

__all__ = [
    "DEFAULT_CONFIDENCE",
    "Metric",
    "Percentile",
    "Result",
    "Verdict",
    "judge",
    "metric",
    "overall_result",
    "predictions",
    "tensor_floors",
    "tensor_predictions",
]

DEFAULT_CONFIDENCE = 0.95

Result = Literal["PASS", "FAIL", "INSUFFICIENT"]


class Percentile(Record, frozen=True, kw_only=True):
    """One percentile of a metric with its one-sided bounds.

    Attributes:
        q: in percent.
        value: nearest rank, so one of the samples.
        lower: the true percentile is at least this, at the report's confidence; None if the samples are too few.
        upper: the true percentile is at most this; None likewise.
    """

    q: float
    value: float
    lower: float | None
    upper: float | None


class Metric(Record, frozen=True, kw_only=True):
    """Raw samples of one quantity.

    Attributes:
        unit: ``"bytes"``, ``"ms"``, ``"tok/s"``, ``"calls/s"`` or ``"W"``.
        source: how they were measured, for people ("VmHWM of the serving process").
        samples: in the order in which they were taken.
        percentiles: p50, p90, p95 and p99; p90 only since schema 2 of the report.
    """

    unit: str
    source: str
    samples: tuple[float, ...]
    percentiles: tuple[Percentile, ...] = ()

    def at(self, q: float) -> Percentile:
        """The stored percentile ``q``. Raises KeyError if it is not one of those that are kept."""
        for entry in self.percentiles:
            if entry.q == q:
                return entry
        raise KeyError(q)


class Verdict(Record, frozen=True, kw_only=True):
    """One line of a budget.

    Attributes:
        field: the name in `Budget`.
        label: the name for people.
        unit: of limit, predicted, measured and bound.
        statistic: what of the samples is judged: ``"p99"``, ``"max"``.
        limit: None if the budget leaves the line free.
        predicted: by the plan; None if it predicts no such thing.
        predicted_is_floor: whether that is the least which datasheet figures allow, and no prediction; always False in
            reports that were written without it.
        measured: the statistic; None if nothing was measured.
        bound: the confidence bound that the limit is held against; None if the samples are too few for one.
        n_samples: how many there are.
        misses: how many of them break the limit.
        missing_samples: further ones without a miss that would give a PASS; None unless the result is INSUFFICIENT.
        result: None for a line without a limit.
        reason: one line for people; empty for a line without a limit that was measured.
    """

    field: str
    label: str
    unit: str
    statistic: str
    limit: float | None
    predicted: float | None
    predicted_is_floor: bool = False
    measured: float | None
    bound: float | None
    n_samples: int
    misses: int
    missing_samples: int | None
    result: Result | None
    reason: str


def metric(unit: str, source: str, samples: Sequence[float], *, confidence: float = DEFAULT_CONFIDENCE) -> Metric:
    """A `Metric` with p50, p90, p95 and p99 worked out; without percentiles if there are no samples."""
    kept = tuple(float(value) for value in samples)
    percentiles = tuple(
        Percentile(
            q=q,
            value=stats.percentile(kept, q),
            lower=stats.lower_bound(kept, q, confidence),
            upper=stats.upper_bound(kept, q, confidence),
        )
        for q in ((50.0, 90.0, 95.0, 99.0) if kept else ())
    )
    return Metric(unit=unit, source=source, samples=kept, percentiles=percentiles)


def predictions(predicted: Prediction, prompt_tokens: int) -> dict[str, float]:
    """What a plan predicts, by `Budget` field; the time to first token only for the prompt length that it is for."""
    figures: dict[str, float] = {
        "peak_memory_bytes": predicted.peak_memory_bytes,
        "itl_ms": predicted.itl_ms,
        "tokens_per_s": predicted.tokens_per_s,
    }
    if prompt_tokens == predicted.prompt_tokens:
        figures["ttft_ms"] = predicted.ttft_ms
    return figures


def tensor_predictions(predicted: TensorPrediction, *, usual: bool) -> dict[str, float]:
    """What a plan predicts, by `Budget` field; latency only for calls of the usual sizes."""
    figures: dict[str, float] = {"peak_memory_bytes": predicted.peak_memory_bytes}
    if usual and predicted.latency_ms is not None:
        figures["latency_ms"] = predicted.latency_ms
    return figures


def tensor_floors(predicted: TensorPrediction) -> tuple[str, ...]:
    """The `Budget` fields of which a plan predicts no more than the least."""
    return ("latency_ms",) if predicted.latency_is_floor else ()


def judge(
    budget: Budget,
    measurements: Mapping[str, Metric],
    confidence: float = DEFAULT_CONFIDENCE,
    *,
    predicted: Mapping[str, float] | None = None,
    floors: Collection[str] = (),
    unmeasured: Mapping[str, str] | None = None,
    invalid: Sequence[str] = (),
) -> tuple[Verdict, ...]:
    """A verdict for each of `BUDGET_LINES`.

    Args:
        budget: the limits; a line without one gets figures and no result.
        measurements: by `Budget` field; a constrained line that is missing here is INSUFFICIENT, never a pass.
        confidence: of the one-sided bounds, at least 0.5 and below 1.
        predicted: by `Budget` field, in the line's unit.
        floors: fields whose ``predicted`` is the least that they can be, and no prediction.
        unmeasured: why a field is missing from ``measurements``.
        invalid: reasons why the run proves nothing. Then no line passes, and only memory over its limit fails.

    Raises:
        ValueError: a sample is NaN, or ``confidence`` is out of range.
    """
    predicted, unmeasured = predicted or {}, unmeasured or {}
    return tuple(
        _judge_line(
            line,
            budget.limit(line),
            measurements.get(line.field),
            confidence,
            predicted=predicted.get(line.field),
            is_floor=line.field in floors,
            absent=unmeasured.get(line.field, "not measured"),
            invalid=invalid,
        )
        for line in BUDGET_LINES
    )


def overall_result(verdicts: Sequence[Verdict]) -> Result | None:
    """FAIL if any line fails, else INSUFFICIENT if any is, else PASS; None if no line has a limit."""
    results = {verdict.result for verdict in verdicts if verdict.result is not None}
    order: tuple[Result, ...] = ("FAIL", "INSUFFICIENT", "PASS")
    return next((result for result in order if result in results), None)


class _Finding(msgspec.Struct, frozen=True):
    """What the samples alone say about a limit."""

    result: Result
    reason: str
    bound: float | None
    missing: int | None


def _judge_line(
    line: BudgetLine,
    limit: float | None,
    measured: Metric | None,
    confidence: float,
    *,
    predicted: float | None,
    is_floor: bool,
    absent: str,
    invalid: Sequence[str],
) -> Verdict:
    samples = measured.samples if measured is not None else ()
    misses = 0 if limit is None else sum((v > limit) if line.at_most else (v < limit) for v in samples)
    finding = None if limit is None else _find(line, limit, samples, confidence, absent=absent, invalid=invalid)
    reason = (absent if not samples else "") if finding is None else finding.reason
    return Verdict(
        field=line.field,
        label=line.label,
        unit=line.unit,
        statistic="max" if line.percentile is None else f"p{line.percentile:g}",
        limit=limit,
        predicted=predicted,
        predicted_is_floor=is_floor and predicted is not None,
        measured=_statistic(line, samples),
        bound=_shown_bound(line, samples, confidence) if finding is None else finding.bound,
        n_samples=len(samples),
        misses=misses,
        missing_samples=finding.missing if finding is not None and finding.result == "INSUFFICIENT" else None,
        result=finding.result if finding is not None else None,
        reason=reason,
    )


def _find(
    line: BudgetLine, limit: float, samples: Sequence[float], confidence: float, *, absent: str, invalid: Sequence[str]
) -> _Finding:
    if not samples:
        return _Finding("INSUFFICIENT", absent, None, _needed(line, confidence))
    if line.percentile is None:
        finding = _judge_peak(max(samples), limit)
    else:
        finding = _judge_percentile(line, line.percentile, limit, samples, confidence)
    # A disturbed process is slower, but not larger: memory over its limit stays over it.
    if invalid and (finding.result == "PASS" or line.unit != "bytes"):
        return _Finding("INSUFFICIENT", "invalid run: " + "; ".join(invalid), finding.bound, finding.missing)
    return finding


def _statistic(line: BudgetLine, samples: Sequence[float]) -> float | None:
    if not samples:
        return None
    return max(samples) if line.percentile is None else stats.percentile(samples, line.percentile)


def _shown_bound(line: BudgetLine, samples: Sequence[float], confidence: float) -> float | None:
    if line.percentile is None or not samples:
        return None
    bound = stats.upper_bound if line.at_most else stats.lower_bound
    return bound(samples, line.percentile, confidence)


def _needed(line: BudgetLine, confidence: float) -> int:
    """Samples that a PASS takes if none misses the limit."""
    if line.percentile is None:
        return 1
    return stats.required_samples(line.percentile if line.at_most else 100 - line.percentile, confidence)


def _judge_peak(peak: float, limit: float) -> _Finding:
    # A maximum is what it is: there is no distribution to bound.
    if peak <= limit:
        return _Finding("PASS", "the peak is within the limit", peak, None)
    excess = f"{(peak / limit - 1) * 100:.1f} % over the limit" if limit else "over a limit of nothing"
    return _Finding("FAIL", f"the peak is {excess}", peak, None)


def _judge_percentile(
    line: BudgetLine, q: float, limit: float, samples: Sequence[float], confidence: float
) -> _Finding:
    sure = f"with {confidence * 100:g} % confidence"
    # A lower limit on a value is an upper limit on its negative, at the mirrored percentile.
    sign, q = (1.0, q) if line.at_most else (-1.0, 100 - q)
    mirrored, limit = [sign * value for value in samples], sign * limit
    misses = sum(value > limit for value in mirrored)
    upper = stats.upper_bound(mirrored, q, confidence)
    lower = stats.lower_bound(mirrored, q, confidence)
    shown = None if upper is None else sign * upper
    if upper is not None and upper <= limit:
        return _Finding("PASS", f"meets the limit {sure}", shown, None)
    if lower is not None and lower > limit:
        return _Finding("FAIL", f"misses the limit {sure}", sign * lower, None)
    missing = stats.missing_samples(len(samples), misses, q, confidence)
    broken = f"{misses} of {len(samples)} samples miss the limit" if misses else f"only {len(samples)} samples"
    return _Finding("INSUFFICIENT", f"{broken}; {missing} more without a miss would pass {sure}", shown, missing)
