from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeq.converters.calibration.overlap import refuse_overlap
from edgeq.converters.calibration.texts import Split, TokenText
from edgeq.errors import UsageError


def _text(chunks: list[Any], sha256: str = "a" * 64, **fields: Any) -> TokenText:
    arrays = tuple(np.asarray(chunk, np.int32) for chunk in chunks)
    text = TokenText(
        chunks=arrays, text_sha256=sha256, source="file", name="t.txt", seed=None, n_tokens=sum(map(len, arrays))
    )
    return dataclasses.replace(text, **fields)


def _random(seed: int, n: int = 4000) -> Any:
    """Tokens that no other seed gives."""
    return np.random.default_rng(seed).integers(1000 * seed, 1000 * (seed + 1), n)


def test_different_texts_do_not_overlap() -> None:
    assert refuse_overlap(_text([_random(1)]), _text([_random(2)], "b" * 64)) == 0.0


def test_the_same_text_is_refused_however_it_was_cut() -> None:
    calibration = _text([_random(1)])
    with pytest.raises(UsageError, match="both the calibration text and the text to judge by"):
        refuse_overlap(calibration, dataclasses.replace(calibration, chunks=(np.arange(40, dtype=np.int32),)))


@pytest.mark.parametrize(("calibrated", "judged"), [(2000, 4000), (4000, 2000), (4000, 17)])
def test_the_beginning_of_the_same_text_is_the_same_text(calibrated: int, judged: int) -> None:
    ids = _random(1)
    arguments = _text([ids[:calibrated]], name="own.txt"), _text([ids[:judged]], "b" * 64, name="copy.txt")
    with pytest.raises(UsageError, match=r"copy\.txt is both the calibration text and the text to judge by") as error:
        refuse_overlap(*arguments)
    assert "%" not in str(error.value)


@given(st.integers(0, 300), st.integers(0, 3000))
def test_the_share_is_counted_wherever_it_stands(n_common: int, place: int) -> None:
    calibration, held_out = _random(1), _random(2)
    held_out[100 : 100 + n_common] = calibration[place : place + n_common]
    windows = len(held_out) - 15
    common = max(0, n_common - 15)
    arguments = _text([calibration], name="c.txt"), _text([held_out], "b" * 64, name="e.txt")
    if common / windows > 0.01:
        expected = (
            rf"{common / windows:.1%} of e.txt, the text to judge by, stands in the calibration text \(c.txt\) too"
        )
        with pytest.raises(UsageError, match=expected):
            refuse_overlap(*arguments)
    else:
        assert refuse_overlap(*arguments) == common / windows


def _builtin(chunks: list[Any], split: Split) -> TokenText:
    return _text(chunks, "c" * 64, source="builtin", name=f"prose, half {split!r}", split=split)


@pytest.mark.parametrize(
    ("calibration", "held_out", "options"),
    [
        (_text([_random(1)]), _builtin([_random(1)[5:]], "select"), ["--calibration"]),
        (_text([_random(1)]), _builtin([_random(1)[5:]], "judge"), ["--calibration", "--eval-text"]),
        (_text([_random(1)]), _text([_random(1)[5:]], "b" * 64), ["--calibration", "--eval-text"]),
        (_builtin([_random(1)], "select"), _text([_random(1)[5:]], "b" * 64), ["--eval-text"]),
        (_text([_random(1)], source="self"), _text([_random(1)[5:]], "b" * 64), ["--eval-text", "--seed"]),
    ],
)
def test_the_remedy_names_what_helps(calibration: TokenText, held_out: TokenText, options: list[str]) -> None:
    with pytest.raises(UsageError, match="stands in") as error:
        refuse_overlap(calibration, held_out)
    assert sorted(set(re.findall(r"--[a-z-]+", error.value.remedy))) == sorted(options)
    assert ("mixes are compared" in error.value.cause) is ("select" in (calibration.split, held_out.split))


def test_windows_do_not_reach_across_chunks() -> None:
    both = _random(3, 30)
    assert refuse_overlap(_text([both[:15], both[15:]]), _text([both[2:]], "b" * 64)) == 0.0


def test_a_text_without_a_window_proves_nothing() -> None:
    with pytest.raises(UsageError, match=r"has no 16 tokens in a row.*more tokens with --eval-tokens"):
        refuse_overlap(_text([_random(1)]), _text([_random(2, 15)] * 10, "b" * 64))
