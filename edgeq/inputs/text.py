"""Texts as the inputs of a model, as transformers' tokenizers give them, from ``tokenizer.json`` alone."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from edgeq.errors import SourceError, UsageError, require_package
from edgeq.inputs.bounded import read_bounded

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

__all__ = ["TextEncoder", "check_texts", "text_encoder"]

Ids = npt.NDArray[np.int64]

_TOKENIZER = "tokenizer.json"
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
_MAX_BYTES = 256 << 20
_UNLIMITED = 10**9  # transformers writes 10**30 for "no limit"
Side = Literal["left", "right"]


class _Token(msgspec.Struct):
    content: str


class _Settings(msgspec.Struct):
    """The keys that count of tokenizer_config.json and special_tokens_map.json; they may hold others."""

    pad_token: str | _Token | None = None
    pad_token_type_id: int = 0
    padding_side: Side = "right"
    truncation_side: Side = "right"
    model_max_length: float | None = None


def text_encoder(folder: str | os.PathLike[str], *, lowercase: bool = False) -> TextEncoder:
    """The tokenizer of a Hugging Face folder or of a bundle.

    Args:
        folder: with ``tokenizer.json``, and ``tokenizer_config.json`` if the model has one.
        lowercase: texts before all that the tokenizer does to them; names of special tokens in them stay.

    Raises:
        SourceError: no such file, or one that makes no sense.
        MissingPackageError: ``tokenizers`` is not installed.
    """
    tokenizers = require_package("tokenizers", "perception", "to read texts")
    place = Path(folder)
    path = place / _TOKENIZER
    if not path.is_file():
        raise SourceError(
            f"{place} holds no {_TOKENIZER}",
            "Save it with transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...)",
        )
    main, special = (_read_settings(place / name) for name in _SETTINGS)
    try:
        tokenizer: Tokenizer = tokenizers.Tokenizer.from_str(read_bounded(path, _MAX_BYTES).decode("utf-8"))
    except Exception as error:  # tokenizers raises nothing narrower
        raise SourceError(f"{path} cannot be read as a tokenizer: {error}", "Download the model again") from error
    if lowercase:
        first = tokenizers.normalizers.Lowercase()
        then = [] if tokenizer.normalizer is None else [tokenizer.normalizer]
        tokenizer.normalizer = tokenizers.normalizers.Sequence([first, *then])
    stated = tokenizer.padding or {}
    pad = main.pad_token or special.pad_token or stated.get("pad_token")
    return TextEncoder(tokenizer, main, pad.content if isinstance(pad, _Token) else pad)


class TextEncoder:
    """Tokenizes texts. May be called from any thread.

    Attributes:
        max_tokens: longer texts are cut, special tokens included; None for no limit.
        special_tokens: that are added to each text.
        pad_id: what shorter texts are filled up with; None if the model has no such token.
    """

    def __init__(self, tokenizer: Tokenizer, settings: _Settings, pad_token: str | None) -> None:
        """Take over a tokenizer; padding and truncation that its file prescribes are those of its training."""
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        self._settings = settings
        self._lock = threading.Lock()  # the limit is the tokenizer's own state
        self._limit: int | None = None
        limit = settings.model_max_length
        self.max_tokens = None if limit is None or not 1 <= limit < _UNLIMITED else int(limit)
        self.special_tokens = tokenizer.num_special_tokens_to_add(is_pair=False)
        self.pad_id = None if pad_token is None else tokenizer.token_to_id(pad_token)

    def __call__(
        self, texts: Sequence[str], max_tokens: int | None = None, *, length: int | None = None
    ) -> dict[str, Ids]:
        """Tokenize texts.

        Args:
            texts: one or more.
            max_tokens: cut longer ones to it, special tokens included; None for the model's own limit.
            length: fill all up to it, for graphs of one fixed length; None for the longest text's.

        Returns:
            ``input_ids``, ``attention_mask`` (1 where there is a token) and ``token_type_ids``, each int64 of
            (texts, length).

        Raises:
            UsageError: no texts, one string instead of several, text that is no valid Unicode, a limit without room
                for a token, or texts of several lengths for a model without a padding token.
        """
        check_texts(texts)
        limit = _least(max_tokens, self.max_tokens, length)
        if limit is not None and limit <= self.special_tokens:
            raise UsageError(
                f"{limit} tokens leave no room for text: {self.special_tokens} of them are special",
                "Allow more tokens",
            )
        with self._lock:
            self._cut_at(limit)
            encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=True)
        return self._as_arrays(encodings, length)

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text without a limit, special ones included; errors as for a call."""
        check_texts(texts)
        with self._lock:
            self._cut_at(None)
            return [len(e) for e in self._tokenizer.encode_batch(list(texts), add_special_tokens=True)]

    def _cut_at(self, limit: int | None) -> None:
        if limit == self._limit:
            return
        if limit is None:
            self._tokenizer.no_truncation()
        else:
            self._tokenizer.enable_truncation(limit, direction=self._settings.truncation_side)
        self._limit = limit

    def _as_arrays(self, encodings: Sequence[Encoding], length: int | None) -> dict[str, Ids]:
        lengths = [len(encoding) for encoding in encodings]
        width = max(lengths) if length is None else length
        pad_id = self.pad_id
        if min(lengths) < width and pad_id is None:
            raise UsageError(
                f"texts of {min(lengths)} tokens must be filled up to {width}, and the tokenizer has no padding token",
                "Give texts one at a time, or name a pad_token in tokenizer_config.json",
            )
        shape = len(encodings), width
        ids = np.full(shape, 0 if pad_id is None else pad_id, np.int64)
        mask = np.zeros(shape, np.int64)
        types = np.full(shape, self._settings.pad_token_type_id, np.int64)
        for row, encoding in enumerate(encodings):
            start = width - lengths[row] if self._settings.padding_side == "left" else 0
            place = slice(start, start + lengths[row])
            ids[row, place] = encoding.ids
            mask[row, place] = 1
            types[row, place] = encoding.type_ids
        return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


def check_texts(texts: Sequence[str]) -> None:
    """Raise UsageError for one string instead of several, none, or text that is no valid Unicode."""
    if isinstance(texts, str):
        raise UsageError("texts is one string", "Give a list of them: [text]")
    if not len(texts):
        raise UsageError("there are no texts", "Give at least one")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise UsageError(f"text {index} is a {type(text).__name__}", "Give strings")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UsageError(
                f"text {index} is not valid Unicode (lone surrogate at character {error.start})",
                "Decode it with errors='replace'",
            ) from None


def _least(*values: int | None) -> int | None:
    return min((value for value in values if value is not None), default=None)


def _read_settings(path: Path) -> _Settings:
    if not path.is_file():
        return _Settings()
    try:
        return msgspec.json.decode(read_bounded(path, _MAX_BYTES), type=_Settings)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SourceError(f"{path} makes no sense: {error}", "Download the model again") from error
