"""SentencePiece BPE (Llama 2, TinyLlama, Mistral, Phi-3, Gemma) as llama.cpp's tokenizer model ``llama``.

llama.cpp merges whichever neighbours form the token with the highest score. Hugging Face's tokenizer.json has merges
in order of priority instead, so where only that exists the score of a token is the negated rank of the merge that makes
it. The two agree as long as *every* pair of tokens that forms a token is a merge, which is checked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from edgeq.converters.gguf.sentencepiece_model import SentencePieceModel, read_sentencepiece
from edgeq.converters.gguf.tokenizer_files import BpeModel, Step, TokenizerFiles, TokenizerJson
from edgeq.converters.gguf.vocabulary import AddedToken, Piece, TokenType, Vocabulary, added_pieces
from edgeq.errors import UnsupportedModelError

__all__ = ["read_spm_json", "read_spm_model", "scores_from_merges", "space_prefix"]

_SPACE = "▁"
_BYTE_TOKENS = frozenset(f"<0x{byte:02X}>" for byte in range(256))
_OTHER_WAY = "Bring an F16 GGUF of the model, or pass --llama-cpp DIR to use the converter of a llama.cpp checkout"
_PREFIX_NOTES = {
    "always": "llama.cpp puts a space before text even if it begins with one; Hugging Face does not",
    "first": "as in Hugging Face, edgeq puts a space before the first word of a raw prompt; llama.cpp itself does not",
}


def read_spm_json(files: TokenizerFiles, document: TokenizerJson, model: BpeModel) -> Vocabulary:
    """The vocabulary of a tokenizer.json with SentencePiece-style BPE.

    Raises:
        UnsupportedModelError: no byte fallback, merges that llama.cpp would not follow, or other treatment of spaces.
    """
    vocabulary, pairs = model.vocab, model.pairs()
    if model.ignore_merges:
        raise UnsupportedModelError("the tokenizer sets ignore_merges, which llama.cpp's SPM does not", _OTHER_WAY)
    if not model.byte_fallback or not vocabulary.keys() >= _BYTE_TOKENS:
        raise UnsupportedModelError(
            "the tokenizer has no byte fallback with all 256 byte tokens, without which llama.cpp ends the process on "
            "an unknown character",
            _OTHER_WAY,
        )
    prefix = space_prefix(document, pairs)
    added = files.added(vocabulary)
    fixed = {token.content for token in added} | _BYTE_TOKENS
    _check_closed(vocabulary, pairs, fixed)
    scores = scores_from_merges(pairs)
    unmerged = -float(len(pairs) + 1)
    pieces = {
        index: Piece(text, TokenType.BYTE if text in _BYTE_TOKENS else TokenType.NORMAL, scores.get(text, unmerged))
        for text, index in vocabulary.items()
    }
    pieces |= {
        index: piece
        for index, piece in added_pieces([_in_raw_text(token) for token in added]).items()
        if piece.type is TokenType.CONTROL or not _made_by_merges(piece.text, scores)
    }
    unk_id = None if model.unk_token is None else vocabulary.get(model.unk_token)
    if unk_id is not None:
        pieces[unk_id] = Piece(pieces[unk_id].text, TokenType.UNKNOWN, unmerged)
    return _vocabulary(pieces, added, prefix, unk_id)


def _vocabulary(
    pieces: Mapping[int, Piece], added: tuple[AddedToken, ...], prefix: str, unk_id: int | None
) -> Vocabulary:
    return Vocabulary(
        model="llama",
        pre="default",
        pieces=pieces,
        merges=None,
        added=added,
        space_prefix=prefix,
        unk_id=unk_id,
        notes=(_PREFIX_NOTES[prefix],) if prefix in _PREFIX_NOTES else (),
    )


def _in_raw_text(token: AddedToken) -> AddedToken:
    """The token as llama.cpp must search it: before spaces become ``▁``, while Hugging Face looks after that."""
    if token.special or not token.normalized:
        return token
    return dataclasses.replace(token, content=token.content.replace(_SPACE, " "))


def _made_by_merges(text: str, scores: Mapping[str, float]) -> bool:
    """Whether an added token is a run of spaces (Gemma) that only merges ever make of real spaces.

    As a normal token it is written back as spaces. Text that spells ``▁▁`` itself is cut differently then.
    """
    return _SPACE in text and text in scores


def read_spm_model(files: TokenizerFiles, data: bytes) -> tuple[Vocabulary, SentencePieceModel]:
    """The vocabulary of a ``tokenizer.model`` that has no tokenizer.json beside it, and the model for its roles.

    Raises:
        UnsupportedModelError: Unigram and others that are no BPE, no byte fallback, or text that is rewritten first.
    """
    model = read_sentencepiece(data)
    _check_model(model)
    pieces = {}
    for index, piece in enumerate(model.pieces):
        # User-defined pieces are searched in the raw text, where a space is a space.
        text = piece.text.replace(_SPACE, " ") if piece.type is TokenType.USER_DEFINED else piece.text
        pieces[index] = Piece(text, piece.type, piece.score)
    added = files.added({piece.text: index for index, piece in pieces.items()})
    for index, piece in added_pieces(added).items():
        if index not in pieces or pieces[index].type is not TokenType.UNKNOWN:
            pieces[index] = piece
    legacy = files.config.get("legacy") is True
    prefix = ("prepend" if legacy else "first") if model.add_dummy_prefix else "never"
    return _vocabulary(pieces, added, prefix, model.unk_id), model


def _check_model(model: SentencePieceModel) -> None:
    if model.type != "BPE":
        raise UnsupportedModelError(
            f"tokenizer.model is a SentencePiece {model.type} model; llama.cpp's decoders take SentencePiece BPE",
            _OTHER_WAY,
        )
    bytes_present = {piece.text for piece in model.pieces if piece.type is TokenType.BYTE}
    if bytes_present != _BYTE_TOKENS:
        raise UnsupportedModelError(
            "tokenizer.model has no byte fallback, without which llama.cpp ends the process on an unknown character",
            _OTHER_WAY,
        )
    for present, what in (
        (model.normalizes, "rewrites characters (NFKC or its like)"),
        (model.remove_extra_whitespaces, "removes extra spaces"),
        (model.whitespace_as_suffix, "writes spaces as suffixes"),
    ):
        if present:
            raise UnsupportedModelError(
                f"tokenizer.model {what} before tokenizing, which llama.cpp does not", _OTHER_WAY
            )


def scores_from_merges(pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """A score for every token that merges make, such that the best score is the first merge.

    Where the ranks of several tokens interleave (SentencePiece gave them one score) they get one score here too.
    Ranks stay below 2**24, so that float32 holds them exactly.
    """
    spans: dict[str, tuple[int, int]] = {}
    for rank, (left, right) in enumerate(pairs):
        first, _ = spans.get(left + right, (rank, rank))
        spans[left + right] = (first, rank)
    scores: dict[str, float] = {}
    group_first, group_last = 0, -1
    for text, (first, last) in sorted(spans.items(), key=lambda item: item[1]):
        if first > group_last:
            group_first = first
        group_last = max(group_last, last)
        scores[text] = -float(group_first)
    return scores


def _check_closed(vocabulary: Mapping[str, int], pairs: Sequence[tuple[str, str]], fixed: set[str]) -> None:
    """Refuse a vocabulary in which llama.cpp would merge what tokenizer.json does not."""
    merges = set(pairs)
    formable = {left + right for left, right in pairs} | {text for text in vocabulary if len(text) == 1}
    for text in vocabulary:
        if text in fixed:
            continue
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in formable and right in formable and (left, right) not in merges:
                raise UnsupportedModelError(
                    f"llama.cpp's SPM would merge {left!r} and {right!r} to {text!r}, which tokenizer.json does not",
                    _OTHER_WAY,
                )


def space_prefix(document: TokenizerJson, pairs: Sequence[tuple[str, str]] = ()) -> str:
    """When a tokenizer.json puts ``▁`` before the text: `Vocabulary.space_prefix`.

    Args:
        document: with its normalizer and pre-tokenizer.
        pairs: the merges; needed only where text is cut at spaces.

    Raises:
        UnsupportedModelError: spaces are treated in a way that llama.cpp's SPM does not.
    """
    nodes = (document.normalizer, document.pre_tokenizer)
    steps = [_step(leaf) for node in nodes if node is not None for leaf in node.flat()]
    # After spaces became ▁, splitting at spaces cuts nothing.
    steps = [step for step in steps if step != "split at spaces" or "replace" not in steps]
    if any("words" in step for step in steps):
        if any(_SPACE in (left + right)[1:] for left, right in pairs):
            raise UnsupportedModelError("the tokenizer cuts at spaces although it has tokens across them", _OTHER_WAY)
        steps = [step.removesuffix(" words") for step in steps]
    known = {
        ("replace",): "never",
        ("prepend", "replace"): "prepend",
        ("metaspace never",): "never",
        ("metaspace first",): "first",
        ("metaspace always",): "always",
    }
    found = known.get(tuple(steps))
    if found is None:
        raise UnsupportedModelError(
            f"the tokenizer treats spaces in a way that llama.cpp's SPM does not: {' + '.join(steps) or 'not at all'}",
            _OTHER_WAY,
        )
    return found


def _step(node: Step) -> str:
    at_spaces = node.pattern == {"String": " "}
    if node.type == "Prepend" and node.prepend == _SPACE:
        return "prepend"
    if node.type == "Replace" and at_spaces and node.content == _SPACE:
        return "replace"
    if node.type == "Split" and at_spaces:
        return "split at spaces"
    if node.type == "Metaspace" and node.replacement == _SPACE:
        # Files from before tokenizers 0.19 write a flag in place of the scheme.
        scheme = node.prepend_scheme or ("always" if node.add_prefix_space else "never")
        return f"metaspace {scheme}" + (" words" if node.split else "")
    return node.type
