"""What a tokenizer takes in memory, from the size of its vocabulary."""

from __future__ import annotations

from pathlib import Path

import msgspec

from edgeq.errors import SourceError
from edgeq.inputs.bounded import read_bounded

__all__ = ["tokenizer_bytes"]

_MAX_BYTES = 256 << 20
_LIBRARY_BYTES = 5 << 20
# Measured with tokenizers 0.23 on x86-64: vocabularies of 30,000 to 250,000 tokens, and two real ones.
_BYTES_A_TOKEN = {"WordLevel": 370, "WordPiece": 370, "BPE": 600, "Unigram": 1500}


class _Model(msgspec.Struct):
    type: str | None = None
    vocab: msgspec.Raw = msgspec.Raw(b"[]")


class _File(msgspec.Struct):
    model: _Model


def tokenizer_bytes(path: Path) -> int:
    """Of the library, and of one loaded tokenizer.

    Args:
        path: of ``tokenizer.json``.

    Raises:
        SourceError: it cannot be read.
    """
    try:
        model = msgspec.json.decode(read_bounded(path, _MAX_BYTES), type=_File).model
        count = len(msgspec.json.decode(model.vocab))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, TypeError) as error:
        raise SourceError(f"{path} makes no sense: {error}", "Download the model again") from error
    return _LIBRARY_BYTES + count * _BYTES_A_TOKEN.get(model.type or "BPE", max(_BYTES_A_TOKEN.values()))
