"""The pieces of a GGUF file as bytes. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

__all__ = ["ALIGNMENT", "UINT32", "Value", "encode_header", "encode_pair", "encode_string", "encode_tensor_info"]

ALIGNMENT = 32  # of tensor data; the only one that llama.cpp's quantizer writes
# enum gguf_type
UINT32 = 4
_INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 5, 6, 7, 8, 9
_MAGIC, _VERSION = b"GGUF", 3

Value = bool | int | float | str | Sequence[str] | Sequence[int]


def encode_string(text: str) -> bytes:
    """A text after its length."""
    data = text.encode("utf-8", errors="surrogateescape")
    return struct.pack("<Q", len(data)) + data


def encode_tensor_info(name: str, shape: tuple[int, ...], type_id: int, offset: int) -> bytes:
    """A tensor's entry: its shape row length first, its ggml type, and where its data lies in the data section."""
    return encode_string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, type_id, offset)


def encode_pair(key: str, value: Value) -> bytes:
    """A key of the metadata with its value; whole numbers as uint32, those in lists as int32."""
    return encode_string(key) + _encode_value(value)


def _encode_value(value: Value) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", UINT32, value)
    if isinstance(value, float):
        return struct.pack("<If", _FLOAT32, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + encode_string(value)
    texts = [encode_string(item) for item in value if isinstance(item, str)]
    if len(texts) == len(value):
        return struct.pack("<IIQ", _ARRAY, _STRING, len(texts)) + b"".join(texts)
    return struct.pack(f"<IIQ{len(value)}i", _ARRAY, _INT32, len(value), *value)


def encode_header(metadata: Mapping[str, Value], infos: Sequence[bytes]) -> bytes:
    """Everything before the data section, padded to `ALIGNMENT`."""
    pairs = [encode_pair(key, value) for key, value in metadata.items()]
    counts = struct.pack("<IQQ", _VERSION, len(infos), len(pairs))
    head = _MAGIC + counts + b"".join(pairs) + b"".join(infos)
    return head + bytes(-len(head) % ALIGNMENT)
