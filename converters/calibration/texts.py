"""Texts as tokens: a file that the user gives, or prose that every Python brings along.

A text is cut into chunks, each run from an empty context, so that all positions of all models see the same past.
"""

from __future__ import annotations

import hashlib
import importlib
import random
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from edgeq.errors import UsageError
from edgeq.llama import Model

__all__ = [
    "CHUNK_TOKENS",
    "Chunk",
    "Source",
    "Split",
    "TokenText",
    "builtin_text",
    "calibration_text",
    "check_text_file",
    "file_text",
]

Chunk = npt.NDArray[np.int32]
Source = Literal["self", "file", "builtin"]
Split = Literal["select", "judge"]

CHUNK_TOKENS, _FEWEST_TO_CALIBRATE = 256, 2048  # of calibration

_GLANCE_BYTES = 1 << 15
_MOST_BYTES_PER_TOKEN = 32  # of a file no more is read than a text of such long tokens needs
_FEWEST_BYTES_PER_TOKEN = 1.5
_MOST_FRAGMENTS = 0.25
_SHORTEST_TAIL = 16  # tokens; less at the end of a document says little about a model
_SHORTEST_DOCUMENT = 400  # characters
_SHORTEST_REPEAT = 40  # characters of a paragraph that may stand in two documents


@dataclass(frozen=True, eq=False)
class TokenText:
    """A text as one model's tokens.

    Attributes:
        chunks: int32 of (n,) each, with 1 <= n <= ``chunk_tokens``; each begins with BOS where the model wants one.
        text_sha256: of what was read, as UTF-8, whether all of it is in the chunks or not; of the token ids
            (little-endian int32) where a model wrote them.
        source: ``"self"`` (the model wrote it), ``"file"`` or ``"builtin"``.
        name: for people and manifests.
        seed: of what was drawn at random; None if nothing was.
        n_tokens: in all chunks.
        warnings: what makes the text less than good, one line each.
        split: the half of the built-in text; None for all else.
    """

    chunks: tuple[Chunk, ...]
    text_sha256: str
    source: Source
    name: str
    seed: int | None
    n_tokens: int
    warnings: tuple[str, ...] = ()
    split: Split | None = None


def check_text_file(path: Path) -> None:
    """Find out before any work whether a file begins like a text.

    Raises:
        UsageError: it cannot be read, is no regular file, or does not begin with UTF-8.
    """
    _read(path, _GLANCE_BYTES)


def calibration_text(model_gguf: Path, path: Path, *, max_tokens: int) -> TokenText:
    """A text file to calibrate on; arguments and errors as for `file_text`."""
    least = min(_FEWEST_TO_CALIBRATE, max_tokens)
    return file_text(model_gguf, path, chunk_tokens=CHUNK_TOKENS, max_tokens=max_tokens, min_tokens=least)


def file_text(model_gguf: Path, path: Path, *, chunk_tokens: int, max_tokens: int, min_tokens: int) -> TokenText:
    """The beginning of a text file.

    Args:
        model_gguf: whose tokenizer cuts it; its weights are not read.
        path: UTF-8.
        chunk_tokens: the most tokens of a chunk, BOS included.
        max_tokens: the most in all.
        min_tokens: the fewest that will do.

    Raises:
        UsageError: the file cannot be read, is no regular file, is not UTF-8 or holds zero bytes, or is too short.
        SessionError: the model's tokenizer cannot be loaded.
    """
    text = _read(path, max_tokens * _MOST_BYTES_PER_TOKEN)
    with Model.load(model_gguf, vocab_only=True) as model:
        ids = model.tokenize(text, add_special=False, parse_special=False)
        chunks = _limit(_cut(model, ids, chunk_tokens), max_tokens)
        warnings = _warnings(model, text, ids, path.name)
    n_tokens = sum(map(len, chunks))
    if n_tokens < min_tokens:
        raise UsageError(
            f"{path} gives {n_tokens} tokens, and {min_tokens} are needed",
            f"Give a text of about {_wanted_bytes(text, n_tokens, min_tokens)} bytes or more",
        )
    return TokenText(
        chunks=chunks,
        text_sha256=hashlib.sha256(text.encode()).hexdigest(),
        source="file",
        name=path.name,
        seed=None,
        n_tokens=n_tokens,
        warnings=warnings,
    )


def builtin_text(
    model_gguf: Path,
    *,
    chunk_tokens: int,
    max_tokens: int,
    min_tokens: int = 1,
    seed: int = 0,
    split: Split | None = None,
) -> TokenText:
    """English prose and code that needs no download: the language reference inside Python's ``pydoc_data.topics``.

    Its sections, without what one repeats of another, are shuffled and take turns: the first chunk of each, then the
    second of each, and so on.

    Args:
        model_gguf: whose tokenizer cuts it; its weights are not read.
        chunk_tokens: the most tokens of a chunk, BOS included.
        max_tokens: the most in all.
        min_tokens: the fewest that will do.
        seed: of the shuffling.
        split: ``"select"`` and ``"judge"`` share no section, whatever the seeds; None takes all of them.

    Raises:
        UsageError: this Python comes without the text, or it is too short.
        SessionError: the model's tokenizer cannot be loaded.
    """
    documents = _split(_documents(), split)
    names = sorted(documents)
    random.Random(seed).shuffle(names)
    with Model.load(model_gguf, vocab_only=True) as model:
        cut = [
            _cut(model, model.tokenize(documents[name], add_special=False, parse_special=False), chunk_tokens)
            for name in names
        ]
    turns = (chunk for turn in zip_longest(*cut) for chunk in turn if chunk is not None)
    chunks = _limit(turns, max_tokens)
    n_tokens = sum(map(len, chunks))
    if n_tokens < min_tokens:
        raise UsageError(
            f"the text inside Python gives {n_tokens} tokens, and {min_tokens} are needed",
            "Give a longer text with --eval-text",
        )
    text = "\n\n".join(documents[name] for name in names)
    return TokenText(
        chunks=chunks,
        text_sha256=hashlib.sha256(text.encode()).hexdigest(),
        source="builtin",
        name=_builtin_name(split),
        seed=seed,
        n_tokens=n_tokens,
        split=split,
    )


def _read(path: Path, limit: int) -> str:
    remedy = "Give the path of a text file"
    try:
        # A device has no end, and a pipe gives what it has only once.
        if path.exists() and not path.is_file() and not path.is_dir():
            raise UsageError(f"{path} is no regular file", remedy)
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"{path} cannot be read: {reason}", remedy) from error
    if (zero := data.find(0)) >= 0:
        raise UsageError(f"{path} is no text (byte {zero} is 0x00)", "Give a text in UTF-8")
    whole = len(data) <= limit
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The limit may have cut the last character in two.
        if not whole and error.start >= len(data) - 4:
            return data[: error.start].decode("utf-8-sig")
        raise UsageError(
            f"{path} is not UTF-8 (byte {error.start} is 0x{data[error.start]:02x})", "Convert it, as iconv does"
        ) from None


def _cut(model: Model, ids: Sequence[int], chunk_tokens: int) -> list[Chunk]:
    """Chunks of one document, without a short tail unless it is all there is."""
    first = [model.bos] if model.add_bos and model.bos is not None else []
    width = chunk_tokens - len(first)
    if width < 1:
        raise UsageError(f"chunks of {chunk_tokens} tokens hold no text", "Choose longer chunks")
    pieces = [ids[start : start + width] for start in range(0, len(ids), width)]
    if len(pieces) > 1 and len(pieces[-1]) < min(_SHORTEST_TAIL, width):
        pieces.pop()
    return [np.array([*first, *piece], np.int32) for piece in pieces]


def _limit(chunks: Iterable[Chunk], max_tokens: int) -> tuple[Chunk, ...]:
    """The first chunks, the last of them shortened, to ``max_tokens`` in all."""
    taken, room = [], max_tokens
    for chunk in chunks:
        if room <= 0:
            break
        taken.append(chunk[:room])
        room -= len(taken[-1])
    return tuple(taken)


def _warnings(model: Model, text: str, ids: Sequence[int], name: str) -> tuple[str, ...]:
    """Whether the tokenizer knows the language, or spells it byte by byte."""
    if not ids:
        return ()
    unique, counts = np.unique(np.asarray(ids), return_counts=True)
    fragments = sum(n for token, n in zip(unique.tolist(), counts.tolist(), strict=True) if _is_fragment(model, token))
    bytes_per_token, share = len(text.encode()) / len(ids), fragments / len(ids)
    if bytes_per_token >= _FEWEST_BYTES_PER_TOKEN and share <= _MOST_FRAGMENTS:
        return ()
    finding = f"{bytes_per_token:.2f} bytes a token, and {share:.0%} of the tokens are unknown or parts of a character"
    return (f"the tokenizer hardly knows the language of {name}: {finding}",)


def _is_fragment(model: Model, token: int) -> bool:
    """Whether a token stands for a part of a character, or for nothing (as unknown tokens do)."""
    try:
        return not model.token_bytes(token).decode("utf-8")
    except UnicodeDecodeError:
        return True


def _wanted_bytes(text: str, n_tokens: int, min_tokens: int) -> int:
    return round(max(1.0, len(text.encode()) / max(n_tokens, 1)) * min_tokens * 1.1)


def _documents() -> dict[str, str]:
    """The sections by name; a paragraph that stands in several is left to the longest of them."""
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except (ImportError, AttributeError) as error:
        raise UsageError(
            "this Python comes without pydoc_data.topics, the default text for judging", "Give a text with --eval-text"
        ) from error
    seen: set[str] = set()
    documents: dict[str, str] = {}
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        paragraphs = []
        for paragraph in topics[name].split("\n\n"):
            words = " ".join(paragraph.split())
            if len(words) < _SHORTEST_REPEAT or words not in seen:
                paragraphs.append(paragraph)
            seen.add(words)
        text = "\n\n".join(paragraphs)
        if len(text) >= _SHORTEST_DOCUMENT:
            documents[name] = text
    return documents


def _split(documents: dict[str, str], split: Split | None) -> dict[str, str]:
    """The documents of one half, by size in turns, so that both halves are about as long."""
    if split is None:
        return documents
    ordered = sorted(documents, key=lambda name: (-len(documents[name]), name))
    sizes = {"select": 0, "judge": 0}
    chosen = {}
    for name in ordered:
        half = min(sizes, key=lambda key: sizes[key])
        sizes[half] += len(documents[name])
        if half == split:
            chosen[name] = documents[name]
    return chosen


def _builtin_name(split: Split | None) -> str:
    version = f"{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"
    return f"pydoc_data.topics of Python {version}" + (f", half {split!r}" if split else "")
