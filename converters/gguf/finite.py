"""Look at every weight of a float GGUF before llama.cpp does: it stops at the first bad one and says little.

llama.cpp's own check prints to stderr from C, past its log, and names neither the tensor's range nor a way out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from edgeq.converters.gguf.header import GgufHeader, GgufTensor
from edgeq.errors import ConversionError, SourceError

__all__ = ["check_weights"]

_CHUNK_BYTES = 16 << 20
_LARGEST_F16 = 65504.0
_STORED: dict[str, np.dtype[Any]] = {"f32": np.dtype("<f4"), "f16": np.dtype("<f2"), "bf16": np.dtype("<u2")}


def check_weights(header: GgufHeader, types: Mapping[str, str], *, finite: bool) -> None:
    """Refuse NaN, infinity, and weights that the planned type cannot hold.

    Args:
        header: of a float GGUF, whose data is read.
        types: what each tensor shall become.
        finite: every weight is known to be finite, so only tensors that narrow to f16 are read.

    Raises:
        SourceError: a tensor holds NaN or infinity; it is named with their number.
        ConversionError: a weight is beyond f16, and its tensor shall be f16.
    """
    with header.path.open("rb") as file:
        for name, tensor in header.tensors.items():
            narrows = types.get(name) == "f16" and tensor.type in ("f32", "bf16")
            if tensor.type not in _STORED or (finite and not narrows):
                continue
            bad, largest = _scan(file, tensor)
            if bad:
                raise SourceError(
                    f"{name} holds {bad} weights that are NaN or infinite", "Use a checkpoint that is not damaged"
                )
            if narrows and largest > _LARGEST_F16:
                raise ConversionError(
                    f"{name} holds a weight of {largest:.3g}, and f16 ends at {_LARGEST_F16:.0f}",
                    "Choose --quant bf16, or q8_0 or smaller",
                )


def _scan(file: BinaryIO, tensor: GgufTensor) -> tuple[int, float]:
    """How many weights are not finite, and the largest magnitude of the others."""
    bad, largest = 0, 0.0
    for values in _chunks(file, tensor):
        finite = np.isfinite(values)
        n_bad = int(values.size - np.count_nonzero(finite))
        bad += n_bad
        magnitudes = np.abs(values[finite] if n_bad else values)
        if magnitudes.size:
            largest = max(largest, float(magnitudes.max()))
    return bad, largest


def _chunks(file: BinaryIO, tensor: GgufTensor) -> Iterator[npt.NDArray[np.floating]]:
    stored = _STORED[tensor.type]
    left = tensor.n_params * stored.itemsize
    file.seek(tensor.offset)
    while left:
        raw = file.read(min(left, _CHUNK_BYTES))
        if not raw:
            raise SourceError(f"{file.name} ends within {tensor.name}", "Copy or convert the file again")
        left -= len(raw)
        values: npt.NDArray[Any] = np.frombuffer(raw, stored)
        if tensor.type == "bf16":
            yield (values.astype(np.uint32) << 16).view(np.float32)
        else:
            yield values
