from __future__ import annotations

import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edgeq.runtime.text import TextStream


def cut(data: bytes, points: list[int]) -> list[bytes]:
    borders = [0, *sorted(point % (len(data) + 1) for point in points), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(borders)]


def reference(text: str, stops: list[str]) -> str:
    """Character by character: the text before the first stop string to be complete, the longest of several."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))]
    return text


POINTS = st.lists(st.integers(min_value=0), max_size=12)


@given(st.text(), POINTS)
def test_characters_cut_anywhere_come_out_whole(text: str, points: list[int]) -> None:
    stream = TextStream()
    parts = [stream.push(piece) for piece in cut(text.encode("utf-8", "replace"), points)]
    assert "".join(parts) + stream.finish() == text.encode("utf-8", "replace").decode()


@example(b"\xed\xa0", [])
@given(st.binary(), POINTS)
def test_invalid_bytes_come_out_as_python_replaces_them(data: bytes, points: list[int]) -> None:
    stream = TextStream()
    text = "".join(stream.push(piece) for piece in cut(data, points)) + stream.finish()
    # An unfinished character at the end is dropped instead of shown broken; half of a surrogate counts as two.
    dropped = data.decode("utf-8", "replace").removeprefix(text)
    assert text + dropped == data.decode("utf-8", "replace")
    assert dropped in ("", "\ufffd", "\ufffd\ufffd")


@given(st.text(alphabet="abé\U0001f600"), st.lists(st.text(alphabet="abé\U0001f600", min_size=1), max_size=4), POINTS)
def test_stop_strings_do_not_depend_on_how_the_text_is_cut(text: str, stops: list[str], points: list[int]) -> None:
    stream = TextStream(stops)
    shown = ""
    for piece in cut(text.encode(), points):
        shown += stream.push(piece)
        assert text.startswith(shown)
        if stream.stopped:
            break
    shown += stream.finish()
    assert shown == reference(text, stops)
    assert stream.stopped == any(stop in text for stop in stops)


def test_the_beginning_of_a_stop_string_is_held_back_until_it_is_none() -> None:
    stream = TextStream(["<end>"])
    assert stream.push(b"a<e") == "a"
    assert stream.push(b"n") == ""
    assert stream.push(b"!") == "<en!"
    assert stream.push(b"<end") == ""
    assert stream.finish() == "<end"


@pytest.mark.parametrize("split", range(1, 4))
def test_an_emoji_is_shown_when_its_last_byte_is_there(split: int) -> None:
    stream = TextStream()
    data = "\U0001f600".encode()
    assert stream.push(data[:split]) == ""
    assert stream.push(data[split:]) == "\U0001f600"


def test_an_unfinished_character_at_the_end_is_dropped() -> None:
    stream = TextStream()
    assert stream.push("ok\U0001f600".encode()[:-1]) + stream.finish() == "ok"
