from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeq.converters.calibration.overlap import refuse_overlap
from edgeq.converters.calibration.texts import TokenText
from edgeq.errors import UsageError


def _text(chunks: list[Any], sha256: str = "a" * 64) -> TokenText:
    arrays = tuple(np.asarray(chunk, np.int32) for chunk in chunks)
    return TokenText(
        chunks=arrays, text_sha256=sha256, source="file", name="t.txt", seed=None, n_tokens=sum(map(len, arrays))
    )


def _random(seed: int, n: int = 4000) -> Any:
    return np.random.default_rng(seed).integers(0, 1000, n)


def test_different_texts_do_not_overlap() -> None:
    assert refuse_overlap(_text([_random(1)]), _text([_random(2)], "b" * 64)) == 0.0


def test_the_same_text_is_refused_however_it_was_cut() -> None:
    calibration = _text([_random(1)])
    with pytest.raises(UsageError, match="both the calibration text and the text to judge by"):
        refuse_overlap(calibration, dataclasses.replace(calibration, chunks=(np.arange(40, dtype=np.int32),)))


@given(st.integers(0, 300), st.integers(0, 3000))
def test_the_share_is_counted_wherever_it_stands(n_common: int, place: int) -> None:
    calibration, held_out = _random(1), _random(2)
    held_out[100 : 100 + n_common] = calibration[place : place + n_common]
    windows = len(held_out) - 15
    common = max(0, n_common - 15)
    arguments = _text([calibration]), _text([held_out], "b" * 64)
    if common / windows > 0.01:
        with pytest.raises(UsageError, match=rf"{common / windows:.1%} of t.txt stands in t.txt too"):
            refuse_overlap(*arguments)
    else:
        # A random neighbour may be equal too.
        assert refuse_overlap(*arguments) == pytest.approx(common / windows, abs=2.1 / windows)


def test_windows_do_not_reach_across_chunks() -> None:
    both = _random(3, 30)
    assert refuse_overlap(_text([both[:15], both[15:]]), _text([both], "b" * 64)) == 0.0


def test_a_text_without_a_window_proves_nothing() -> None:
    with pytest.raises(UsageError, match="has no 16 tokens in a row"):
        refuse_overlap(_text([_random(1)]), _text([_random(2, 15)] * 10, "b" * 64))
