from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeq.converters.calibration.texts import TokenText
from edgeq.converters.gguf.divergence import Divergence
from edgeq.converters.gguf.judgement import paired_difference, summarize

TEXT = TokenText(chunks=(), text_sha256="c" * 64, source="builtin", name="prose", seed=1, n_tokens=0)


def _divergence(seed: int, n_chunks: int = 12, length: int = 50, *, scale: float = 1.0, between: float = 0.0) -> Any:
    rng = np.random.default_rng(seed)
    chunk = np.repeat(np.arange(n_chunks, dtype=np.int32), length)
    kld = scale * rng.exponential(0.02, n_chunks * length) * np.repeat(rng.lognormal(0, between, n_chunks), length)
    n_nll = n_chunks * (length - 1)
    nll = rng.exponential(3, n_nll)
    return Divergence(
        kld=kld,
        same_top=rng.random(len(kld)) < 0.9,
        chunk=chunk,
        nll_reference=nll,
        nll_candidate=nll + rng.normal(0.03, 0.1, n_nll),
    )


def test_every_figure_is_what_it_says() -> None:
    divergence = _divergence(1, between=0.5)
    floor = _divergence(2, scale=1e-4)
    quality = summarize(divergence, TEXT, noise_floor=floor, overlap=0.001)
    kld = divergence.kld
    assert (quality.tokens, quality.chunks, quality.chunk_tokens) == (600, 12, 50)
    assert quality.mean_kld == pytest.approx(kld.mean())
    assert quality.p99_kld == np.percentile(kld, 99, method="inverted_cdf")
    assert quality.p999_kld == np.percentile(kld, 99.9, method="inverted_cdf")
    assert quality.max_kld == kld.max()
    assert quality.top1 == pytest.approx(divergence.same_top.mean())
    perplexities = [np.exp(nll.mean()) for nll in (divergence.nll_candidate, divergence.nll_reference)]
    assert quality.ppl_ratio == pytest.approx(perplexities[0] / perplexities[1])
    assert quality.noise_floor_kld == pytest.approx(floor.kld.mean())
    for interval, value in (
        (quality.mean_kld_interval, quality.mean_kld),
        (quality.top1_interval, quality.top1),
        (quality.ppl_ratio_interval, quality.ppl_ratio),
    ):
        assert interval.low is not None
        assert interval.high is not None
        assert interval.low < value < interval.high
    assert (quality.text, quality.text_sha256, quality.reference, quality.overlap) == ("prose", "c" * 64, "f16", 0.001)


def test_intervals_widen_with_what_chunks_have_in_common() -> None:
    def width(between: float) -> float:
        quality = summarize(_divergence(3, 40, between=between), TEXT, noise_floor=_divergence(4), overlap=None)
        interval = quality.mean_kld_interval
        assert interval.low is not None
        assert interval.high is not None
        return (interval.high - interval.low) / quality.mean_kld

    assert width(1.0) > 4 * width(0.0)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Chunks of their own difficulty: 95 of 100 intervals hold the mean; intervals over positions would not."""
    held = []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        values = np.repeat(rng.gamma(4, 0.25, 15), 50) + rng.normal(0, 0.3, 750)  # the mean is 1
        divergence = dataclasses.replace(_divergence(0, 15), kld=values)
        interval = summarize(divergence, TEXT, noise_floor=divergence, overlap=None).mean_kld_interval
        assert interval.low is not None
        assert interval.high is not None
        held.append(interval.low <= 1 <= interval.high)
    assert 0.90 <= np.mean(held) <= 0.98


def test_one_chunk_allows_no_interval() -> None:
    quality = summarize(_divergence(1, 1), TEXT, noise_floor=_divergence(1, 1), overlap=None)
    for interval in (quality.mean_kld_interval, quality.top1_interval, quality.ppl_ratio_interval):
        assert (interval.low, interval.high) == (None, None)


def test_agreement_everywhere_is_no_certainty() -> None:
    divergence = dataclasses.replace(_divergence(1), same_top=np.ones(600, bool))
    interval = summarize(divergence, TEXT, noise_floor=divergence, overlap=None).top1_interval
    stats = pytest.importorskip("scipy.stats")
    oracle = stats.binomtest(600, 600).proportion_ci(0.95, method="exact")
    assert (interval.low, interval.high) == pytest.approx((oracle.low, 1.0))


def test_pairing_sees_what_intervals_apart_cannot() -> None:
    better = _divergence(5, between=1.0)
    worse = dataclasses.replace(better, kld=better.kld * 1.1)
    mean, low, high = paired_difference(worse, better)
    assert mean == pytest.approx(better.kld.mean() * 0.1)
    assert 0 < low < mean < high
    alone = summarize(worse, TEXT, noise_floor=better, overlap=None).mean_kld_interval
    assert alone.low is not None
    assert alone.low < better.kld.mean(), "which its own interval does not exclude"
    opposite = paired_difference(better, worse)
    assert opposite == pytest.approx((-mean, -high, -low))


@given(st.integers(0, 1000), st.floats(0.5, 0.999))
def test_confidence_widens(seed: int, confidence: float) -> None:
    a, b = _divergence(seed, 6, 5), _divergence(seed + 1, 6, 5)
    mean, low, high = paired_difference(a, b, confidence=confidence)
    wider = paired_difference(a, b, confidence=(1 + confidence) / 2)
    assert wider[1] < low < mean < high < wider[2]


def test_different_texts_cannot_be_paired() -> None:
    with pytest.raises(ValueError, match="different texts"):
        paired_difference(_divergence(1, 12), _divergence(1, 11))
    assert math.isinf(paired_difference(_divergence(1, 1), _divergence(2, 1))[1])
