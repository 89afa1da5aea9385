"""The protobuf wire format as far as ONNX needs it: no dependency, and no copy of what is only looked at.

A message is a run of fields, each a varint key ``number << 3 | wire type`` and a payload (Protocol Buffers encoding
guide). ONNX uses three wire types: varint (0), length-delimited (2) and 32 bit (5); 64 bit (1) can be skipped.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

__all__ = ["Field", "WireError", "float_field", "int_field", "message_field", "packed_ints_field", "read_fields"]

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
_LONGEST_VARINT = 10  # bytes that 64 bits take, seven each


class WireError(ValueError):
    """The bytes are no protobuf message."""


class Field(NamedTuple):
    """One field of a message, by its place in the buffer.

    Attributes:
        number: of the field in the ``.proto`` file.
        wire_type: 0, 1, 2 or 5.
        start: where the key begins.
        payload: where the value begins; for length-delimited ones, after the length.
        end: where the next field begins.
        value: the number of a varint; 0 for other types.
    """

    number: int
    wire_type: int
    start: int
    payload: int
    end: int
    value: int


def encode_varint(value: int) -> bytes:
    """Seven bits a byte, low ones first; negative numbers as 64-bit two's complement."""
    value &= 2**64 - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def int_field(number: int, value: int) -> bytes:
    """A varint field: int32, int64, bool or enum."""
    return encode_varint(number << 3 | VARINT) + encode_varint(value)


def float_field(number: int, value: float) -> bytes:
    """A 32-bit float field."""
    return encode_varint(number << 3 | FIXED32) + struct.pack("<f", value)


def message_field(number: int, payload: bytes | str) -> bytes:
    """A length-delimited field: a string, bytes or a message."""
    data = payload.encode() if isinstance(payload, str) else payload
    return encode_varint(number << 3 | BYTES) + encode_varint(len(data)) + data


def packed_ints_field(number: int, values: Iterable[int]) -> bytes:
    """Repeated integers, packed into one field."""
    return message_field(number, b"".join(encode_varint(value) for value in values))


def _varint(data: memoryview, at: int, end: int) -> tuple[int, int]:
    value = 0
    for count in range(_LONGEST_VARINT):
        if at + count >= end:
            raise WireError(f"it ends inside a number at byte {at}")
        byte = data[at + count]
        value |= (byte & 0x7F) << 7 * count
        if byte < 0x80:
            return value & (2**64 - 1), at + count + 1
    raise WireError(f"a number at byte {at} is longer than 64 bits")


def read_fields(data: memoryview, start: int = 0, end: int | None = None) -> Iterator[Field]:
    """The fields of the message in ``data[start:end]``, in order; payloads are not copied.

    Raises:
        WireError: an unknown wire type, or a field that reaches beyond the end.
    """
    limit = len(data) if end is None else end
    at = start
    while at < limit:
        key, payload = _varint(data, at, limit)
        number, wire_type = key >> 3, key & 7
        value = 0
        if number == 0:
            raise WireError(f"field number 0 at byte {at}")
        if wire_type == VARINT:
            value, after = _varint(data, payload, limit)
        elif wire_type == BYTES:
            length, payload = _varint(data, payload, limit)
            after = payload + length
        elif wire_type in (FIXED32, FIXED64):
            after = payload + (4 if wire_type == FIXED32 else 8)
        else:
            raise WireError(f"wire type {wire_type} at byte {at}")
        if after > limit:
            raise WireError(f"the field at byte {at} reaches to byte {after}, beyond the end at {limit}")
        yield Field(number, wire_type, at, payload, after, value)
        at = after
