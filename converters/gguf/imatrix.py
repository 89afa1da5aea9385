"""Importance matrices: how strongly each column of a weight is used, and llama.cpp's files of them.

The quantizers weigh the squared error of a weight by the mean square of the activation that it is multiplied with.
Format: ``tools/imatrix`` of llama.cpp writes a GGUF of ``general.type = "imatrix"`` with two F32 tensors a weight,
``NAME.in_sum2`` (sums of squares) and ``NAME.counts`` (tokens), one row for each merged matrix.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import hashlib
import os
import re
import secrets
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgeq.converters.gguf.header import GgufHeader, GgufTensor, read_header
from edgeq.converters.gguf.imatrix_legacy import read_legacy
from edgeq.errors import ConversionError, SourceError, UsageError
from edgeq.staging import disk_full_is_one_line

__all__ = ["Activations", "ImportanceMatrix", "check_matches", "read_imatrix", "write_imatrix"]

Floats = npt.NDArray[np.float32]

_SUMS, _COUNTS = ".in_sum2", ".counts"
_DATASETS, _CHUNK_COUNT, _CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
_MAX_NAME_BYTES = 63  # GGML_MAX_NAME without the closing zero
_ALIGNMENT = 32
_U32, _STRING, _ARRAY, _F32 = 4, 8, 9, 0  # numbers of types in a GGUF
_BLOCK = re.compile(r"blk\.(\d+)\.")


@dataclasses.dataclass(frozen=True)
class Activations:
    """What one tensor was multiplied with.

    Attributes:
        sums: float32 of (n_matrices, n_columns), sums of squared activations; more than one row for merged experts.
        counts: int64 of (n_matrices,), how many activations each row sums.
    """

    sums: Floats
    counts: npt.NDArray[np.int64]

    def __post_init__(self) -> None:
        """Refuse shapes that do not fit, and guard the arrays against writing."""
        if self.sums.ndim != 2 or self.counts.shape != self.sums.shape[:1] or not self.sums.size:
            message = f"sums of {self.sums.shape} and counts of {self.counts.shape}"
            raise ValueError(message)
        for array in (self.sums, self.counts):
            array.flags.writeable = False

    @property
    def mean_squares(self) -> Floats:
        """Mean squared activations, float32 of (n_matrices, n_columns), all positive; see `ImportanceMatrix`."""
        return np.stack([_filled(row, int(count)) for row, count in zip(self.sums, self.counts, strict=True)])


@dataclasses.dataclass(frozen=True)
class ImportanceMatrix:
    """Sums of squared activations of a model's matrices over a text.

    Weights never vanish. A matrix that saw no token (an expert that was never routed to) has ones, as in llama.cpp.
    A column that was zero for every token has the smallest weight among the other columns of its matrix: with the
    zero that llama.cpp gives it, a block of such columns would be written as zeros, though another text may use them.

    Attributes:
        entries: by the tensor's name; a tied output matrix goes by the name of the embedding.
        chunk_count: pieces of text that were run.
        chunk_tokens: tokens in the longest of them; 0 where a file of the old format does not tell.
        datasets: what the text was called.
    """

    entries: Mapping[str, Activations]
    chunk_count: int
    chunk_tokens: int
    datasets: tuple[str, ...] = ()

    def weights(self, name: str) -> Floats | None:
        """Importance of each column, float32 of (n_columns,) and positive, or None without an entry.

        For merged experts it is that of all tokens together; `matrix_weights` has each expert's.
        """
        entry = self.entries.get(name)
        if entry is None:
            return None
        return _filled(entry.sums.sum(axis=0, dtype=np.float64), int(entry.counts.sum()))

    def matrix_weights(self, name: str) -> Floats | None:
        """Importance by matrix and column, float32 of (n_matrices, n_columns) and positive, or None without an entry.

        Flattened it is what ``llama_model_quantize`` takes.
        """
        entry = self.entries.get(name)
        return None if entry is None else entry.mean_squares

    @functools.cached_property
    def sha256(self) -> str:
        """Of names, sums and counts, so that a copy in another file, or with other dataset names, has the same."""
        digest = hashlib.sha256()
        for name in sorted(self.entries):
            entry = self.entries[name]
            digest.update(f"{name}\0{entry.sums.shape}\0".encode("utf-8", errors="surrogateescape"))
            digest.update(entry.counts.astype("<i8").tobytes())
            digest.update(entry.sums.astype("<f4").tobytes())
        return digest.hexdigest()


def _filled(sums: npt.NDArray[np.floating], count: int) -> Floats:
    """Means of (n_columns,), with neutral weights where there is nothing to average."""
    means = np.asarray(sums / max(count, 1), np.float32)
    used = means > 0
    if count <= 0 or not used.any():
        return np.ones_like(means)
    return np.where(used, means, means[used].min())


def check_matches(matrix: ImportanceMatrix, header: GgufHeader, needed_names: Iterable[str]) -> list[str]:
    """Make sure that an importance matrix is of this model.

    Args:
        matrix: to be used.
        header: of the model's GGUF.
        needed_names: tensors that will be quantized with it.

    Returns:
        What is missing in it though it is of this model, one line each: matrices without an entry, experts and
        columns that the text never used.

    Raises:
        UsageError: a name that the model does not have, another length, or layers without any entry.
    """
    needed = list(needed_names)
    known = [name for name in matrix.entries if name in header.tensors]
    of_all = f"{len(known)} of its {len(matrix.entries)} names are in {header.path.name}"
    sizes = [(name, matrix.entries[name].sums.size, _quantizer_size(header.tensors[name])) for name in known]
    wrong = [(name, found, expected) for name, found, expected in sizes if found != expected]
    foreign = [name for name in matrix.entries if name not in header.tensors]
    remedy = "Collect one of this model, or leave out --imatrix"
    if wrong:
        name, found, expected = wrong[0]
        raise UsageError(
            f"The importance matrix is of another model: {of_all}, but {name} has {found} columns there and {expected} "
            f"in the model ({len(wrong)} lengths differ)",
            remedy,
        )
    if foreign or not known:
        example = f", {foreign[0]} for example is not" if foreign else ""
        raise UsageError(f"The importance matrix is of another model: {of_all}{example}", remedy)
    layers, covered = _layers(needed), _layers(known)
    if not layers <= covered:
        raise UsageError(
            f"The importance matrix is of another model: it has {len(layers & covered)} of {len(layers)} layers, "
            f"layer {min(layers - covered)} for example is missing",
            remedy,
        )
    return list(_gaps(matrix, needed))


def _quantizer_size(tensor: GgufTensor) -> int:
    """How many values llama.cpp's quantizer wants for a tensor: a row for each matrix of a 3D tensor."""
    return tensor.shape[0] * (tensor.shape[2] if len(tensor.shape) > 2 else 1)


def _layers(names: Iterable[str]) -> set[int]:
    return {int(match[1]) for name in names if (match := _BLOCK.match(name))}


def _gaps(matrix: ImportanceMatrix, needed: list[str]) -> Iterator[str]:
    missing = [name for name in needed if name not in matrix.entries]
    if missing:
        yield (
            f"The importance matrix has no entry for {len(missing)} of {len(needed)} matrices ({missing[0]} is the "
            "first): all their columns count the same"
        )
    for name in needed:
        entry = matrix.entries.get(name)
        if entry is None:
            continue
        unused = int(np.count_nonzero(entry.counts <= 0))
        if unused:
            yield f"The calibration text never used {unused} of the {len(entry.counts)} matrices in {name}"
        used = entry.sums[entry.counts > 0]
        dead = int(np.count_nonzero(used == 0))
        if dead:
            yield f"The calibration text left {dead} of the {used.size} columns of {name} at zero"


def read_imatrix(path: Path) -> ImportanceMatrix:
    """Read an importance matrix of `write_imatrix` or of ``llama-imatrix``, in its GGUF or its old ``.dat`` format.

    Raises:
        SourceError: it cannot be read, is truncated, is a model, or holds values that no sum of squares can have.
    """
    try:
        with path.open("rb") as file:
            is_gguf = file.read(4) == b"GGUF"
        if not is_gguf:
            entries, chunk_count, datasets = read_legacy(path)
            return ImportanceMatrix(
                {name: _entry(path, name, *pair) for name, pair in entries.items()}, chunk_count, 0, datasets
            )
        return _read_gguf(read_header(path))
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}", "Check the path and its permissions") from error


def _read_gguf(header: GgufHeader) -> ImportanceMatrix:
    path, metadata = header.path, header.metadata
    if metadata.get("general.type") != "imatrix":
        raise SourceError(
            f"{path} is a GGUF, but no importance matrix (its general.type is {metadata.get('general.type')!r})",
            "Give a file that llama-imatrix or edgeq wrote",
        )
    datasets = metadata.get(_DATASETS)
    if not isinstance(datasets, list):
        raise _invalid(path, f"it has no {_DATASETS}")
    tensors = [tensor for tensor in header.tensors.values() if tensor.name.endswith((_SUMS, _COUNTS))]
    # Entries may share bytes of a hostile file, and would then take more memory than it has.
    if sum(tensor.n_params * 4 for tensor in tensors) > header.file_bytes:
        raise _invalid(path, "its tensors overlap")
    names = [tensor.name.removesuffix(_SUMS) for tensor in tensors if tensor.name.endswith(_SUMS)]
    if not names or 2 * len(names) != len(tensors):
        raise _invalid(path, f"it has {len(names)} sums and {len(tensors) - len(names)} counts")
    entries = {}
    with path.open("rb") as file:
        for name in names:
            sums, counts = (_floats(file.fileno(), header, name + suffix) for suffix in (_SUMS, _COUNTS))
            if not counts.size or sums.size % counts.size:
                raise _invalid(path, f"{name} has {sums.size} sums and {counts.size} counts")
            entries[name] = _entry(path, name, sums.reshape(counts.size, -1), counts)
    return ImportanceMatrix(
        entries, _unsigned(header, _CHUNK_COUNT), _unsigned(header, _CHUNK_SIZE), tuple(map(str, datasets))
    )


def _floats(file: int, header: GgufHeader, name: str) -> Floats:
    """A tensor's data, float32 of (n,)."""
    tensor = header.tensors.get(name)
    if tensor is None or tensor.type != "f32":
        raise _invalid(header.path, f"{name} is {'missing' if tensor is None else tensor.type}, not f32")
    data = os.pread(file, tensor.n_params * 4, tensor.offset)
    if len(data) != tensor.n_params * 4:
        raise _invalid(header.path, f"it ends within {name}")
    return np.frombuffer(data, "<f4").astype(np.float32)


def _unsigned(header: GgufHeader, key: str) -> int:
    value = header.metadata.get(key)
    if not isinstance(value, int) or not 0 <= value < 2**32:
        raise _invalid(header.path, f"its {key} is {value!r}")
    return int(value)


def _entry(path: Path, name: str, sums: Floats, counts: Floats) -> Activations:
    if not sums.size or not (np.isfinite(sums).all() and np.isfinite(counts).all()):
        raise _invalid(path, f"{name} is empty, or holds NaN or infinite values")
    if sums.min() < 0 or counts.min() < 0 or counts.max() >= 2**62:
        raise _invalid(path, f"{name} holds values that no sum of squares can have")
    return Activations(sums, np.rint(counts).astype(np.int64))


def _invalid(path: Path, what: str) -> SourceError:
    return SourceError(f"{path} is no valid importance matrix: {what}", "Copy or collect it again")


def write_imatrix(matrix: ImportanceMatrix, path: Path) -> None:
    """Write a file that ``llama-quantize --imatrix`` takes; it appears whole or not at all.

    The same matrix gives the same bytes. A file of the old format that was read is written in the new one.

    Raises:
        ConversionError: a tensor's name is too long for the format, or the system refuses to write.
        DiskFullError: no room.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with disk_full_is_one_line(path.parent), partial.open("xb") as file:
            for piece in _pieces(matrix):
                file.write(piece)
        partial.replace(path)
    except OSError as error:
        cause = error.strerror or os.strerror(error.errno or errno.EIO)
        raise ConversionError(f"{path} cannot be written: {cause}", "Choose another file") from error
    finally:
        partial.unlink(missing_ok=True)


def _pieces(matrix: ImportanceMatrix) -> Iterator[bytes]:
    """The bytes of the file: header, metadata, tensor entries, and data aligned to 32 bytes."""
    arrays: dict[str, Floats] = {}
    for name in sorted(matrix.entries):
        entry = matrix.entries[name]
        arrays[name + _SUMS] = np.ascontiguousarray(entry.sums, "<f4")
        arrays[name + _COUNTS] = entry.counts.astype("<f4")[:, np.newaxis]
    datasets = b"".join(map(_string, matrix.datasets))
    metadata = [
        _string("general.type") + struct.pack("<I", _STRING) + _string("imatrix"),
        _string(_DATASETS) + struct.pack("<IIQ", _ARRAY, _STRING, len(matrix.datasets)) + datasets,
        _string(_CHUNK_COUNT) + struct.pack("<II", _U32, matrix.chunk_count),
        _string(_CHUNK_SIZE) + struct.pack("<II", _U32, matrix.chunk_tokens),
    ]
    infos, offset = [], 0
    for name, array in arrays.items():
        n_matrices, n_columns = array.shape
        infos.append(_tensor_name(name) + struct.pack("<IQQIQ", 2, n_columns, n_matrices, _F32, offset))
        offset += _padded(array.nbytes)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(arrays), len(metadata)) + b"".join(metadata + infos)
    yield head.ljust(_padded(len(head)), b"\0")
    for array in arrays.values():
        yield array.tobytes().ljust(_padded(array.nbytes), b"\0")


def _padded(n_bytes: int) -> int:
    return -(-n_bytes // _ALIGNMENT) * _ALIGNMENT


def _string(text: str) -> bytes:
    data = text.encode("utf-8", errors="surrogateescape")
    return struct.pack("<Q", len(data)) + data


def _tensor_name(name: str) -> bytes:
    if len(name.encode("utf-8", errors="surrogateescape")) > _MAX_NAME_BYTES:
        raise ConversionError(
            f"{name} has more than the {_MAX_NAME_BYTES} bytes that llama.cpp gives a tensor's name",
            "This model's importance matrix cannot be written to a file",
        )
    return _string(name)
