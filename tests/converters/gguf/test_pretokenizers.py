"""Every row of the table against llama.cpp: a tokenizer with exactly these steps gives the same ids there."""

from __future__ import annotations

import functools
import json
import random
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from edgeq.converters.gguf.pretokenizers import ROWS, PreTokenizer, recognise
from edgeq.converters.gguf.tokenizer import NASTY_TEXT, check_tokenizer
from edgeq.converters.gguf.tokenizer_bpe import byte_alphabet
from edgeq.converters.gguf.tokenizer_files import Step
from edgeq.errors import UnsupportedModelError
from edgeq.llama import Model

CASES = [(row, index) for row in ROWS for index in range(len(row.spellings))]
IDS = [f"{row.name}-{index}" for row, index in CASES]


def node(row: PreTokenizer, spelling: int, *, inverted: bool = False) -> dict[str, Any]:
    """The pre_tokenizer of tokenizer.json with the steps of a row."""
    behaviour = {"behavior": "Removed", "invert": True} if inverted else {"behavior": "Isolated", "invert": False}
    steps: list[dict[str, Any]] = []
    for kind, value in row.spellings[spelling]:
        if kind == "split":
            steps.append({"type": "Split", "pattern": {"Regex": value}, **behaviour})
        elif kind == "digits":
            steps.append({"type": "Digits", "individual_digits": value == "individual"})
        else:
            regex = value == "regex"
            steps.append({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": regex})
    return {"type": "Sequence", "pretokenizers": steps} if len(steps) > 1 else steps[0]


@pytest.mark.parametrize(("row", "spelling"), CASES, ids=IDS)
def test_trained_tokenizer_gives_the_same_ids(
    row: PreTokenizer,
    spelling: int,
    tmp_path: Path,
    train_byte_level: Callable[..., int],
    make_vocabulary_gguf: Callable[..., Any],
) -> None:
    inverted = spelling == 0 and row.spellings[0][0][0] == "split"
    structure = node(row, spelling, inverted=inverted)
    n_vocab = train_byte_level(tmp_path, structure, ignore_merges=row.ignore_merges)
    spec = make_vocabulary_gguf(tmp_path, tmp_path / "v.gguf", n_vocab=n_vocab)
    assert spec.pre == row.name
    check_tokenizer(tmp_path / "v.gguf", tmp_path)


@functools.cache
def _pairs() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary of all pairs of bytes in random order: any cut at another place changes the ids around it."""
    alphabet = byte_alphabet()
    pairs = [(left, right) for left in alphabet for right in alphabet]
    random.Random(0).shuffle(pairs)
    tokens = [*alphabet, *(left + right for left, right in pairs), "<|end|>"]
    return {text: index for index, text in enumerate(tokens)}, pairs


@pytest.fixture(scope="module")
def pair_tokenizers(
    tmp_path_factory: pytest.TempPathFactory, make_vocabulary_gguf: Callable[..., Any]
) -> Iterator[Callable[[PreTokenizer], tuple[Tokenizer, Model]]]:
    models: list[Model] = []

    @functools.cache
    def make(row: PreTokenizer) -> tuple[Tokenizer, Model]:
        vocabulary, pairs = _pairs()
        folder = tmp_path_factory.mktemp("pairs")
        model = {"type": "BPE", "vocab": vocabulary, "merges": pairs, "ignore_merges": row.ignore_merges}
        document = {"version": "1.0", "added_tokens": [], "pre_tokenizer": node(row, 0), "model": model}
        (folder / "tokenizer.json").write_text(json.dumps(document))
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
        make_vocabulary_gguf(folder, folder / "v.gguf", n_vocab=len(vocabulary))
        models.append(Model.load(folder / "v.gguf", vocab_only=True))
        return Tokenizer.from_file(str(folder / "tokenizer.json")), models[-1]

    yield make
    for model in models:
        model.close()


# Left out: what NFC changes, and what is no assigned character, since the tables of the two libraries are of different
# Unicode versions.
CHARACTERS = [
    chr(code)
    for code in (*range(1, 0xD800), *range(0xE000, 0x12000), *range(0x1D400, 0x1D800), *range(0x1F000, 0x1FA00))
    if unicodedata.is_normalized("NFC", chr(code)) and unicodedata.category(chr(code)) != "Cn"
]
TEXTS = st.lists(
    st.one_of(
        st.sampled_from(CHARACTERS),
        st.sampled_from([" ", "  ", "\n", "\r\n", "\t", "a", "Bc", "12", "3456", "'s", "'LL", "I've", "!?", "//", "_"]),
    ),
    max_size=30,
).map("".join)


def _is_plain(character: str) -> bool:
    """No mark, and no letter outside of ASCII that has a case."""
    category = unicodedata.category(character)
    return category[0] != "M" and (character.isascii() or category not in {"Lu", "Ll", "Lt"})


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_any_text_is_cut_alike(
    row: PreTokenizer, pair_tokenizers: Callable[[PreTokenizer], tuple[Tokenizer, Model]]
) -> None:
    reference, model = pair_tokenizers(row)

    @settings(max_examples=100, deadline=None)
    @given(TEXTS)
    def compare(text: str) -> None:
        text = unicodedata.normalize("NFC", text)
        if row.limit:
            text = "".join(filter(_is_plain, text))
        assert model.tokenize(text, add_special=False, parse_special=False) == reference.encode(text).ids

    compare()


@pytest.mark.parametrize("row", [row for row in ROWS if row.limit], ids=lambda row: row.name)
@pytest.mark.parametrize("text", ["aÀaÂaÅaÉaÌaÓaÚaÝaЖaЯaΩaŁaŠaŻ", "नमस्ते दुनिया हिन्दी"])
def test_documented_limits_are_real(
    row: PreTokenizer, text: str, pair_tokenizers: Callable[[PreTokenizer], tuple[Tokenizer, Model]]
) -> None:
    reference, model = pair_tokenizers(row)
    assert model.tokenize(text, add_special=False, parse_special=False) != reference.encode(text).ids


def test_a_wrong_row_would_be_noticed(
    pair_tokenizers: Callable[[PreTokenizer], tuple[Tokenizer, Model]],
) -> None:
    rows = {row.name: row for row in ROWS}
    qwen2 = pair_tokenizers(rows["qwen2"])[0].encode(NASTY_TEXT).ids
    for other in ("gpt-2", "smollm", "llama-bpe", "gpt-4o"):
        assert pair_tokenizers(rows[other])[1].tokenize(NASTY_TEXT, add_special=False, parse_special=False) != qwen2


def recognised(structure: dict[str, Any] | None, *, ignore_merges: bool = False, reach: bool = False) -> str:
    step = None if structure is None else msgspec.convert(structure, Step)
    return recognise(step, ignore_merges=ignore_merges, merges_reach_all=lambda: reach).name


def test_ignore_merges_tells_rows_apart_unless_merges_reach_every_token() -> None:
    rows = {row.name: row for row in ROWS}
    llama3, qwen2 = node(rows["llama-bpe"], 0), node(rows["qwen2"], 0)
    assert recognised(llama3, ignore_merges=True) == "llama-bpe"
    assert recognised(llama3) == "dbrx"
    with pytest.raises(UnsupportedModelError, match="ignore_merges=true"):
        recognised(qwen2, ignore_merges=True)
    assert recognised(qwen2, ignore_merges=True, reach=True) == "qwen2"


@pytest.mark.parametrize(
    ("structure", "named"),
    [
        (None, "nothing"),
        ({"type": "Whitespace"}, "Whitespace"),
        ({"type": "Split", "pattern": {"Regex": "[a-z]+"}, "behavior": "Isolated", "invert": False}, r"\[a-z\]\+"),
        ({"type": "Split", "pattern": {"String": "-"}, "behavior": "Removed", "invert": False}, "Removed"),
        ({"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}, "prefix space"),
        ({"type": "Sequence", "pretokenizers": [{"type": "Digits"}, {"type": "ByteLevel"}]}, "runs"),
    ],
)
def test_unknown_structures_are_named(structure: dict[str, Any] | None, named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named) as caught:
        recognised(structure)
    assert "--llama-cpp" in str(caught.value)
