"""Quantize through llama.cpp itself, ask for every tensor by name, and check the written file tensor by tensor.

llama.cpp changes types on its own: rows that a block does not divide fall back to another type, presets mix types by
rules of their own, and with a float file type overrides are ignored. So what a preset means is asked of llama.cpp's dry
run first, the plan names a type for every tensor, and each goes down as an anchored override.
"""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

from edgeq.converters.gguf.header import GgufHeader, read_header
from edgeq.converters.gguf.imatrix import ImportanceMatrix, check_matches
from edgeq.converters.gguf.presets import PRESETS, Preset, preset_of_type
from edgeq.errors import ConversionError, UsageError
from edgeq.ggml_types import ggml_type, tensor_bytes
from edgeq.llama_library import capture_log, check_threads, interruptible, library
from edgeq.staging import disk_full_is_one_line
from edgeq.types import Fallback

__all__ = ["Preview", "assert_types", "file_type", "preview", "quantizable_tensors", "quantize"]

# "[  1/ 272] token_embd.weight - [576, 49152, 1, 1], type = f16, size = 54.0 MiB -> 28.7 MiB (q8_0)"
_TENSOR_LINE = re.compile(
    r"\[\s*\d+/\s*\d+\]\s+(?P<name>\S+)\s+-\s+\[[^\]]*\],\s+type =\s*(?P<old>\S+),\s+"
    r"size =\s*[\d.]+ MiB(?:\s*->\s*[\d.]+ MiB \((?P<new>\S+)\))?"
)
_FALLBACK_LINE = re.compile(
    r"(?P<name>\S+)\s+- ncols\s+(?P<ncols>\d+) not divisible by\s+(?P<block>\d+) \(required for type\s+(?P<want>\S+)\)"
    r".*?-> falling back to\s+(?P<got>\S+)",
    re.DOTALL,
)
_PROGRESS_LINE = re.compile(r"\[\s*(\d+)/\s*(\d+)\]\s+(\S+)")
_MAX_BUFFER_BYTES = 256 << 20  # llama.cpp's own default is 8 GiB

Progress = Callable[[int, int, str], None]


@dataclasses.dataclass(frozen=True)
class Preview:
    """What llama.cpp would write.

    Attributes:
        types: of every tensor, in the file's order.
        fallbacks: where a tensor's rows forbade the type that was meant.
    """

    types: Mapping[str, str]
    fallbacks: tuple[Fallback, ...]


def preview(source: Path, preset: Preset, *, imatrix: ImportanceMatrix | None = None) -> Preview:
    """Ask llama.cpp what a preset would make of a file, without quantizing anything.

    Args:
        source: a float GGUF, or a skeleton of one; only its header is read.
        preset: the preset.
        imatrix: what it will be quantized with; some presets give other types then.

    Raises:
        ConversionError: llama.cpp refuses the file or logs something that edgeq cannot read.
    """
    header = read_header(source)
    params = _params(library(), preset.ftype)
    params.dry_run = True
    if imatrix is not None:
        params.imatrix = _imatrix_array(library(), imatrix)
    text = "\n".join(_run(source, Path(os.devnull), params))
    types = {m["name"]: (m["new"] or m["old"]).lower() for m in _TENSOR_LINE.finditer(text)}
    if types.keys() != header.tensors.keys():
        raise ConversionError(
            f"llama.cpp's dry run named {len(types)} of {len(header.tensors)} tensors",
            "Install a llama-cpp-python that edgeq was tested with: pip install 'llama-cpp-python==0.3.36'",
        )
    fallbacks = tuple(
        Fallback(
            tensor=m["name"],
            wanted=m["want"].lower(),
            got=m["got"].lower(),
            reason=f"rows of {m['ncols']} weights are no multiple of {m['block']}",
        )
        for m in _FALLBACK_LINE.finditer(text)
    )
    return Preview({name: types[name] for name in header.tensors}, fallbacks)


def quantizable_tensors(source: Path) -> frozenset[str]:
    """Tensors whose type llama.cpp lets one choose: those that a preset changes, which norms and biases never are."""
    header = read_header(source)
    would_be = preview(source, PRESETS["q8_0"]).types
    return frozenset(name for name, tensor in header.tensors.items() if would_be[name] != tensor.type)


def quantize(
    source: Path,
    out: Path,
    types: Mapping[str, str],
    *,
    imatrix: ImportanceMatrix | None = None,
    threads: int = 0,
    progress: Progress | None = None,
) -> None:
    """Write ``out`` with exactly these types, then read it again and check every tensor.

    Args:
        source: a float GGUF.
        out: written anew; removed if anything fails.
        types: of every tensor in ``source``; those that stay as they are may be named too.
        imatrix: of this model; None lets every column of a matrix count the same.
        threads: 0 for all cores.
        progress: told tensors done, tensors in all, and the name of the one in work.

    Raises:
        UsageError: more threads than llama.cpp takes, an ``imatrix`` of another model, or a type that needs an entry
            which it does not have.
        ConversionError: llama.cpp failed, or the file is not what was asked for.
        DiskFullError: no room.
    """
    if threads:
        check_threads(threads)
    lib = library()
    header = read_header(source)
    params = _params(lib, file_type(types, header))
    params.nthread = threads
    _refuse_unweighted(types, header, imatrix)
    params.tt_overrides = _override_array(lib, types)  # the structure keeps what it points to alive
    if imatrix is not None:
        params.imatrix = _imatrix_array(lib, imatrix)
    try:
        with disk_full_is_one_line(out.parent):
            _run(source, out, params, progress)
            _refuse_short(out, header, types)
        assert_types(out, types)
    except BaseException:
        out.unlink(missing_ok=True)
        raise


def assert_types(path: Path, types: Mapping[str, str]) -> None:
    """Read a GGUF's header again and compare it with the plan.

    Raises:
        ConversionError: a tensor is missing, is there though nobody asked, or has another type; the first is named.
    """
    found = {name: tensor.type for name, tensor in read_header(path).tensors.items()}
    wrong = [name for name in types if found.get(name) != types[name]] + [n for n in found if n not in types]
    if wrong:
        name = wrong[0]
        raise ConversionError(
            f"{path.name} has {name} as {found.get(name, 'nothing')}, the plan says {types.get(name, 'nothing')}"
            f" ({len(wrong)} tensors differ)",
            "Report this with the model's name; llama.cpp did not do what it was told",
        )


def file_type(types: Mapping[str, str], header: GgufHeader) -> int:
    """The ``general.file_type``: the most common type of the matrices, but a float one only if all have it.

    With a float file type llama.cpp ignores overrides, so a mix of floats must be called by some block type.
    """
    weights: Counter[str] = Counter()
    for name, kind in types.items():
        if len(header.tensors[name].shape) > 1:
            weights[kind] += header.tensors[name].n_params
    blocks = [kind for kind, _ in weights.most_common() if not ggml_type(kind).is_float]
    uniform = next(iter(weights)) if len(weights) == 1 else "q8_0"
    main = blocks[0] if blocks else uniform
    preset = preset_of_type(main)
    if preset is None:
        raise ConversionError(f"llama.cpp has no file type for {main}", "Choose another type for most tensors")
    return preset.ftype


def _params(lib: ModuleType, ftype: int) -> ctypes.Structure:
    params: ctypes.Structure = lib.llama_model_quantize_default_params()
    params.ftype = ftype
    params.max_buf_size = _MAX_BUFFER_BYTES
    return params


def _override_array(lib: ModuleType, types: Mapping[str, str]) -> ctypes.Array[ctypes.Structure]:
    """One anchored pattern for each tensor, ended by a null entry."""
    entry = lib.llama_model_tensor_override
    array: ctypes.Array[ctypes.Structure] = (entry * (len(types) + 1))()
    for index, (name, kind) in enumerate(types.items()):
        array[index] = entry(_anchored(name).encode(), ggml_type(kind).id)
    return array


def _refuse_unweighted(types: Mapping[str, str], header: GgufHeader, imatrix: ImportanceMatrix | None) -> None:
    """Some types end the process without an importance matrix, and llama.cpp lets the embedding get there."""
    changed = [name for name, kind in types.items() if name in header.tensors and kind != header.tensors[name].type]
    if imatrix is not None:
        check_matches(imatrix, header, changed)
    for name in changed:
        if ggml_type(types[name]).needs_imatrix and (imatrix is None or name not in imatrix.entries):
            raise UsageError(
                f"{name} cannot become {types[name]} without an entry in an importance matrix",
                "Give one of this model with --imatrix, or another type for this tensor",
            )


def _imatrix_array(lib: ModuleType, imatrix: ImportanceMatrix) -> ctypes.Array[ctypes.Structure]:
    """One entry for each tensor, ended by a null entry. It owns the values, for as long as C may read them."""
    entry = lib.llama_model_imatrix_data
    array: ctypes.Array[ctypes.Structure] = (entry * (len(imatrix.entries) + 1))()
    for index, (name, activations) in enumerate(imatrix.entries.items()):
        values = activations.mean_squares
        owned = (ctypes.c_float * values.size).from_buffer_copy(values.tobytes())
        array[index] = entry(name.encode("utf-8", errors="surrogateescape"), owned, values.size)
    return array


def _anchored(name: str) -> str:
    """A ``std::regex`` (ECMAScript) that matches exactly this name."""
    return "^" + re.sub(r"([.^$*+?()\[\]{}|\\])", r"\\\1", name) + "$"


def _run(source: Path, out: Path, params: ctypes.Structure, progress: Progress | None = None) -> list[str]:
    """Call ``llama_model_quantize`` and return the lines of its log.

    Raises:
        ConversionError: it failed; the cause is its first error line.
        OSError: it could not write.
    """

    def poll() -> None:
        if progress is not None:
            _report(lines, progress)

    with capture_log() as lines:
        code = interruptible(
            lambda: library().llama_model_quantize(os.fsencode(source), os.fsencode(out), ctypes.byref(params)),
            poll=poll,
        )
    if code != 0:
        cause = lines.cause("no reason given").removeprefix("failed to quantize: ")
        if "iostream error" in cause:  # all that C++ says of a failed write
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(out))
        raise ConversionError(f"llama.cpp refused to quantize {source.name}: {cause}", "Choose another preset or model")
    return lines


def _report(lines: list[str], progress: Progress) -> None:
    """Turn the newest line of llama.cpp's log that tells of progress into a call."""
    for line in reversed(lines):
        if match := _PROGRESS_LINE.match(line):
            progress(int(match[1]), int(match[2]), match[3])
            return


def _refuse_short(out: Path, header: GgufHeader, types: Mapping[str, str]) -> None:
    """llama.cpp does not notice every failed write; a file that is too short means that the disk was full."""
    data_bytes = sum(tensor_bytes(types[name], tensor.shape) for name, tensor in header.tensors.items())
    if out.stat().st_size < data_bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(out))
