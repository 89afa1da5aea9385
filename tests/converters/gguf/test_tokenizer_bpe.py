"""Byte-level BPE: the real SmolLM2 tokenizer, and what the reader refuses."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers

from edgeq.converters.gguf.tokenizer import NASTY_TEXT, check_tokenizer, read_tokenizer
from edgeq.converters.gguf.tokenizer_bpe import byte_alphabet
from edgeq.errors import SourceError, UnsupportedModelError
from edgeq.llama import Model

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}

Train = Callable[..., int]
Make = Callable[..., Any]


@pytest.fixture(scope="module")
def smollm2_folder(tmp_path_factory: pytest.TempPathFactory, smollm2_gguf: Path) -> Path:
    """SmolLM2's own vocabulary, merges and template as a Hugging Face folder without weights."""
    folder = tmp_path_factory.mktemp("smollm2")
    fields = GGUFReader(smollm2_gguf).fields
    tokens, kinds, merges, template = (
        fields[f"tokenizer.{key}"].contents()
        for key in ("ggml.tokens", "ggml.token_type", "ggml.merges", "chat_template")
    )
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    added = [
        {"id": index, "content": text, "special": True, **flags}
        for index, (text, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind == 3
    ]
    steps = [{"type": "Digits", "individual_digits": True}, BYTES]
    document = {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "model": {"type": "BPE", "vocab": {text: index for index, text in enumerate(tokens)}, "merges": merges},
    }
    (folder / "tokenizer.json").write_text(json.dumps(document))
    config = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    return folder


@pytest.fixture(scope="module")
def smollm2(smollm2_folder: Path, make_vocabulary_gguf: Make) -> tuple[Path, Any]:
    path = smollm2_folder / "v.gguf"
    return path, make_vocabulary_gguf(smollm2_folder, path, n_vocab=49152)


def test_smollm2_equals_hugging_face_and_the_published_gguf(
    smollm2: tuple[Path, Any], smollm2_folder: Path, smollm2_gguf: Path
) -> None:
    path, spec = smollm2
    assert (spec.model, spec.pre, spec.add_bos, spec.add_eos) == ("gpt2", "smollm", False, False)
    assert {role: spec.special_ids[role] for role in ("bos", "eos", "pad")} == {"bos": 1, "eos": 2, "pad": 2}
    check_tokenizer(path, smollm2_folder)
    with Model.load(path, vocab_only=True) as ours, Model.load(smollm2_gguf, vocab_only=True) as published:
        assert (ours.bos, ours.eos, ours.add_bos) == (published.bos, published.eos, published.add_bos)
        assert ours.chat_template == published.chat_template
        for text in (NASTY_TEXT, "<|im_start|>user\nHi<|im_end|>\n"):
            ids = ours.tokenize(text, add_special=True, parse_special=True)
            assert ids == published.tokenize(text, add_special=True, parse_special=True)
        eog = [index for index in range(ours.n_vocab) if ours.is_eog(index)]
        assert eog == [index for index in range(ours.n_vocab) if published.is_eog(index)]


def test_any_text_gives_the_same_ids(smollm2: tuple[Path, Any], smollm2_folder: Path) -> None:
    reference = Tokenizer.from_file(str(smollm2_folder / "tokenizer.json"))
    # Unassigned characters are left out: the libraries' Unicode tables are of different versions.
    # Its vocabulary lacks some bytes: Hugging Face merges across such a hole, llama.cpp does not.
    holes = [chr(code) for code in range(128) if not reference.encode(chr(code)).ids]
    assert "\x06" in holes
    alphabet = st.characters(exclude_categories=["Cs", "Cn", "Co"], exclude_characters=holes)
    pieces = st.one_of(st.text(alphabet), st.sampled_from([" ", "\n", "<|im_end|>", "12", "don't", "<|im_"]))
    with Model.load(smollm2[0], vocab_only=True) as model:

        @settings(max_examples=300, deadline=None)
        @given(st.lists(pieces, max_size=8))
        def compare(parts: list[str]) -> None:
            text = unicodedata.normalize("NFC", "".join(parts))
            ids = model.tokenize(text, add_special=False, parse_special=True)
            assert ids == reference.encode(text).ids

        compare()


def test_byte_alphabet_is_the_one_of_tokenizers() -> None:
    assert set(byte_alphabet()) == set(pre_tokenizers.ByteLevel.alphabet())
    pre = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for text in ("a", " ", "\n", "\u00e9", "\U0001f642"):
        expected = "".join(byte_alphabet()[byte] for byte in text.encode())
        assert "".join(part for part, _ in pre.pre_tokenize_str(text)) == expected


def change(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads((folder / "tokenizer.json").read_text())
    edit(document)
    (folder / "tokenizer.json").write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda d: d.update(normalizer={"type": "Lowercase"}), "Lowercase"),
        (lambda d: d.update(normalizer={"type": "Sequence", "normalizers": [{"type": "NFKC"}]}), "NFKC"),
        (lambda d: d["model"].update(end_of_word_suffix="</w>"), "end_of_word_suffix"),
        (lambda d: d["model"].update(continuing_subword_prefix="##"), "continuing_subword_prefix"),
        (lambda d: d["pre_tokenizer"].update(add_prefix_space=True), "prefix space"),
        (lambda d: d["model"].update(type="WordPiece"), "WordPiece"),
        (lambda d: d["model"].update(type="Unigram", vocab=[["a", 0.5]]), "Unigram"),
        (lambda d: d.update(model={"vocab": {"a": 0}, "unk_token": "a"}), "of type unknown"),
    ],
)
def test_what_llama_cpp_cannot_follow_is_refused(
    tmp_path: Path, train_byte_level: Train, edit: Callable[[dict[str, Any]], object], named: str
) -> None:
    n_vocab = train_byte_level(tmp_path, BYTES)
    change(tmp_path, edit)
    with pytest.raises(UnsupportedModelError, match=named) as caught:
        read_tokenizer(tmp_path, n_vocab=n_vocab, architecture="llama")
    assert "--llama-cpp" in caught.value.remedy


@pytest.mark.parametrize("merge", [["qq", "zz"], "q q q", "qqzz"])
def test_merges_that_make_no_token_are_refused(tmp_path: Path, train_byte_level: Train, merge: object) -> None:
    n_vocab = train_byte_level(tmp_path, BYTES)
    change(tmp_path, lambda d: d["model"]["merges"].append(merge))
    with pytest.raises(SourceError, match="merge"):
        read_tokenizer(tmp_path, n_vocab=n_vocab, architecture="llama")


def test_ignore_merges_does_not_matter_where_merges_reach_every_token(tmp_path: Path, train_byte_level: Train) -> None:
    n_vocab = train_byte_level(tmp_path, BYTES, ignore_merges=True)
    assert read_tokenizer(tmp_path, n_vocab=n_vocab, architecture="llama").pre == "gpt-2"
    change(tmp_path, lambda d: d["model"]["vocab"].update(qzqzq=n_vocab))
    with pytest.raises(UnsupportedModelError, match="ignore_merges=true"):
        read_tokenizer(tmp_path, n_vocab=n_vocab + 1, architecture="llama")


def test_nfc_is_noted_and_decomposed_text_really_differs(
    tmp_path: Path, train_byte_level: Train, make_vocabulary_gguf: Make
) -> None:
    n_vocab = train_byte_level(tmp_path, BYTES)
    change(tmp_path, lambda d: d.update(normalizer={"type": "NFC"}))
    spec = make_vocabulary_gguf(tmp_path, tmp_path / "v.gguf", n_vocab=n_vocab)
    assert any("NFC" in note for note in spec.notes)
    check_tokenizer(tmp_path / "v.gguf", tmp_path)
    decomposed = unicodedata.normalize("NFD", "caf\u00e9")
    reference = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    with Model.load(tmp_path / "v.gguf", vocab_only=True) as model:
        ids = model.tokenize(decomposed, add_special=False, parse_special=False)
    assert ids != reference.encode(decomposed).ids


def test_missing_bytes_are_noted(tmp_path: Path, train_byte_level: Train) -> None:
    n_vocab = train_byte_level(tmp_path, BYTES)
    change(tmp_path, lambda d: d["model"]["vocab"].pop(byte_alphabet()[1]))
    notes = read_tokenizer(tmp_path, n_vocab=n_vocab, architecture="llama").notes
    assert any("1 of the bytes" in note for note in notes)
