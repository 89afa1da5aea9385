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

    Args:
        calibration: what was learned from: the calibration's text, or that which mixes were compared on.
        held_out: what is judged by, or what mixes are compared on.

    Raises:
        UsageError: it is more, or one text is the beginning of the other, or the held-out text has no such window.
    """
    remedy = _remedy(calibration, held_out)
    learned, judging = _role(calibration, "the calibration text"), _role(held_out, "the text to judge by")
    if calibration.text_sha256 == held_out.text_sha256 or _is_beginning(calibration, held_out):
        raise UsageError(f"{held_out.name} is both {learned} and {judging}", remedy)
    seen = set(_windows(calibration.chunks))
    found = [window in seen for window in _windows(held_out.chunks)]
    if not found:
        raise UsageError(
            f"{held_out.name} has no {_WINDOW} tokens in a row, too few to compare it with the calibration text",
            "Judge on more tokens with --eval-tokens, or on another text with --eval-text",
        )
    share = sum(found) / len(found)
    if share > _MOST:
        raise UsageError(
            f"{share:.1%} of {held_out.name}, {judging}, stands in {learned} ({calibration.name}) too, and at most "
            f"{_MOST:.0%} may",
            remedy,
        )
    return share


def _windows(chunks: Sequence[Chunk]) -> Iterator[bytes]:
    for chunk in chunks:
        data = np.ascontiguousarray(chunk, np.int32).tobytes()
        width = _WINDOW * 4
        yield from (data[start : start + width] for start in range(0, len(data) - width + 1, 4))


def _is_beginning(a: TokenText, b: TokenText) -> bool:
    """Whether the shorter of two texts is how the longer one begins; that of another limit has another hash."""
    length = min(a.n_tokens, b.n_tokens)
    if length < _WINDOW:
        return False
    first, second = (np.concatenate(text.chunks)[:length] for text in (a, b))
    return np.array_equal(first, second)


def _role(text: TokenText, otherwise: str) -> str:
    return "the text that mixes are compared on" if text.split == "select" else otherwise


def _remedy(calibration: TokenText, held_out: TokenText) -> str:
    """What can be given: nobody chooses the text that mixes are compared on, or what a model writes from a seed."""
    if held_out.split == "select":
        return "Give another text with --calibration"
    if calibration.split == "select":
        return "Give another text with --eval-text"
    if calibration.source == "self":
        return "Give another text with --eval-text, or have the model write another one with --seed"
    return "Give another text with --eval-text or --calibration"
