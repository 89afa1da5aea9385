"""Byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM, …) as llama.cpp's tokenizer model ``gpt2``."""

from __future__ import annotations

from collections.abc import Mapping

from edgeq.converters.gguf.pretokenizers import recognise
from edgeq.converters.gguf.tokenizer_files import BpeModel, Step, TokenizerFiles, TokenizerJson
from edgeq.converters.gguf.vocabulary import AddedToken, Piece, TokenType, Vocabulary, added_pieces
from edgeq.errors import SourceError, UnsupportedModelError, require_package

__all__ = ["byte_alphabet", "is_byte_level", "read_byte_level"]

_OTHER_WAY = "Bring an F16 GGUF of the model, or pass --llama-cpp DIR to use the converter of a llama.cpp checkout"
# Bytes that occur in no valid UTF-8 text (RFC 3629), so that no tokenizer needs a token for them.
_NEVER_IN_UTF8 = frozenset({0xC0, 0xC1, *range(0xF5, 0x100)})


def byte_alphabet() -> list[str]:
    """The character that stands for each byte 0 to 255 in byte-level BPE.

    Printable Latin-1 stands for itself, the rest for the characters from U+0100 on: GPT-2's ``bytes_to_unicode``.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def is_byte_level(document: TokenizerJson) -> bool:
    """Whether the pre-tokenizer of a tokenizer.json turns text into byte characters."""
    node = document.pre_tokenizer
    return node is not None and any(step.type == "ByteLevel" for step in node.flat())


def read_byte_level(files: TokenizerFiles, document: TokenizerJson, model: BpeModel) -> Vocabulary:
    """The vocabulary of a byte-level tokenizer.json.

    Raises:
        UnsupportedModelError: something that llama.cpp does not do: a normalizer other than NFC, unknown cuts, a prefix
            space, affixes of subwords.
        SourceError: merges that make no token.
    """
    notes = _normalizer_notes(document.normalizer)
    for name, value in (
        ("continuing_subword_prefix", model.continuing_subword_prefix),
        ("end_of_word_suffix", model.end_of_word_suffix),
    ):
        if value:
            raise UnsupportedModelError(f"the tokenizer has a {name} ({value!r}), which llama.cpp ignores", _OTHER_WAY)
    added = files.added(model.vocab)
    pairs = model.pairs()
    for left, right in pairs:
        if left + right not in model.vocab or " " in left + right:
            raise SourceError(
                f"tokenizer.json merges {left!r} and {right!r} to {left + right!r}, which is no token",
                "Get the tokenizer files again",
            )
    row = recognise(
        document.pre_tokenizer,
        ignore_merges=model.ignore_merges,
        merges_reach_all=lambda: _merges_reach_all(model.vocab, pairs, added),
    )
    missing = [b for b, char in enumerate(byte_alphabet()) if char not in model.vocab and b not in _NEVER_IN_UTF8]
    if missing:
        notes.append(f"the tokenizer has no token for {len(missing)} of the bytes of UTF-8; such text is dropped")
    if row.limit:
        notes.append(row.limit)
    pieces = {index: Piece(text, TokenType.NORMAL) for text, index in model.vocab.items()}
    pieces.update(added_pieces(added))
    return Vocabulary(
        model="gpt2",
        pre=row.name,
        pieces=pieces,
        merges=tuple(f"{left} {right}" for left, right in pairs),
        added=added,
        unk_id=None if model.unk_token is None else model.vocab.get(model.unk_token),
        notes=tuple(notes),
    )


def _normalizer_notes(node: Step | None) -> list[str]:
    kinds = [step.type for step in node.flat()] if node is not None else []
    if set(kinds) - {"NFC"}:
        raise UnsupportedModelError(
            f"the tokenizer normalizes text ({', '.join(kinds)}), which llama.cpp does not", _OTHER_WAY
        )
    return (
        ["llama.cpp does not normalize text to NFC: normalize decomposed text before it is tokenized"] if kinds else []
    )


def _merges_reach_all(
    vocabulary: Mapping[str, int], pairs: list[tuple[str, str]], added: tuple[AddedToken, ...]
) -> bool:
    """Whether every token is what its merges make of its characters; `tokenizers` does the merging."""
    tokenizers = require_package("tokenizers", "convert", "to read tokenizers")
    special = {token.content for token in added}
    texts = [text for text in vocabulary if text not in special]
    bare = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=dict(vocabulary), merges=pairs))
    return all(len(encoding.ids) == 1 for encoding in bare.encode_batch(texts))
