"""Limits on quality, judged as budgets are: by a confidence bound, never by the measured figure alone."""

from __future__ import annotations

import math

from edgeq.quality import Interval, Quality
from edgeq.verdicts import Result, Verdict

__all__ = ["check_gates"]

_MOST_TOKENS = 10**9  # beyond this, "more text" is no advice


def check_gates(
    quality: Quality,
    *,
    max_kld: float | None = None,
    min_top1: float | None = None,
    predicted_kld: float | None = None,
) -> tuple[Verdict, ...]:
    """One verdict for each limit that is given.

    PASS if the whole confidence interval meets the limit, FAIL if none of it does, else INSUFFICIENT with the tokens
    that would likely decide (`Verdict.missing_samples`): an interval shrinks with the square root of the text.

    Args:
        quality: what was measured.
        max_kld: of the mean KL divergence, in nats.
        min_top1: of the share of positions with the same most likely token, 0 to 1.
        predicted_kld: the mean KL that was expected, to be shown beside it.
    """
    verdicts = []
    if max_kld is not None:
        verdicts.append(
            _judge(
                quality,
                quality.mean_kld,
                quality.mean_kld_interval,
                limit=max_kld,
                at_most=True,
                predicted=predicted_kld,
            )
        )
    if min_top1 is not None:
        verdicts.append(_judge(quality, quality.top1, quality.top1_interval, limit=min_top1, at_most=False))
    return tuple(verdicts)


def _judge(
    quality: Quality,
    measured: float,
    interval: Interval,
    *,
    limit: float,
    at_most: bool,
    predicted: float | None = None,
) -> Verdict:
    worst, best = (interval.high, interval.low) if at_most else (interval.low, interval.high)
    sure = f"with {quality.confidence * 100:g} % confidence"
    result: Result
    missing = None
    if worst is None or best is None:
        result, reason = "INSUFFICIENT", f"{quality.chunks} chunk of text allows no confidence interval"
    elif _meets(worst, limit, at_most=at_most):
        result, reason = "PASS", f"meets the limit {sure}"
    elif not _meets(best, limit, at_most=at_most):
        result, reason = "FAIL", f"misses the limit {sure}"
    else:
        missing = _missing_tokens(quality.tokens, abs(worst - measured), abs(limit - measured))
        more = "no amount of text" if missing is None else f"about {missing} more tokens"
        result, reason = "INSUFFICIENT", f"the limit lies within the confidence interval; {more} would decide it"
    return Verdict(
        field="mean_kld" if at_most else "top1",
        label="mean KL divergence" if at_most else "same top token",
        unit="nats" if at_most else "",
        statistic="mean",
        limit=limit,
        predicted=predicted,
        measured=measured,
        bound=best if result == "FAIL" else worst,
        n_samples=quality.tokens,
        misses=0,
        missing_samples=missing,
        result=result,
        reason=reason,
    )


def _meets(value: float, limit: float, *, at_most: bool) -> bool:
    return value <= limit if at_most else value >= limit


def _missing_tokens(tokens: int, half_width: float, distance: float) -> int | None:
    """Tokens until an interval of ``half_width`` is as narrow as ``distance``; None if that is too many to advise."""
    if distance * math.sqrt(_MOST_TOKENS) <= half_width * math.sqrt(max(tokens, 1)):
        return None
    return max(1, math.ceil(tokens * (half_width / distance) ** 2) - tokens)
