"""A text that a model is judged by must not be one that it was calibrated on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from edgeq.converters.calibration.texts import Chunk, TokenText
from edgeq.errors import UsageError

__all__ = ["refuse_overlap"]

_WINDOW = 16  # tokens; longer than common phrases, shorter than a quotation
_MOST = 0.01


def refuse_overlap(calibration: TokenText, held_out: TokenText) -> float:
    """The share of the held-out text's windows of 16 tokens that stand in the calibration text too, at most 1 %.

    Raises:
        UsageError: it is more, or the texts are the same, or the held-out text has no such window.
    """
    remedy = "Give another text with --eval-text or --calibration"
    if calibration.text_sha256 == held_out.text_sha256:
        raise UsageError(f"{held_out.name} is both the calibration text and the text to judge by", remedy)
    seen = set(_windows(calibration.chunks))
    found = [window in seen for window in _windows(held_out.chunks)]
    if not found:
        raise UsageError(
            f"{held_out.name} has no {_WINDOW} tokens in a row, too few to compare it with the calibration text",
            "Give a longer text with --eval-text",
        )
    share = sum(found) / len(found)
    if share > _MOST:
        raise UsageError(
            f"{share:.1%} of {held_out.name} stands in {calibration.name} too, and at most {_MOST:.0%} may", remedy
        )
    return share


def _windows(chunks: Sequence[Chunk]) -> Iterator[bytes]:
    for chunk in chunks:
        data = np.ascontiguousarray(chunk, np.int32).tobytes()
        width = _WINDOW * 4
        yield from (data[start : start + width] for start in range(0, len(data) - width + 1, 4))
