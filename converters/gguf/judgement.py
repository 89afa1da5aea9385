"""From divergences at single positions to figures with confidence intervals."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from edgeq import stats
from edgeq.converters.calibration.texts import TokenText
from edgeq.converters.gguf.divergence import Divergence
from edgeq.quality import Interval, Quality

__all__ = ["CONFIDENCE", "paired_difference", "summarize"]

CONFIDENCE = 0.95

Floats = npt.NDArray[np.float64]


def summarize(
    divergence: Divergence,
    text: TokenText,
    *,
    noise_floor: Divergence,
    overlap: float | None,
    reference: str = "f16",
    kv_type: str = "f16",
) -> Quality:
    """The figures that a manifest keeps.

    Args:
        divergence: of the artifact from the reference on ``text``.
        text: held-out.
        noise_floor: of the reference from itself (`Judge.noise_floor`); any part of the text will do.
        overlap: what `refuse_overlap` measured; None if nothing was calibrated.
        reference: type of the reference's weights.
        kv_type: of the artifact's KV cache.
    """
    lengths = np.bincount(divergence.chunk)
    kld = np.sort(divergence.kld).tolist()
    mean, *kld_ends = _clustered(divergence.kld, divergence.chunk)
    top1, *top1_ends = _clustered(divergence.same_top.astype(np.float64), divergence.chunk)
    ppl, *ppl_ends = _ppl_ratio(divergence)
    return Quality(
        tokens=len(kld),
        chunks=len(lengths),
        chunk_tokens=int(lengths.max()),
        mean_kld=mean,
        mean_kld_interval=_interval(kld_ends, least=0.0),
        p99_kld=stats.percentile(kld, 99),
        p999_kld=stats.percentile(kld, 99.9),
        max_kld=kld[-1],
        top1=top1,
        top1_interval=_interval(_all_agree(len(kld)) if top1 == 1 else top1_ends, least=0.0, most=1.0),
        ppl_ratio=ppl,
        ppl_ratio_interval=_interval(ppl_ends, least=0.0),
        noise_floor_kld=noise_floor.mean_kld,
        confidence=CONFIDENCE,
        reference=reference,
        text=text.name,
        text_sha256=text.text_sha256,
        overlap=overlap,
        kv_type=kv_type,
    )


def paired_difference(a: Divergence, b: Divergence, *, confidence: float = CONFIDENCE) -> tuple[float, float, float]:
    """Mean KL of ``a`` minus that of ``b``, position by position on one text, with its confidence interval.

    What makes a position hard is common to both and cancels, so this tells two candidates apart that have wide
    intervals of their own.

    Returns:
        Difference, lower end, upper end in nats; the ends are infinite for a text of one chunk.

    Raises:
        ValueError: they are not of the same text.
    """
    if not np.array_equal(a.chunk, b.chunk):
        raise ValueError("two divergences of different texts cannot be paired")
    return _clustered(a.kld - b.kld, a.chunk, confidence)


def _clustered(
    values: Floats, chunk: npt.NDArray[np.int32], confidence: float = CONFIDENCE
) -> tuple[float, float, float]:
    counts = np.bincount(chunk)
    used = counts > 0
    sums = np.bincount(chunk, weights=values)
    return stats.clustered_mean(sums[used].tolist(), counts[used].tolist(), confidence)


def _ppl_ratio(divergence: Divergence) -> tuple[float, float, float]:
    """From the mean difference of the negative log-likelihoods, since both perplexities are of the same tokens."""
    if not len(divergence.nll_reference):  # chunks of one token predict nothing
        return 1.0, -math.inf, math.inf
    difference = divergence.nll_candidate - divergence.nll_reference
    mean, low, high = _clustered(difference, divergence.nll_chunk)
    return math.exp(mean), _exp(low), _exp(high)


def _exp(value: float) -> float:
    return math.inf if value > 700 else math.exp(value)


def _all_agree(n: int) -> list[float]:
    """Clopper and Pearson's interval of a share when all n of n agree, where no spread tells of an interval."""
    return [((1 - CONFIDENCE) / 2) ** (1 / n), 1.0]


def _interval(ends: list[float], *, least: float, most: float = math.inf) -> Interval:
    low, high = ends
    if not (math.isfinite(low) and math.isfinite(high)):
        return Interval(low=None, high=None)
    return Interval(low=max(least, low), high=min(most, high))
