"""Read ``tokenizer.model``, the protobuf that SentencePiece writes, without protobuf.

Format: sentencepiece_model.proto of https://github.com/google/sentencepiece and the protobuf wire format,
https://protobuf.dev/programming-guides/encoding. Every length is checked against the data.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator

from edgeq.converters.gguf.vocabulary import Piece, TokenType
from edgeq.errors import SourceError

__all__ = ["SentencePieceModel", "read_sentencepiece"]

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MODEL_TYPES = {1: "Unigram", 2: "BPE", 3: "Word", 4: "Char"}

Field = int | bytes


@dataclasses.dataclass(frozen=True)
class SentencePieceModel:
    """What llama.cpp needs to know of a SentencePiece model.

    Attributes:
        type: ``"BPE"``, ``"Unigram"``, ``"Word"`` or ``"Char"``.
        pieces: in order of their ids.
        bos_id: None if the model has none; likewise the next three.
        eos_id: ends a text.
        unk_id: stands for what no piece covers.
        pad_id: padding.
        normalizes: whether characters are rewritten (NFKC and its like) before tokenizing.
        add_dummy_prefix: whether a space is put before the text.
        remove_extra_whitespaces: whether runs of spaces become one.
        whitespace_as_suffix: whether ``▁`` ends words rather than beginning them.
    """

    type: str
    pieces: tuple[Piece, ...]
    bos_id: int | None
    eos_id: int | None
    unk_id: int | None
    pad_id: int | None
    normalizes: bool
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    whitespace_as_suffix: bool


def read_sentencepiece(data: bytes) -> SentencePieceModel:
    """Parse the contents of a ``tokenizer.model``.

    Raises:
        SourceError: truncated, or no SentencePiece model.
    """
    try:
        return _model(data)
    except (ValueError, UnicodeDecodeError, struct.error) as error:
        raise SourceError(
            f"tokenizer.model is truncated or no SentencePiece model ({error})", "Download or copy the file again"
        ) from None


def _model(data: bytes) -> SentencePieceModel:
    pieces: list[Piece] = []
    trainer: dict[int, Field] = {}
    normalizer: dict[int, Field] = {}
    for number, value in _fields(data):
        if number == 1:
            pieces.append(_piece(_message(value)))
        elif number == 2:
            trainer.update(_fields(_message(value)))
        elif number == 3:
            normalizer.update(_fields(_message(value)))
    if not pieces:
        message = "it holds no pieces"
        raise ValueError(message)

    def role(number: int, default: int) -> int | None:
        index = _integer(trainer.get(number, default))
        # Negative numbers (-1 for none) are written as 64-bit two's complement.
        return index if index < len(pieces) else None

    return SentencePieceModel(
        type=_MODEL_TYPES.get(_integer(trainer.get(3, 1)), "unknown"),
        pieces=tuple(pieces),
        unk_id=role(40, 0),
        bos_id=role(41, 1),
        eos_id=role(42, 2),
        pad_id=role(43, 2**64 - 1),
        normalizes=bool(_message(normalizer.get(2, b""))),
        add_dummy_prefix=bool(_integer(normalizer.get(3, 1))),
        remove_extra_whitespaces=bool(_integer(normalizer.get(4, 1))),
        whitespace_as_suffix=bool(_integer(trainer.get(24, 0))),
    )


def _piece(data: bytes) -> Piece:
    fields = dict(_fields(data))
    text = _message(fields.get(1, b"")).decode("utf-8")
    (score,) = struct.unpack("<f", _message(fields.get(2, bytes(4))))
    return Piece(text, TokenType(_integer(fields.get(3, 1))), score)


def _fields(data: bytes) -> Iterator[tuple[int, Field]]:
    """Number and value of each field; fixed-width numbers come as their bytes."""
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        number, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            value, position = _varint(data, position)
            yield number, value
            continue
        if wire == _BYTES:
            length, position = _varint(data, position)
        elif wire in (_FIXED32, _FIXED64):
            length = 4 if wire == _FIXED32 else 8
        else:
            message = f"wire type {wire} at byte {position}"
            raise ValueError(message)
        if length > len(data) - position:
            message = f"a field of {length} bytes at byte {position}, of which {len(data) - position} are there"
            raise ValueError(message)
        yield number, data[position : position + length]
        position += length


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            message = "it ends within a number"
            raise ValueError(message)
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return value, position
    message = f"a number without end at byte {position}"
    raise ValueError(message)


def _message(value: Field) -> bytes:
    if isinstance(value, int):
        message = "a number where text was expected"
        raise ValueError(message)  # noqa: TRY004 - the format is wrong, not an argument
    return value


def _integer(value: Field) -> int:
    if not isinstance(value, int):
        message = "text where a number was expected"
        raise ValueError(message)  # noqa: TRY004 - the format is wrong, not an argument
    return value
