"""A Hugging Face folder to one GGUF file, without torch: header first, then every tensor streamed through.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. ``gguf.GGUFWriter`` writes the header; the data are
written here, in order and in pieces, so that memory stays at a few pieces whatever the model's size.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import math
import os
import shutil
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from edgeq.converters.gguf.architectures import ARCHITECTURES
from edgeq.converters.gguf.architectures.base import Value
from edgeq.converters.gguf.config import read_license
from edgeq.converters.gguf.layout import FloatType, Layout, PlannedTensor, plan_layout
from edgeq.converters.gguf.tokenizer import fitting_name, read_tokenizer, write_tokenizer
from edgeq.converters.gguf.weights import OutOfRangeError, chunks
from edgeq.errors import ConversionError, DiskFullError
from edgeq.ggml_types import ggml_type
from edgeq.units import format_bytes

if TYPE_CHECKING:
    import gguf

__all__ = ["ExportResult", "add_key", "export_gguf", "export_skeleton", "supported_architectures"]

Progress = Callable[[int, int, str], None]

_ALIGNMENT = 32
# enum llama_ftype: all f32, mostly f16, mostly bf16.
_FILE_TYPES = {"f32": 0, "f16": 1, "bf16": 32}


@dataclasses.dataclass(frozen=True)
class ExportResult:
    """A finished GGUF.

    Attributes:
        path: of the file.
        file_bytes: its size.
        tensors: GGUF name to (name in ``edgeq.ggml_types``, shape in ggml's order), in the order of the file.
        notes: what a user must know, one line each.
    """

    path: Path
    file_bytes: int
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    notes: tuple[str, ...]


def supported_architectures() -> list[str]:
    """The names in config.json's ``architectures`` that can be converted, sorted."""
    return ARCHITECTURES.names()


def export_gguf(
    folder: Path, out: Path, *, float_type: FloatType = "source", progress: Progress | None = None
) -> ExportResult:
    """Convert a Hugging Face folder.

    Matrices are stored as ``float_type`` says, ``"source"`` keeps the dtype of each; vectors and norms are f32. A
    matrix with weights beyond the range of f16 is stored as bf16, with a note. The file appears under its name when it
    is complete.

    Args:
        folder: config.json, safetensors and tokenizer.
        out: the file to write; one that exists is replaced.
        float_type: ``"source"``, ``"f16"``, ``"bf16"`` or ``"f32"``.
        progress: called with bytes written, bytes in total and the tensor's name.

    Raises:
        SourceError: the model is damaged, contradicts itself, or holds NaN or infinite weights.
        UnsupportedModelError: its architecture or tokenizer cannot be converted.
        DiskFullError: no room; nothing is left behind.
        ConversionError: the output cannot be written, or a weight fits no 16-bit type.
    """
    layout = plan_layout(folder, float_type)
    report = progress or _no_progress
    with _temporary(out, sum(planned.nbytes for planned in layout.tensors)) as part:
        header_bytes, vocabulary_notes = _write_header(part, folder, layout)
        starts, total = _place(layout, header_bytes)
        if shutil.disk_usage(part.parent).free < total - header_bytes:
            raise _disk_full(out, part, total)
        types: dict[str, str] = {}
        notes = [*vocabulary_notes]
        with part.open("r+b") as stream:
            for planned, start in zip(layout.tensors, starts, strict=True):
                used = _write_tensor(stream, layout, planned, start, lambda done, name: report(done, total, name))
                types[planned.name] = used
                if used != planned.type:
                    notes.append(f"{planned.name} holds weights beyond the range of {planned.type}: stored as {used}")
            stream.truncate(total)
            _patch_types(stream, layout, types, header_bytes)
    return _result(out, layout, total, types, tuple(notes))


def export_skeleton(folder: Path, out: Path, *, float_type: FloatType = "source") -> ExportResult:
    """The same header as `export_gguf` with a hole for data, made without reading weights.

    llama.cpp loads it without its tensors (``llama_model_quantize`` with ``dry_run``), so a plan can be made for a
    model of any size in an instant. The one difference to the real file: a matrix that turns out to exceed the range of
    f16 has its type here as it was asked for.

    Raises:
        SourceError, UnsupportedModelError, DiskFullError, ConversionError: as `export_gguf`.
    """
    layout = plan_layout(folder, float_type)
    with _temporary(out, 0) as part:
        header_bytes, notes = _write_header(part, folder, layout)
        _, total = _place(layout, header_bytes)
        os.truncate(part, total)
    return _result(out, layout, total, {planned.name: planned.type for planned in layout.tensors}, notes)


def _result(out: Path, layout: Layout, total: int, types: Mapping[str, str], notes: tuple[str, ...]) -> ExportResult:
    tensors = {planned.name: (types[planned.name], planned.ggml_shape) for planned in layout.tensors}
    return ExportResult(out, total, tensors, (*layout.settings.notes, *notes))


@contextlib.contextmanager
def _temporary(out: Path, data_bytes: int) -> Iterator[Path]:
    """A file beside ``out`` that takes its name at the end, or vanishes; errors of the disk become one line."""
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(out)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(out, part, data_bytes) from error
        raise ConversionError(f"{out} cannot be written: {error.strerror}", "Choose another output") from error
    finally:
        part.unlink(missing_ok=True)


def _disk_full(out: Path, part: Path, needed_bytes: int) -> DiskFullError:
    needed = f" {format_bytes(needed_bytes)} needed," if needed_bytes else ""
    # What has been written so far is given back in a moment.
    free = shutil.disk_usage(out.parent).free + (part.stat().st_blocks * 512 if part.exists() else 0)
    return DiskFullError(
        f"No room for {out}:{needed} {format_bytes(free)} free", "Free some space or choose another disk"
    )


def _no_progress(_done: int, _total: int, _tensor: str) -> None:
    pass


def _pad(offset: int) -> int:
    return (offset + _ALIGNMENT - 1) // _ALIGNMENT * _ALIGNMENT


def _place(layout: Layout, header_bytes: int) -> tuple[list[int], int]:
    """Where in the file each tensor begins, and the size of the file."""
    position = _pad(header_bytes)
    starts = []
    for planned in layout.tensors:
        starts.append(position)
        position = _pad(position + planned.nbytes)
    return starts, position


def _write_header(part: Path, folder: Path, layout: Layout) -> tuple[int, tuple[str, ...]]:
    """Everything before the data. Returns its length in bytes, before the padding, and notes on the vocabulary."""
    import gguf

    writer = gguf.GGUFWriter(part, layout.architecture.gguf)
    try:
        spec = read_tokenizer(folder, n_vocab=layout.n_vocab, architecture=layout.architecture.gguf)
        writer.add_name(fitting_name(_model_name(folder), spec))
        _add_keys(writer, folder, layout)
        write_tokenizer(writer, spec)
        for planned in layout.tensors:
            kind = gguf.GGMLQuantizationType(ggml_type(planned.type).id)
            writer.add_tensor_info(planned.name, planned.shape, np.dtype(np.float32), planned.nbytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()
    return part.stat().st_size, spec.notes


def _add_keys(writer: gguf.GGUFWriter, folder: Path, layout: Layout) -> None:
    import gguf

    writer.add_type(gguf.GGUFType.MODEL)
    n_params = layout.checkpoint.n_params
    writer.add_size_label(gguf.size_label(n_params, n_params, 0, 0))
    model_license = read_license(folder)
    if model_license is not None:
        writer.add_license(model_license)
    writer.add_file_type(_FILE_TYPES[_main_type(layout)])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in layout.settings.keys.items():
        add_key(writer, f"{layout.architecture.gguf}.{key}", value)


def add_key(writer: gguf.GGUFWriter, key: str, value: Value) -> None:
    """Add a value under its full name, in the type that llama.cpp reads it as."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _model_name(folder: Path) -> str:
    """The folder's name; in the hub's cache, where folders are commits, the repository's."""
    folder = folder.absolute()
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        return folder.parent.parent.name.rsplit("--", maxsplit=1)[-1]
    return folder.name


def _main_type(layout: Layout) -> str:
    """The type of most weights in matrices."""
    weights: Counter[str] = Counter()
    for planned in layout.tensors:
        if len(planned.shape) > 1:
            weights[planned.type] += math.prod(planned.shape)
    return weights.most_common(1)[0][0]


def _write_tensor(
    stream: BinaryIO, layout: Layout, planned: PlannedTensor, start: int, report: Callable[[int, str], None]
) -> str:
    """Write one tensor's data at ``start``. Returns the type that it got."""

    def write(kind: str) -> str:
        stream.seek(start)
        for piece in chunks(layout.checkpoint, planned, kind):
            stream.write(np.ascontiguousarray(piece).data)
            report(stream.tell(), planned.name)
        return kind

    try:
        return write(planned.type)
    except OutOfRangeError:
        if planned.type != "f16":
            raise
        # As long as f16, so that nothing after it moves.
        return write("bf16")


def _patch_types(stream: BinaryIO, layout: Layout, types: Mapping[str, str], header_bytes: int) -> None:
    """Correct the tensor infos, which end the header, for tensors that got another type than planned."""
    # Name (length and bytes), number of dimensions, dimensions, type, offset.
    sizes = [8 + len(planned.name.encode()) + 4 + 8 * len(planned.shape) + 4 + 8 for planned in layout.tensors]
    position = header_bytes - sum(sizes)
    for planned, size in zip(layout.tensors, sizes, strict=True):
        position += size
        if types[planned.name] != planned.type:
            stream.seek(position - 12)
            stream.write(struct.pack("<I", ggml_type(types[planned.name]).id))
