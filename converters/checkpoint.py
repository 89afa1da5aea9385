"""Safetensors checkpoints, one file or many, read lazily: opening reads headers only, weights come by ranges of rows.

Format: https://github.com/huggingface/safetensors#format. Eight bytes with the length of a JSON header, the header, the
data of all tensors without a gap. Weights are read with plain file reads, because pages of a memory map count as
resident memory.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from edgeq.errors import SourceError, UnsupportedModelError
from edgeq.units import format_bytes

__all__ = ["Checkpoint", "RawArray", "TensorEntry"]

RawArray: TypeAlias = "npt.NDArray[np.float32 | np.float16 | np.uint16]"

# The limit that the safetensors library itself sets; a 400-billion-parameter model needs about 0.2 MB.
_MAX_HEADER_BYTES = 100_000_000
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_ADAPTER = "adapter_model.safetensors"
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.safetensors$")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.bin.index.json")

_DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip
_NUMPY: dict[str, np.dtype[np.float32 | np.float16 | np.uint16]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}

_Size = Annotated[int, msgspec.Meta(ge=0, le=2**48)]


class _RawEntry(msgspec.Struct, frozen=True):
    dtype: str
    shape: tuple[_Size, ...]
    data_offsets: tuple[_Size, _Size]


class _Index(msgspec.Struct, frozen=True):
    weight_map: dict[str, str]


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies.

    Attributes:
        name: as in the checkpoint.
        dtype: safetensors' name; only ``F32``, ``F16`` and ``BF16`` can be read.
        shape: in the checkpoint's (PyTorch's) order, rows first.
        file: that holds it.
        offset: of its first byte from the start of the file.
        nbytes: of its data.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int

    @property
    def readable(self) -> bool:
        """Whether it is of a dtype that edgeq converts."""
        return self.dtype in _NUMPY

    @property
    def numel(self) -> int:
        """Its number of weights."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """All tensors of a model folder by name. Nothing but headers is held in memory.

    Attributes:
        entries: name to place, in the order of files and offsets.
        files: the weight files, sorted by name.
    """

    entries: Mapping[str, TensorEntry]
    files: tuple[Path, ...]

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read the headers of ``model.safetensors``, of the shards in its index, or of all ``*.safetensors``.

        Raises:
            SourceError: no safetensors (a pickle is never read), or files that are truncated or contradict themselves.
        """
        files, index = _find_files(folder)
        entries: dict[str, TensorEntry] = {}
        for file in files:
            for entry in _read_header(file):
                other = entries.get(entry.name)
                if other is not None:
                    raise SourceError(
                        f"{entry.name} is in both {other.file.name} and {file.name}",
                        "Remove the file that does not belong to the model",
                    )
                entries[entry.name] = entry
        for name, file in index.items():
            found = entries.get(name)
            if found is None or found.file != file:
                raise SourceError(
                    f"{_INDEX} says that {name} is in {file.name}, but it is not", "Download the model again"
                )
        if not entries:
            raise SourceError(f"The safetensors in {folder} hold no tensors", "Download the model again")
        return cls(entries, tuple(files))

    @property
    def n_params(self) -> int:
        """Weights in all float tensors."""
        return sum(entry.numel for entry in self.entries.values() if entry.readable)

    @property
    def dtype(self) -> str:
        """``"f32"``, ``"f16"`` or ``"bf16"``: the dtype of most weights.

        Raises:
            UnsupportedModelError: there is no tensor of these types.
        """
        weights: Counter[str] = Counter()
        for entry in self.entries.values():
            if entry.readable:
                weights[entry.dtype.lower()] += entry.numel
        if not weights:
            kinds = sorted({entry.dtype for entry in self.entries.values()})
            raise UnsupportedModelError(
                f"The checkpoint holds only {', '.join(kinds)} tensors", "Use one in F32, F16 or BF16"
            )
        return weights.most_common(1)[0][0]

    def read(self, name: str) -> RawArray:
        """A whole tensor in its own dtype, BF16 as uint16. Raises as `read_rows`."""
        shape = self.entries[name].shape
        return self._read(name, 0, shape[0] if shape else 1)

    def read_rows(self, name: str, start: int, stop: int) -> RawArray:
        """Rows ``start`` to ``stop`` of the first axis, in the tensor's own dtype (BF16 as uint16).

        Raises:
            UnsupportedModelError: the dtype is none of F32, F16, BF16.
            SourceError: the file cannot be read or became shorter.
            IndexError: the rows are not in the tensor.
        """
        return self._read(name, start, stop)

    def _read(self, name: str, start: int, stop: int) -> RawArray:
        entry = self.entries[name]
        kind = _NUMPY.get(entry.dtype)
        if kind is None:
            raise UnsupportedModelError(
                f"{name} is of dtype {entry.dtype}", "Use a checkpoint in F32, F16 or BF16 (an unquantized one)"
            )
        rows = entry.shape[0] if entry.shape else 1
        if not 0 <= start <= stop <= rows:
            message = f"rows {start}:{stop} of {name}, which has {rows}"
            raise IndexError(message)
        row_bytes = entry.nbytes // rows if rows else 0
        shape = (stop - start, *entry.shape[1:]) if entry.shape else ()
        array = np.empty(shape, dtype=kind)
        _read_into(array, entry.file, entry.offset + start * row_bytes)
        return array


def _read_into(array: RawArray, file: Path, offset: int) -> None:
    view = array.reshape(-1).view(np.uint8).data
    try:
        with file.open("rb", buffering=0) as stream:
            stream.seek(offset)
            while view:
                count = stream.readinto(view)
                if not count:
                    raise SourceError(f"{file} became shorter while it was read", "Download the model again")
                view = view[count:]
    except OSError as error:
        raise SourceError(f"{file} cannot be read: {error.strerror}", "Check the file and its permissions") from error


def _find_files(folder: Path) -> tuple[list[Path], dict[str, Path]]:
    """The weight files of a model, and the index of a sharded one (empty otherwise)."""
    if not folder.is_dir():
        raise SourceError(f"{folder} is no folder", "Name a Hugging Face model folder")
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE], {}
    if (folder / _INDEX).is_file():
        index = _read_index(folder)
        return sorted(set(index.values())), index
    files = sorted(file for file in folder.glob("*.safetensors") if file.name != _ADAPTER)
    if not files:
        raise _no_weights(folder)
    _check_shards_complete(files)
    return files, {}


def _no_weights(folder: Path) -> SourceError:
    if (folder / _ADAPTER).is_file():
        return SourceError(
            f"{folder} holds a LoRA adapter, no model",
            "Merge it first: PeftModel.merge_and_unload().save_pretrained(...)",
        )
    for pattern in _PICKLES:
        for file in sorted(folder.glob(pattern)):
            return SourceError(
                f"{folder} holds a pickle checkpoint ({file.name}), which edgeq never opens, because it can run code",
                "Save it as safetensors where you trust it: model.save_pretrained(folder)",
            )
    return SourceError(f"{folder} holds no safetensors", "Name the folder with model.safetensors in it")


def _read_index(folder: Path) -> dict[str, Path]:
    path = folder / _INDEX
    try:
        weight_map = msgspec.json.decode(path.read_bytes(), type=_Index).weight_map
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise SourceError(f"{path} is no index of shards ({error})", "Download the model again") from error
    index = {}
    for name, file_name in weight_map.items():
        # Only the text is judged: in the hub's cache the shard itself is a link to a blob elsewhere.
        parts = PurePosixPath(file_name).parts
        if not parts or parts[0] == "/" or ".." in parts or "\\" in file_name or "\0" in file_name:
            raise SourceError(
                f"{_INDEX} names {file_name!r}, a path that leaves the folder",
                "Use a checkpoint from a source you trust",
            )
        index[name] = folder / file_name
    for file in sorted(set(index.values())):
        if not file.is_file():
            raise SourceError(f"{_INDEX} names {file.name}, which is missing", "Download that file into the folder")
    return index


def _check_shards_complete(files: list[Path]) -> None:
    names = {file.name for file in files}
    for file in files:
        match = _SHARD.search(file.name)
        if match is None:
            continue
        total = int(match[2])
        prefix = file.name[: match.start()]
        for number in range(1, total + 1):
            shard = f"{prefix}-{number:05d}-of-{total:05d}.safetensors"
            if shard not in names:
                raise SourceError(f"{shard} is missing beside {file.name}", "Download that file into the folder")


def _read_header(file: Path) -> Iterator[TensorEntry]:
    """The tensors of one file in the order of their offsets, every size checked against the file's."""
    remedy = "Download that file again"
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > size - 8:
                cause = f"{file} is truncated or no safetensors file: it has {size} bytes, its header says {length}"
                raise SourceError(cause, remedy)
            if length > _MAX_HEADER_BYTES:
                raise SourceError(f"{file} says that its header has {format_bytes(length)}, which is absurd", remedy)
            header = stream.read(length)
    except OSError as error:
        raise SourceError(f"{file} cannot be read: {error.strerror}", "Check the file and its permissions") from error
    try:
        raw = msgspec.json.decode(header, type=dict[str, msgspec.Raw])
        raw.pop("__metadata__", None)
        tensors = {name: msgspec.json.decode(value, type=_RawEntry) for name, value in raw.items()}
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise SourceError(f"The header of {file} is damaged ({error})", remedy) from error
    return iter(_check_layout(file, 8 + length, size, tensors))


def _check_layout(file: Path, start: int, size: int, tensors: Mapping[str, _RawEntry]) -> list[TensorEntry]:
    """Entries whose bytes follow each other without gap or overlap and end with the file."""
    remedy = "Download that file again"
    position = 0
    entries = []
    for name, raw in sorted(tensors.items(), key=lambda item: item[1].data_offsets):
        begin, end = raw.data_offsets
        bits = _DTYPE_BITS.get(raw.dtype)
        if bits is None:
            raise SourceError(f"{file.name}: {name} is of the unknown dtype {raw.dtype!r}", "Use F32, F16 or BF16")
        if (end - begin) * 8 != math.prod(raw.shape) * bits:
            shape = "x".join(str(n) for n in raw.shape) or "scalar"
            raise SourceError(f"{file.name}: {name} ({shape} {raw.dtype}) does not have {end - begin} bytes", remedy)
        if begin != position:
            what = "overlaps the tensor before it" if begin < position else "leaves a gap before it"
            raise SourceError(f"{file.name}: {name} {what}", remedy)
        if start + end > size:
            cause = f"{file} is truncated: {name} ends at byte {start + end}, the file at {size}"
            raise SourceError(cause, remedy)
        entries.append(TensorEntry(name, raw.dtype, raw.shape, file, start + begin, end - begin))
        position = end
    if start + position != size:
        raise SourceError(f"{file} has {size - start - position} bytes after its last tensor", remedy)
    return entries
