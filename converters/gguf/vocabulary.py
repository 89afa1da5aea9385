"""What the readers of byte-level BPE and of SentencePiece share: pieces, added tokens, a table without holes."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping, Sequence

from edgeq.errors import SourceError

__all__ = ["AddedToken", "Piece", "TokenType", "Vocabulary", "added_pieces", "fill", "strips_like_phi3"]

# The tokens that llama.cpp leaves alone when it drops spaces after the special tokens of Phi-3 (llama-vocab.cpp).
_PHI3_PLAIN = frozenset({"<unk>", "<s>", "<|endoftext|>"})
# Filler is never produced by text; a score below every real one keeps it out of SentencePiece merges as well.
_FILLER_SCORE = -1e9


class TokenType(enum.IntEnum):
    """``tokenizer.ggml.token_type``, as `gguf.TokenType` numbers it."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclasses.dataclass(frozen=True)
class Piece:
    """One row of the vocabulary.

    Attributes:
        text: as GGUF spells it: byte-level for BPE, ``▁`` for a space in SentencePiece, plain for added tokens.
        type: how llama.cpp treats it.
        score: priority of the merge that makes it, higher first; only SentencePiece uses it.
    """

    text: str
    type: TokenType
    score: float = 0.0


@dataclasses.dataclass(frozen=True)
class AddedToken:
    """A token that is cut out of the text before anything else happens, as `tokenizers.AddedToken`."""

    id: int
    content: str
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """A vocabulary as one of the readers found it.

    Attributes:
        model: ``"gpt2"`` or ``"llama"``, the value of ``tokenizer.ggml.model``.
        pre: the value of ``tokenizer.ggml.pre``.
        pieces: by id; may have holes.
        merges: ``"left right"`` in order of priority; None for SentencePiece, which goes by scores.
        added: the tokens that are cut out first.
        space_prefix: None for BPE; for SentencePiece when a space is put before text: ``"never"``, ``"first"`` (only
            at the very start), ``"always"`` (after each added token too, unless there is a space already) or
            ``"prepend"`` (after each added token too, whatever follows).
        unk_id: of the unknown token, None without one.
        notes: what differs from Hugging Face, one line each.
    """

    model: str
    pre: str
    pieces: Mapping[int, Piece]
    merges: tuple[str, ...] | None
    added: tuple[AddedToken, ...]
    space_prefix: str | None = None
    unk_id: int | None = None
    notes: tuple[str, ...] = ()


def added_pieces(added: Sequence[AddedToken]) -> dict[int, Piece]:
    """Rows for added tokens: special ones are control tokens, the others user-defined."""
    kinds = {True: TokenType.CONTROL, False: TokenType.USER_DEFINED}
    return {token.id: Piece(token.content, kinds[token.special], _FILLER_SCORE) for token in added}


def strips_like_phi3(added: Sequence[AddedToken]) -> bool:
    """Whether spaces are dropped after exactly those tokens after which llama.cpp drops them in models named Phi-3."""
    if not {token.content for token in added} >= _PHI3_PLAIN | {"</s>"}:
        return False
    return all(token.rstrip is (token.content not in _PHI3_PLAIN) and not token.lstrip for token in added)


def fill(pieces: Mapping[int, Piece], n_vocab: int) -> list[Piece]:
    """Rows 0 to ``n_vocab - 1``, holes and the end filled with unused tokens.

    Raises:
        SourceError: an id outside of the embedding, one text with two ids (llama.cpp would abort), or broken Unicode.
    """
    for index, piece in pieces.items():
        if not 0 <= index < n_vocab:
            raise SourceError(
                f"the tokenizer gives {piece.text!r} the id {index}, but the embedding has {n_vocab} rows",
                "Use the tokenizer that the model was trained with, or resize the model's embedding and save it again",
            )
    seen: dict[str, int] = {}
    for index, piece in pieces.items():
        if piece.text in seen:
            raise SourceError(
                f"the tokenizer has {piece.text!r} twice, as {seen[piece.text]} and {index}",
                "Remove one of the two from the tokenizer files",
            )
        seen[piece.text] = index
    try:
        "".join(seen).encode("utf-8")
    except UnicodeEncodeError as error:
        raise SourceError(
            f"a token of the tokenizer is no valid Unicode ({error.reason})", "Get the tokenizer files again"
        ) from None
    return [pieces[index] if index in pieces else _filler(index, seen) for index in range(n_vocab)]


def _filler(index: int, taken: Mapping[str, int]) -> Piece:
    text = f"[PAD{index}]"
    while text in taken:
        text = f"[{text}]"
    return Piece(text, TokenType.UNUSED, _FILLER_SCORE)
