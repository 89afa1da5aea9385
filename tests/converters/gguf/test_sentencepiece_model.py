"""The protobuf reader against the sentencepiece package, and against files that are none."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeq.converters.gguf.sentencepiece_model import read_sentencepiece
from edgeq.converters.gguf.vocabulary import TokenType
from edgeq.errors import SourceError

LINES = ["the robot moves its arm to the left", "the arm of the robot moved", "left and right and left again"] * 4


def train(**options: Any) -> bytes:
    model = io.BytesIO()
    settings_: dict[str, Any] = {"vocab_size": 300, "model_type": "bpe", "byte_fallback": True, "minloglevel": 5}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=model, hard_vocab_limit=False, **(settings_ | options)
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def data() -> bytes:
    return train(user_defined_symbols=["<tool>"], control_symbols=["<turn>"], pad_id=3)


def test_pieces_scores_and_types_equal_the_packages(data: bytes) -> None:
    ours = read_sentencepiece(data)
    oracle = sentencepiece.SentencePieceProcessor(model_proto=data)
    assert [piece.text for piece in ours.pieces] == [oracle.IdToPiece(i) for i in range(oracle.vocab_size())]
    assert [piece.score for piece in ours.pieces] == [oracle.GetScore(i) for i in range(oracle.vocab_size())]
    kinds = {"BYTE": oracle.IsByte, "CONTROL": oracle.IsControl, "UNKNOWN": oracle.IsUnknown, "UNUSED": oracle.IsUnused}
    for name, predicate in kinds.items():
        expected = {i for i in range(oracle.vocab_size()) if predicate(i)}
        assert {i for i, piece in enumerate(ours.pieces) if piece.type is TokenType[name]} == expected
    assert [p.text for p in ours.pieces if p.type is TokenType.USER_DEFINED] == ["<tool>"]
    roles = (oracle.unk_id(), oracle.bos_id(), oracle.eos_id(), oracle.pad_id())
    assert (ours.unk_id, ours.bos_id, ours.eos_id, ours.pad_id) == roles
    assert ours.type == "BPE"


@pytest.mark.parametrize("identity", [True, False])
@pytest.mark.parametrize("flag", [True, False])
def test_settings_are_read(*, flag: bool, identity: bool) -> None:
    model = read_sentencepiece(
        train(
            add_dummy_prefix=flag,
            remove_extra_whitespaces=not flag,
            treat_whitespace_as_suffix=flag,
            normalization_rule_name="identity" if identity else "nmt_nfkc",
            bos_id=-1,
            unk_id=0,
            eos_id=1,
        )
    )
    assert (model.add_dummy_prefix, model.remove_extra_whitespaces, model.whitespace_as_suffix) == (
        flag,
        not flag,
        flag,
    )
    assert model.normalizes is not identity
    assert (model.bos_id, model.eos_id, model.pad_id) == (None, 1, None)


def test_unigram_is_recognised() -> None:
    assert read_sentencepiece(train(model_type="unigram", byte_fallback=False, vocab_size=40)).type == "Unigram"


@settings(max_examples=200, deadline=None)
@given(cut=st.floats(0, 1), junk=st.binary(max_size=8))
def test_truncated_or_altered_files_give_one_line(data: bytes, cut: float, junk: bytes) -> None:
    at = int(cut * (len(data) - 1))
    # A cut between two fields leaves a shorter but well-formed message; nothing but SourceError may come of the others.
    with contextlib.suppress(SourceError):
        assert read_sentencepiece(data[:at] + junk).pieces


@pytest.mark.parametrize(
    "junk", [b"", b"\xff" * 40, b'{"version": "1.0"}', b"version https://git-lfs.github.com/spec/v1"]
)
def test_other_files_are_refused(junk: bytes) -> None:
    with pytest.raises(SourceError, match=r"tokenizer\.model"):
        read_sentencepiece(junk)


def test_a_length_beyond_the_file_is_not_allocated(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="truncated"):
        read_sentencepiece(b"\x0a\xff\xff\xff\xff\x7f" + bytes(10))
