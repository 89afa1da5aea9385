"""What can be found out about the user's texts before hours of work that need them at their end."""

from __future__ import annotations

from pathlib import Path

from edgeq.converters.calibration.overlap import refuse_overlap
from edgeq.converters.calibration.texts import calibration_text
from edgeq.planner.inspection import USUAL_TOKENS, QualityOptions
from edgeq.planner.problem import SearchOptions
from edgeq.planner.search import held_out_text, selection_text

__all__ = ["check_texts"]


def check_texts(gguf: Path, options: SearchOptions, quality: QualityOptions, *, searched: bool) -> tuple[str, ...]:
    """Read the texts that the user gave, and compare all that exist with each other.

    Args:
        gguf: a float GGUF or a skeleton of one, whose tokenizer cuts the texts.
        options: may name a calibration text, which only a search reads.
        quality: may name the text to judge by.
        searched: whether there will be a search.

    Returns:
        What makes the text to judge by less than good, one line each, for the plan's notes; what is to be said of the
        calibration text comes with the evidence.

    Raises:
        UsageError: a text that cannot be read, is too short, or overlaps another one.
    """
    given = options.evidence.calibration if searched else None
    calibration = None if given is None else calibration_text(gguf, given, max_tokens=options.evidence.tokens)
    judged_by = None if quality.text is None else held_out_text(gguf, quality.text, quality.tokens or USUAL_TOKENS)
    if searched and (calibration is not None or judged_by is not None):
        compared_on = selection_text(gguf)
        if calibration is not None:
            refuse_overlap(calibration, compared_on)
        if judged_by is not None:
            refuse_overlap(compared_on, judged_by)
        if calibration is not None and judged_by is not None:
            refuse_overlap(calibration, judged_by)
    return () if judged_by is None else judged_by.warnings
