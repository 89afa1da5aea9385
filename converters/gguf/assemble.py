"""A GGUF from the header of another one and tensor data that is ready: how a mix of types becomes a file.

llama.cpp's own quantizer makes one file for one set of types, from the beginning. A search compares many sets that
differ in a few tensors, and what it measured is what has to be published, so files are put together here from blocks
that ggml made. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgeq.converters.gguf.header import GgufHeader
from edgeq.converters.gguf.quantize import file_type
from edgeq.errors import ConversionError, SourceError
from edgeq.ggml_types import ggml_type, tensor_bytes
from edgeq.gguf_bytes import ALIGNMENT, UINT32, encode_string, encode_tensor_info
from edgeq.staging import disk_full_is_one_line

__all__ = ["assemble", "read_tensor"]

Bytes = npt.NDArray[np.uint8]

_FILE_TYPE, _VERSION = "general.file_type", "general.quantization_version"
_QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION


def read_tensor(header: GgufHeader, name: str) -> Bytes:
    """A tensor's data as it lies in the file: uint8 of (rows, row bytes).

    Raises:
        SourceError: the file has become shorter since its header was read.
    """
    tensor = header.tensors[name]
    count = tensor_bytes(tensor.type, tensor.shape)
    row = ggml_type(tensor.type).row_bytes(tensor.shape[0])
    data = np.fromfile(header.path, np.uint8, count=count, offset=tensor.offset)
    if len(data) != count:
        raise SourceError(f"{header.path.name} ends within {name}", "Convert again when nothing writes to it")
    return data.reshape(-1, row)


def assemble(header: GgufHeader, types: Mapping[str, str], blocks: Callable[[str, str], Bytes], out: Path) -> None:
    """Write a GGUF with these types.

    Args:
        header: whose metadata, tensors and order it gets.
        types: of every tensor.
        blocks: gives a tensor's data in a type; asked once for each tensor, in the file's order.
        out: written anew; removed if anything fails.

    Raises:
        ConversionError: ``blocks`` gave another number of bytes than the type has.
        DiskFullError: no room.
    """
    try:
        with disk_full_is_one_line(out.parent), out.open("wb") as file:
            head = _head(header, types)
            file.write(head + bytes(-len(head) % ALIGNMENT))
            for name, tensor in header.tensors.items():
                data = blocks(name, types[name])
                _check_size(name, types[name], data.nbytes, tensor_bytes(types[name], tensor.shape))
                file.write(data.data)
                file.write(bytes(-data.nbytes % ALIGNMENT))
    except BaseException:
        out.unlink(missing_ok=True)
        raise


def _check_size(name: str, type_name: str, found: int, expected: int) -> None:
    if found != expected:
        raise ConversionError(
            f"{name} has {found} bytes as {type_name}, {expected} belong there", "Report this with the model's name"
        )


def _head(header: GgufHeader, types: Mapping[str, str]) -> bytes:
    """Everything before the data: counts, metadata, and one entry for each tensor."""
    infos, offset = [], 0
    for name, tensor in header.tensors.items():
        infos.append(encode_tensor_info(name, tensor.shape, ggml_type(types[name]).id, offset))
        size = tensor_bytes(types[name], tensor.shape)
        offset += size + -size % ALIGNMENT
    old_infos = sum(len(encode_tensor_info(name, tensor.shape, 0, 0)) for name, tensor in header.tensors.items())
    with header.path.open("rb") as file:
        magic_and_version = file.read(8)
        _n_tensors, n_keys = struct.unpack("<QQ", file.read(16))
        keys = bytearray(file.read(header.end - old_infos - 24))
    numbers = {_FILE_TYPE: file_type(types, header), _VERSION: _QUANTIZATION_VERSION}
    for key, value in numbers.items():
        entry = encode_string(key) + struct.pack("<I", UINT32)
        if key in header.metadata:
            place = keys.find(entry)
            if place < 0:
                raise ConversionError(f"{header.path.name} has a {key} that is no uint32", "Convert the model again")
            struct.pack_into("<I", keys, place + len(entry), value)
        else:
            keys += entry + struct.pack("<I", value)
            n_keys += 1
    return magic_and_version + struct.pack("<QQ", len(infos), n_keys) + bytes(keys) + b"".join(infos)
