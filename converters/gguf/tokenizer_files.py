"""The tokenizer files of a Hugging Face folder, read and checked but not yet understood.

Formats: https://huggingface.co/docs/tokenizers (``tokenizer.json``) and https://huggingface.co/docs/transformers
(``tokenizer_config.json``, ``special_tokens_map.json``, ``chat_template.jinja``, ``generation_config.json``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from edgeq.converters.gguf.vocabulary import AddedToken
from edgeq.errors import SourceError, UnsupportedModelError

__all__ = ["BpeModel", "Step", "TokenizerFiles", "TokenizerJson", "as_token_text"]

T = TypeVar("T")


class BpeModel(msgspec.Struct):
    """``model`` of a tokenizer.json whose type is BPE."""

    vocab: dict[str, int]
    merges: list[str | tuple[str, str]]
    unk_token: str | None = None
    continuing_subword_prefix: str | None = None
    end_of_word_suffix: str | None = None
    byte_fallback: bool = False
    ignore_merges: bool = False

    def pairs(self) -> list[tuple[str, str]]:
        """The merges in order of priority; both spellings of the format.

        Raises:
            SourceError: a merge that is no pair.
        """
        result = []
        for merge in self.merges:
            pair = tuple(merge.split(" ")) if isinstance(merge, str) else merge
            if len(pair) != 2:
                raise SourceError(f"tokenizer.json: the merge {merge!r} is no pair", "Get the tokenizer files again")
            result.append((pair[0], pair[1]))
        return result


class _ModelType(msgspec.Struct):
    type: str | None = None
    merges: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


class _TemplateToken(msgspec.Struct):
    ids: list[int]


class Step(msgspec.Struct):
    """A normalizer, pre-tokenizer or post-processor of tokenizer.json: the fields of all kinds that edgeq reads."""

    type: str
    normalizers: list[Step] = []
    pretokenizers: list[Step] = []
    processors: list[Step] = []
    pattern: dict[str, str] | None = None
    content: str | None = None
    behavior: str | None = None
    invert: bool = False
    individual_digits: bool = False
    use_regex: bool = True
    add_prefix_space: bool = True
    prepend: str | None = None
    prepend_scheme: str | None = None
    replacement: str | None = None
    split: bool = True
    single: list[dict[str, dict[str, str | int]]] = []
    special_tokens: dict[str, _TemplateToken] = {}

    def flat(self) -> list[Step]:
        """The steps of a sequence within sequences, or the step itself."""
        if self.type != "Sequence":
            return [self]
        return [leaf for child in (*self.normalizers, *self.pretokenizers, *self.processors) for leaf in child.flat()]


class TokenizerJson(msgspec.Struct):
    """``tokenizer.json``; the model is kept as text until its type is known."""

    model: msgspec.Raw
    added_tokens: list[AddedToken] = []
    normalizer: Step | None = None
    pre_tokenizer: Step | None = None
    post_processor: Step | None = None

    def bpe(self, path: Path) -> BpeModel:
        """The model.

        Raises:
            UnsupportedModelError: Unigram, WordPiece, WordLevel and whatever else is no BPE.
            SourceError: a BPE model with missing or wrong fields.
        """
        kind = _decode(bytes(self.model), _ModelType, path)
        # Files from before tokenizers 0.9 do not name the type; only BPE has merges.
        if kind.type != "BPE" and (kind.type is not None or kind.merges is msgspec.UNSET):
            raise UnsupportedModelError(
                f"{path} holds a tokenizer of type {kind.type or 'unknown'}; edgeq converts BPE only",
                "Bring an F16 GGUF of the model, or pass --llama-cpp DIR to use the converter of a llama.cpp checkout",
            )
        return _decode(bytes(self.model), BpeModel, path)


@dataclasses.dataclass(frozen=True)
class TokenizerFiles:
    """What a folder says about its tokenizer.

    Attributes:
        folder: where it was read.
        json: tokenizer.json, or None.
        sentencepiece: tokenizer.model's contents, or None.
        config: tokenizer_config.json, or empty.
        special_map: special_tokens_map.json, or empty.
        generation: generation_config.json, or empty.
        model_config: config.json (its text part, if the model has several), or empty.
        added_tokens: added_tokens.json, text to id, or empty.
        chat_templates: by name; the one that counts is ``"default"``.
    """

    folder: Path
    json: TokenizerJson | None
    sentencepiece: bytes | None
    config: Mapping[str, Any]
    special_map: Mapping[str, Any]
    generation: Mapping[str, Any]
    model_config: Mapping[str, Any]
    added_tokens: Mapping[str, int]
    chat_templates: Mapping[str, str]

    @classmethod
    def read(cls, folder: Path) -> TokenizerFiles:
        """Read what is there.

        Raises:
            SourceError: no tokenizer at all, or a file that is not what its name says.
        """
        document = _optional(folder / "tokenizer.json", TokenizerJson)
        model = folder / "tokenizer.model"
        sentencepiece = _bytes(model) if document is None and model.is_file() else None
        if document is None and sentencepiece is None:
            raise SourceError(
                f"{folder} holds neither tokenizer.json nor tokenizer.model",
                "Copy the tokenizer files of the model there (transformers: AutoTokenizer....save_pretrained(folder))",
            )
        config = _dictionary(folder / "tokenizer_config.json")
        model_config = _dictionary(folder / "config.json")
        text_config = model_config.get("text_config")
        return cls(
            folder=folder,
            json=document,
            sentencepiece=sentencepiece,
            config=config,
            special_map=_dictionary(folder / "special_tokens_map.json"),
            generation=_dictionary(folder / "generation_config.json"),
            model_config={**model_config, **text_config} if isinstance(text_config, dict) else model_config,
            added_tokens=_optional(folder / "added_tokens.json", dict[str, int]) or {},
            chat_templates=_chat_templates(folder, config),
        )

    def added(self, vocabulary: Mapping[str, int]) -> tuple[AddedToken, ...]:
        """Added tokens of every file, by id, and the special tokens that are named only by their role.

        Args:
            vocabulary: text to id of the model itself, for tokens that a file names without an id.

        Raises:
            SourceError: two files give one id to different tokens.
        """
        result: dict[int, AddedToken] = {}
        if self.json is not None:
            for entry in self.json.added_tokens:
                _claim(result, entry)
        decoder = self.config.get("added_tokens_decoder")
        for key, value in decoder.items() if isinstance(decoder, dict) else ():
            _claim(result, _from_decoder(key, value, self.folder))
        for content, index in self.added_tokens.items():
            _claim(result, AddedToken(index, content))
        by_content = {token.content: token for token in result.values()}
        for role in ("bos", "eos", "unk", "pad"):
            text = self.special_text(role)
            if text in by_content:
                known = by_content[text]
                result[known.id] = dataclasses.replace(known, special=True)
            elif text is not None and text in vocabulary:
                result[vocabulary[text]] = AddedToken(vocabulary[text], text, special=True)
        return tuple(result[index] for index in sorted(result))

    def special_text(self, role: str) -> str | None:
        """The text of the token with that role (``"eos"``) in the tokenizer's own files, None if it has none."""
        key = f"{role}_token"
        # A null in tokenizer_config.json means "none", also where an older special_tokens_map.json names one.
        return as_token_text(self.config[key] if key in self.config else self.special_map.get(key))


def as_token_text(value: object) -> str | None:
    """A token that is written as its text, or as the fields of an added token."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _claim(tokens: dict[int, AddedToken], token: AddedToken) -> None:
    known = tokens.setdefault(token.id, token)
    if known.content != token.content:
        raise SourceError(
            f"the tokenizer files give the id {token.id} to both {known.content!r} and {token.content!r}",
            "Get the tokenizer files again, all from the same revision",
        )


def _from_decoder(key: str, value: object, folder: Path) -> AddedToken:
    path = folder / "tokenizer_config.json"
    try:
        return msgspec.convert({**value, "id": int(key)} if isinstance(value, dict) else value, AddedToken)
    except (ValueError, msgspec.ValidationError) as error:
        raise SourceError(
            f"{path}: added_tokens_decoder[{key!r}] is no added token ({error})", "Get the tokenizer files again"
        ) from None


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SourceError(f"{path} cannot be read ({error.strerror})", "Check the file and its permissions") from None


def _decode(data: bytes, kind: type[T], path: Path) -> T:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise SourceError(
            f"{path} is truncated or not what its name says ({error})", "Download or copy the file again"
        ) from None


def _optional(path: Path, kind: type[T]) -> T | None:
    return _decode(_bytes(path), kind, path) if path.is_file() else None


def _dictionary(path: Path) -> dict[str, Any]:
    return _optional(path, dict[str, Any]) or {}


def _chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name; files of their own win over chat_template.json, and that over tokenizer_config.json."""
    templates: dict[str, str] = {}
    for value in (config.get("chat_template"), _dictionary(folder / "chat_template.json").get("chat_template")):
        if isinstance(value, str):
            templates["default"] = value
        elif isinstance(value, dict):
            templates.update({name: text for name, text in value.items() if isinstance(text, str)})
        elif isinstance(value, list):
            templates.update({entry["name"]: entry["template"] for entry in value if _is_named(entry)})
    main = folder / "chat_template.jinja"
    if main.is_file():
        templates["default"] = _text(main)
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        templates[path.stem] = _text(path)
    return templates


def _is_named(entry: object) -> bool:
    return isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in ("name", "template"))


def _text(path: Path) -> str:
    try:
        return _bytes(path).decode("utf-8")
    except UnicodeDecodeError:
        raise SourceError(f"{path} is not UTF-8 text", "Download or copy the file again") from None
