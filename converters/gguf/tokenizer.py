"""The tokenizer of a Hugging Face folder as the ``tokenizer.*`` keys of a GGUF.

Read by `read_tokenizer`, written by `write_tokenizer`, proved by `check_tokenizer`. The keys are those of
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; where llama.cpp would decide by the name of the
pre-tokenizer or of the architecture (BOS, EOS, space prefix), the key is written explicitly.

Where llama.cpp differs from Hugging Face whatever one writes: text not in NFC, characters newer than its Unicode
tables (none of Unicode 14 was found to differ), added tokens that overlap in the text (it takes the longest one first,
not the leftmost), and what `TokenizerSpec.notes` says of the tokenizer at hand.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgeq.converters.gguf.sentencepiece_model import SentencePieceModel
from edgeq.converters.gguf.tokenizer_bpe import is_byte_level, read_byte_level
from edgeq.converters.gguf.tokenizer_check import NASTY_TEXT, check_tokenizer
from edgeq.converters.gguf.tokenizer_files import Step, TokenizerFiles, TokenizerJson
from edgeq.converters.gguf.tokenizer_spm import read_spm_json, read_spm_model
from edgeq.converters.gguf.vocabulary import AddedToken, Piece, TokenType, Vocabulary, fill, strips_like_phi3
from edgeq.errors import SourceError, UnsupportedModelError

if TYPE_CHECKING:
    from gguf import GGUFWriter

__all__ = ["NASTY_TEXT", "TokenizerSpec", "check_tokenizer", "fitting_name", "read_tokenizer", "write_tokenizer"]

# Texts that llama.cpp takes for the end of a turn by themselves (llama-vocab.cpp), the likeliest end of a turn first.
_TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "<EOT>")
_KNOWN_ENDS = frozenset({*_TURN_ENDS, "</s>", "<|eom_id|>", "<eos>", "<|return|>", "<|call|>", "[EOS]"})
_ID_KEYS = {
    "bos": "tokenizer.ggml.bos_token_id",
    "eos": "tokenizer.ggml.eos_token_id",
    "eot": "tokenizer.ggml.eot_token_id",
    "eom": "tokenizer.ggml.eom_token_id",
    "unk": "tokenizer.ggml.unknown_token_id",
    "pad": "tokenizer.ggml.padding_token_id",
}


@dataclasses.dataclass(frozen=True)
class TokenizerSpec:
    """What goes into ``tokenizer.*`` of a GGUF.

    Attributes:
        model: ``"gpt2"`` (byte-level BPE) or ``"llama"`` (SentencePiece BPE).
        pre: the pre-tokenizer's name.
        tokens: one for each row of the embedding.
        scores: of SentencePiece, one for each token; None for BPE.
        token_types: `TokenType` of each token.
        merges: of BPE, ``"left right"``; None for SentencePiece.
        special_ids: role (``bos``, ``eos``, ``eot``, ``eom``, ``unk``, ``pad``) to id; roles without one are absent.
        add_bos: whether raw text begins with BOS, as in Hugging Face.
        add_eos: whether raw text ends with EOS, as in Hugging Face.
        add_space_prefix: whether llama.cpp puts a space before text; None for BPE.
        space_prefix: ``"first"`` where only the very start of a text gets a space, which llama.cpp has no key for; kept
            as ``edgeq.tokenizer.space_prefix`` for `edgeq.llama.Model.tokenize`. None otherwise.
        strips_after_special: whether spaces after special tokens are dropped as in Phi-3; see `fitting_name`.
        chat_template: Jinja source, None without one.
        chat_templates: further templates by name (``tool_use``).
        notes: what differs from Hugging Face, one line each.
    """

    model: str
    pre: str
    tokens: tuple[str, ...]
    scores: tuple[float, ...] | None
    token_types: tuple[int, ...]
    merges: tuple[str, ...] | None
    special_ids: Mapping[str, int]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool | None
    space_prefix: str | None
    strips_after_special: bool
    chat_template: str | None
    chat_templates: Mapping[str, str]
    notes: tuple[str, ...]


def read_tokenizer(folder: Path, *, n_vocab: int, architecture: str) -> TokenizerSpec:
    """Read the tokenizer of a Hugging Face folder.

    Args:
        folder: with tokenizer.json, or tokenizer.model if there is no tokenizer.json.
        n_vocab: rows of the embedding; rows without a token become unused ones.
        architecture: ``general.architecture`` of the GGUF, for messages.

    Raises:
        SourceError: no tokenizer, broken files, more tokens than rows, no token that ends a text.
        UnsupportedModelError: a tokenizer that llama.cpp cannot reproduce.
    """
    files = TokenizerFiles.read(folder)
    vocabulary, piece_model = _vocabulary(files)
    rows = fill(vocabulary.pieces, n_vocab)
    notes = [*vocabulary.notes, *_strip_notes(vocabulary.added)]
    before, after = _framing(files.json)
    special = _special_ids(files, vocabulary, piece_model, rows, notes)
    if "eos" not in special:
        raise SourceError(
            f"nothing says which token ends a text of this {architecture} model",
            "Set eos_token in tokenizer_config.json, or eos_token_id in generation_config.json",
        )
    if files.json is None:
        add_bos, add_eos = files.config.get("add_bos_token") is not False, files.config.get("add_eos_token") is True
    else:
        add_bos, add_eos = bool(before), bool(after)
        special.update({role: ids[0] for role, ids in (("bos", before), ("eos", after)) if ids})
    if "bos" not in special:
        # llama.cpp would take token 11 for it.
        special["bos"] = special["eos"]
        add_bos = False
        notes.append(
            "the tokenizer has no token that begins a text; the GGUF names the one that ends it, and adds none"
        )
    scored = vocabulary.merges is None
    templates = dict(files.chat_templates)
    return TokenizerSpec(
        model=vocabulary.model,
        pre=vocabulary.pre,
        tokens=tuple(row.text for row in rows),
        scores=tuple(row.score for row in rows) if scored else None,
        token_types=tuple(int(row.type) for row in rows),
        merges=vocabulary.merges,
        special_ids=special,
        add_bos=add_bos,
        add_eos=add_eos,
        add_space_prefix=vocabulary.space_prefix in {"prepend", "always"} if scored else None,
        space_prefix="first" if vocabulary.space_prefix == "first" else None,
        strips_after_special=strips_like_phi3(vocabulary.added),
        chat_template=templates.pop("default", None),
        chat_templates=templates,
        notes=tuple(notes),
    )


def write_tokenizer(writer: GGUFWriter, spec: TokenizerSpec) -> None:
    """Add the keys of ``spec`` to a GGUF that is being written."""
    writer.add_tokenizer_model(spec.model)
    writer.add_tokenizer_pre(spec.pre)
    writer.add_token_list(list(spec.tokens))
    if spec.scores is not None:
        writer.add_token_scores(list(spec.scores))
    writer.add_token_types(list(spec.token_types))
    if spec.merges is not None:
        writer.add_token_merges(list(spec.merges))
    for role, index in spec.special_ids.items():
        writer.add_uint32(_ID_KEYS[role], index)
    writer.add_add_bos_token(spec.add_bos)
    writer.add_add_eos_token(spec.add_eos)
    if spec.add_space_prefix is not None:
        writer.add_add_space_prefix(spec.add_space_prefix)
    if spec.space_prefix is not None:
        writer.add_string("edgeq.tokenizer.space_prefix", spec.space_prefix)
    if spec.chat_template is not None:
        writer.add_chat_template(spec.chat_template)
    # By hand and sorted: the writer's own way goes through a set, and the file would differ from run to run.
    if spec.chat_templates:
        writer.add_array("tokenizer.chat_templates", sorted(spec.chat_templates))
        for name in sorted(spec.chat_templates):
            writer.add_string(f"tokenizer.chat_template.{name}", spec.chat_templates[name])


def fitting_name(name: str, spec: TokenizerSpec) -> str:
    """``general.name`` for a model with that tokenizer.

    By the words "phi-3" or "phi3" in the name, and by nothing else, llama.cpp decides to drop spaces after special
    tokens as Phi-3's tokenizer does (llama-vocab.cpp); a model so named with another vocabulary does not even load.
    """
    if spec.strips_after_special:
        return name if re.search("phi-?3", name, re.IGNORECASE) else f"{name} (Phi-3)"
    return re.sub("(phi)-?3", r"\1 3", name, flags=re.IGNORECASE)


def _vocabulary(files: TokenizerFiles) -> tuple[Vocabulary, SentencePieceModel | None]:
    if files.json is not None:
        model = files.json.bpe(files.folder / "tokenizer.json")
        reader = read_byte_level if is_byte_level(files.json) else read_spm_json
        return reader(files, files.json, model), None
    if files.sentencepiece is None:
        message = "TokenizerFiles.read gives one of the two"
        raise AssertionError(message)
    return read_spm_model(files, files.sentencepiece)


def _strip_notes(added: Sequence[AddedToken]) -> list[str]:
    """What Hugging Face does around added tokens and llama.cpp does not."""
    notes = []
    strips = [] if strips_like_phi3(added) else [token.content for token in added if token.lstrip or token.rstrip]
    for names, what in (
        (strips, "drops spaces beside"),
        ([token.content for token in added if token.single_word], "finds only as whole words"),
    ):
        if names:
            shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            notes.append(f"Hugging Face {what} {shown}; llama.cpp does not")
    return notes


def _framing(document: TokenizerJson | None) -> tuple[list[int], list[int]]:
    """Ids that the post-processor puts before and after a single text.

    Raises:
        UnsupportedModelError: more than one on a side, or a post-processor of another kind.
    """
    if document is None or document.post_processor is None:
        return [], []
    before: list[int] = []
    after: list[int] = []
    for node in document.post_processor.flat():
        if node.type == "TemplateProcessing":
            _template(node, before, after)
        elif node.type != "ByteLevel":
            raise UnsupportedModelError(
                f"tokenizer.json has a post-processor of type {node.type}, which edgeq does not know",
                "Bring an F16 GGUF of the model, or pass --llama-cpp DIR to use the converter of a llama.cpp checkout",
            )
    if len(before) > 1 or len(after) > 1:
        raise UnsupportedModelError(
            f"the tokenizer puts {len(before)} tokens before and {len(after)} after a text; llama.cpp adds one at most",
            "Bring an F16 GGUF of the model, or pass --llama-cpp DIR to use the converter of a llama.cpp checkout",
        )
    return before, after


def _template(node: Step, before: list[int], after: list[int]) -> None:
    side = before
    for item in node.single:
        if "Sequence" in item:
            side = after
            continue
        name = str(item.get("SpecialToken", {}).get("id"))
        if name not in node.special_tokens:
            raise SourceError(
                f"tokenizer.json: the post-processor uses {name!r} but does not define it",
                "Get the tokenizer files again",
            )
        side.extend(node.special_tokens[name].ids)


def _special_ids(
    files: TokenizerFiles,
    vocabulary: Vocabulary,
    piece_model: SentencePieceModel | None,
    rows: Sequence[Piece],
    notes: list[str],
) -> dict[str, int]:
    """Role to id: by the tokenizer's own words, else by generation_config.json, config.json, tokenizer.model."""
    by_text = {row.text: index for index, row in enumerate(rows) if row.type is not TokenType.UNUSED}
    ends = [index for index in _ids(files.generation.get("eos_token_id")) if index < len(rows)]
    special: dict[str, int] = {}
    for role in ("bos", "eos", "unk", "pad"):
        text = files.special_text(role)
        if text in by_text:
            special[role] = by_text[text]
            continue
        key = f"{role}_token_id"
        candidates = [*_ids(files.generation.get(key)), *_ids(files.model_config.get(key))]
        if piece_model is not None:
            candidates += _ids(getattr(piece_model, f"{role}_id"))
        if role == "unk":
            candidates = _ids(vocabulary.unk_id)
        valid = [index for index in candidates if index < len(rows)]
        if valid:
            special[role] = valid[0]
    if "eos" in special:
        special.update(_turn_ends(special["eos"], ends, rows, by_text, notes))
    return special


def _turn_ends(
    eos: int, ends: Sequence[int], rows: Sequence[Piece], by_text: Mapping[str, int], notes: list[str]
) -> dict[str, int]:
    """Tokens other than EOS that end an answer. llama.cpp has two keys, and knows some more by their text."""
    others = [index for index in ends if index != eos]
    unknown = [index for index in others if rows[index].text not in _KNOWN_ENDS]
    known = [index for index in others if rows[index].text in _KNOWN_ENDS]
    if not others:
        known = [by_text[text] for text in _TURN_ENDS if text in by_text and by_text[text] != eos]
        known = [index for index in known if rows[index].type is TokenType.CONTROL]
    if len(unknown) > 2:
        lost = ", ".join(rows[index].text for index in unknown[2:])
        notes.append(f"llama.cpp has keys for two tokens that end an answer beside EOS; these do not end one: {lost}")
    return dict(zip(("eot", "eom"), unknown or known[:1], strict=False))


def _ids(value: object) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [index for index in values if isinstance(index, int) and not isinstance(index, bool) and index >= 0]
