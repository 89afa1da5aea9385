from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeq.converters.calibration import texts
from edgeq.converters.calibration.texts import builtin_text, file_text
from edgeq.errors import SessionError, UsageError
from edgeq.llama import Model


def _ids(model_gguf: Path, text: str) -> list[int]:
    with Model.load(model_gguf, vocab_only=True) as model:
        return model.tokenize(text, add_special=False, parse_special=False)


def _text(model_gguf: Path, tokens: list[int]) -> str:
    with Model.load(model_gguf, vocab_only=True) as model:
        return b"".join(model.token_bytes(token) for token in tokens).decode()


def test_a_file_is_cut_into_chunks_without_loss(smollm2_gguf: Path, tmp_path: Path) -> None:
    text = "The gripper closes around the handle and lifts it. " * 40
    path = tmp_path / "calibration.txt"
    path.write_text(text)
    found = file_text(smollm2_gguf, path, chunk_tokens=64, max_tokens=10_000, min_tokens=100)
    ids = _ids(smollm2_gguf, text)
    assert [token for chunk in found.chunks for token in chunk.tolist()] == ids
    assert {len(chunk) for chunk in found.chunks[:-1]} == {64}
    assert {chunk.dtype for chunk in found.chunks} == {np.dtype(np.int32)}
    assert (found.n_tokens, found.source, found.name, found.seed) == (len(ids), "file", "calibration.txt", None)
    assert found.warnings == ()
    limited = file_text(smollm2_gguf, path, chunk_tokens=64, max_tokens=100, min_tokens=100)
    assert [len(chunk) for chunk in limited.chunks] == [64, 36]


def test_chunks_begin_with_bos_where_the_model_wants_one(
    smollm2_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("one two three four " * 50)
    plain = file_text(smollm2_gguf, tmp_path / "a.txt", chunk_tokens=32, max_tokens=999, min_tokens=1)
    load = Model.load

    def wants_bos(path: Path, *, vocab_only: bool) -> Model:
        model = load(path, vocab_only=vocab_only)
        model.add_bos, model.bos = True, 7
        return model

    monkeypatch.setattr(Model, "load", wants_bos)
    found = file_text(smollm2_gguf, tmp_path / "a.txt", chunk_tokens=32, max_tokens=999, min_tokens=1)
    assert {int(chunk[0]) for chunk in found.chunks} == {7}
    assert max(map(len, found.chunks)) == 32
    assert [t for chunk in found.chunks for t in chunk[1:].tolist()][:100] == plain_tokens(plain)[:100]


def plain_tokens(text: texts.TokenText) -> list[int]:
    return [token for chunk in text.chunks for token in chunk.tolist()]


def test_a_text_that_is_too_short_is_refused_with_figures(smollm2_gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("The gripper closes. " * 10)
    n_tokens = len(_ids(smollm2_gguf, path.read_text()))
    with pytest.raises(UsageError, match=rf"gives {n_tokens} tokens, and 5000 are needed\. Give a text of about \d+"):
        file_text(smollm2_gguf, path, chunk_tokens=64, max_tokens=9000, min_tokens=5000)
    path.write_text("")
    with pytest.raises(UsageError, match="gives 0 tokens"):
        file_text(smollm2_gguf, path, chunk_tokens=64, max_tokens=9000, min_tokens=1)


def test_what_is_no_text_is_refused(smollm2_gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("Straße".encode("latin-1") * 100)
    with pytest.raises(UsageError, match=r"is not UTF-8 \(byte 4 is 0xdf\)"):
        file_text(smollm2_gguf, tmp_path / "latin.txt", chunk_tokens=64, max_tokens=999, min_tokens=1)
    with pytest.raises(UsageError, match="No such file"):
        file_text(smollm2_gguf, tmp_path / "none.txt", chunk_tokens=64, max_tokens=999, min_tokens=1)
    with pytest.raises(UsageError, match="Is a directory"):
        file_text(smollm2_gguf, tmp_path, chunk_tokens=64, max_tokens=999, min_tokens=1)
    with pytest.raises(UsageError, match="is no regular file"):
        file_text(smollm2_gguf, Path("/dev/zero"), chunk_tokens=64, max_tokens=999, min_tokens=1)
    (tmp_path / "zeros.txt").write_bytes(b"text" + bytes(1000))
    with pytest.raises(UsageError, match=r"zeros.txt is no text \(byte 4 is 0x00\)"):
        file_text(smollm2_gguf, tmp_path / "zeros.txt", chunk_tokens=64, max_tokens=999, min_tokens=1)
    (tmp_path / "ok.txt").write_text("text")
    with pytest.raises(SessionError, match="does not exist"):
        file_text(tmp_path / "none.gguf", tmp_path / "ok.txt", chunk_tokens=64, max_tokens=999, min_tokens=1)


@pytest.mark.parametrize("shift", range(4))
def test_a_long_file_is_read_as_far_as_needed(smollm2_gguf: Path, tmp_path: Path, shift: int) -> None:
    path = tmp_path / "long.txt"
    path.write_text("a" * shift + "\N{ROBOT FACE}" * 1000)  # four bytes each: the limit falls inside of one
    found = file_text(smollm2_gguf, path, chunk_tokens=64, max_tokens=20, min_tokens=20)
    assert found.n_tokens == 20
    assert len(texts._read(path, 20 * 32).encode()) in range(20 * 32 - 3, 20 * 32 + 2)


@pytest.mark.parametrize(
    ("text", "known"),
    [
        ("The robot waits in front of the door until it opens. ", True),
        ("for i in range(10):\n    total += values[i]\n", True),
        ("今日は天気がいいですね。你好世界。", False),
        ("ꙮ꙯Ꙛꙛ ꚤꚥꚦ ", False),
    ],
)
def test_a_language_that_the_tokenizer_spells_is_warned_of(
    smollm2_gguf: Path, tmp_path: Path, text: str, known: bool
) -> None:
    path = tmp_path / "text.txt"
    path.write_text(text * 50)
    found = file_text(smollm2_gguf, path, chunk_tokens=64, max_tokens=99_999, min_tokens=1)
    assert (found.warnings == ()) is known
    if not known:
        ids = _ids(smollm2_gguf, text * 50)
        assert f"{len((text * 50).encode()) / len(ids):.2f} bytes a token" in found.warnings[0]


def test_the_builtin_text_has_disjoint_halves(smollm2_gguf: Path) -> None:
    halves = {
        (split, seed): builtin_text(
            smollm2_gguf, chunk_tokens=128, max_tokens=1_000_000, min_tokens=30_000, seed=seed, split=split
        )
        for split in ("select", "judge")
        for seed in (0, 1)
    }
    # A paragraph belongs to one half: their longer lines have nothing in common.
    lines = {
        split: {line for line in _text(smollm2_gguf, plain_tokens(halves[split, 0])).splitlines() if len(line) > 50}
        for split in ("select", "judge")
    }
    assert min(map(len, lines.values())) > 300
    assert len(lines["select"] & lines["judge"]) <= 2
    for split in ("select", "judge"):
        first, second = halves[split, 0], halves[split, 1]
        assert sorted(plain_tokens(first)) == sorted(plain_tokens(second)), "the seed orders, the split chooses"
        assert plain_tokens(first) != plain_tokens(second)
        assert first.text_sha256 != second.text_sha256
        assert first.split == split
    sizes = [text.n_tokens for text in halves.values()]
    assert max(sizes) < 1.1 * min(sizes)


def test_the_builtin_text_is_the_same_every_time_and_mixes_documents(smollm2_gguf: Path) -> None:
    first, again = (builtin_text(smollm2_gguf, chunk_tokens=64, max_tokens=1000, seed=4) for _ in range(2))
    assert plain_tokens(first) == plain_tokens(again)
    assert first.text_sha256 == again.text_sha256
    assert first.n_tokens == 1000
    assert first.source == "builtin"
    assert first.seed == 4
    # The first chunks are beginnings of different sections: most have a heading underlined.
    beginnings = [_text(smollm2_gguf, chunk.tolist()) for chunk in first.chunks[:10]]
    assert sum("***\n" in text or "===\n" in text for text in beginnings) >= 6


def test_a_python_without_the_text_is_told_so(smollm2_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(UsageError, match=r"without pydoc_data.topics.*--eval-text"):
        builtin_text(smollm2_gguf, chunk_tokens=64, max_tokens=100)


def test_too_much_is_refused(smollm2_gguf: Path) -> None:
    with pytest.raises(UsageError, match=r"gives \d+ tokens, and 1000000 are needed"):
        builtin_text(smollm2_gguf, chunk_tokens=64, max_tokens=10**7, min_tokens=10**6)


@given(st.lists(st.integers(1, 60), max_size=20), st.integers(1, 300))
def test_the_limit_is_exact(lengths: list[int], limit: int) -> None:
    chunks = [np.full(n, i, np.int32) for i, n in enumerate(lengths)]
    taken = texts._limit(chunks, limit)
    assert sum(map(len, taken)) == min(limit, sum(lengths))
    assert all(len(chunk) > 0 for chunk in taken)
    assert [int(chunk[0]) for chunk in taken] == list(range(len(taken)))


def test_calibration_wants_as_many_tokens_as_were_asked_for_up_to_2048(smollm2_gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    path.write_text(" ".join(f"{n} doors" for n in range(350)))
    n_tokens = len(_ids(smollm2_gguf, path.read_text()))
    assert 1000 < n_tokens < 2048
    found = texts.calibration_text(smollm2_gguf, path, max_tokens=1000)
    assert (found.n_tokens, {len(chunk) for chunk in found.chunks[:-1]}) == (1000, {256})
    with pytest.raises(UsageError, match=rf"gives {n_tokens} tokens, and 2048 are needed"):
        texts.calibration_text(smollm2_gguf, path, max_tokens=10_240)
