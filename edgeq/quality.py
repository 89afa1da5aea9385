"""How good a quantized model is, measured against its unquantized reference on a text that neither was made for."""

from __future__ import annotations

from edgeq.record import Count, Record, Sha256, Share, Tokens

__all__ = ["Interval", "Quality"]


class Interval(Record, frozen=True, kw_only=True):
    """A two-sided confidence interval.

    Attributes:
        low: None if the text has too few chunks to say.
        high: likewise.
    """

    low: float | None
    high: float | None


class Quality(Record, frozen=True, kw_only=True):
    """The artifact against the reference on held-out text, position by position.

    KL is that of the artifact's distribution of the next token from the reference's, in nats. Percentiles are those of
    the positions, by nearest rank. The intervals take chunks as the independent units (`edgeq.stats.clustered_mean`).

    Attributes:
        tokens: positions compared.
        chunks: texts that they come from, each run from an empty context.
        chunk_tokens: of the longest.
        mean_kld: mean KL.
        mean_kld_interval: of it.
        p99_kld: 99 % of the positions are no further off.
        p999_kld: 99.9 % of the positions are no further off.
        max_kld: the worst position.
        top1: share of positions with the same most likely token.
        top1_interval: of it.
        ppl_ratio: perplexity of the artifact over that of the reference.
        ppl_ratio_interval: of it.
        noise_floor_kld: mean KL of the reference from itself when computed in other batches: what rounding amounts to.
        confidence: of the intervals.
        reference: type of the reference's weights, ``"f16"``; its KV cache is in F16.
        kv_type: of the artifact's KV cache.
        text: what was read, for people.
        text_sha256: of it.
        overlap: share of the text that stands in the calibration text too; None if nothing was calibrated.
    """

    tokens: Count
    chunks: Count
    chunk_tokens: Tokens
    mean_kld: float
    mean_kld_interval: Interval
    p99_kld: float
    p999_kld: float
    max_kld: float
    top1: Share
    top1_interval: Interval
    ppl_ratio: float
    ppl_ratio_interval: Interval
    noise_floor_kld: float
    confidence: float
    reference: str
    text: str
    text_sha256: Sha256
    overlap: Share | None
    kv_type: str = "f16"
