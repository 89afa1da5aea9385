"""The tensor types of ggml: id, weights in a block, bytes of a block.

Source: ``enum ggml_type`` in ggml.h and the block structs in ggml-common.h. A test compares every row with
``ggml_blck_size`` and ``ggml_type_size`` of the installed library, so this table cannot drift unnoticed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from edgeq.errors import UsageError
from edgeq.registry import nearest

__all__ = ["TYPES", "GgmlType", "ggml_type", "ggml_type_by_id", "tensor_bytes"]


@dataclasses.dataclass(frozen=True)
class GgmlType:
    """One storage type.

    Attributes:
        name: lower case, as ``ggml_type_name`` says it except that K-quants are lower case too (``q4_k``).
        id: the number in a GGUF file.
        block_weights: weights in a block; the row length must be a multiple of it.
        block_bytes: bytes of a block.
        needs_imatrix: llama.cpp refuses to quantize to it without an importance matrix.
    """

    name: str
    id: int
    block_weights: int
    block_bytes: int
    needs_imatrix: bool = False

    @property
    def bits_per_weight(self) -> float:
        """Bits a weight, scales included."""
        return 8 * self.block_bytes / self.block_weights

    @property
    def is_float(self) -> bool:
        """Whether each weight is stored by itself (f32, f16, bf16)."""
        return self.block_weights == 1

    def fits(self, row_weights: int) -> bool:
        """Whether rows of that length can be stored in this type."""
        return row_weights % self.block_weights == 0

    def row_bytes(self, row_weights: int) -> int:
        """Bytes of one row; ``row_weights`` must be a multiple of the block."""
        return row_weights // self.block_weights * self.block_bytes


_ROWS = (
    GgmlType("f32", 0, 1, 4),
    GgmlType("f16", 1, 1, 2),
    GgmlType("q4_0", 2, 32, 18),
    GgmlType("q4_1", 3, 32, 20),
    GgmlType("q5_0", 6, 32, 22),
    GgmlType("q5_1", 7, 32, 24),
    GgmlType("q8_0", 8, 32, 34),
    GgmlType("q2_k", 10, 256, 84),
    GgmlType("q3_k", 11, 256, 110),
    GgmlType("q4_k", 12, 256, 144),
    GgmlType("q5_k", 13, 256, 176),
    GgmlType("q6_k", 14, 256, 210),
    GgmlType("iq2_xxs", 16, 256, 66, needs_imatrix=True),
    GgmlType("iq2_xs", 17, 256, 74, needs_imatrix=True),
    GgmlType("iq3_xxs", 18, 256, 98, needs_imatrix=True),
    GgmlType("iq1_s", 19, 256, 50, needs_imatrix=True),
    GgmlType("iq4_nl", 20, 32, 18),
    GgmlType("iq3_s", 21, 256, 110),
    GgmlType("iq2_s", 22, 256, 82, needs_imatrix=True),
    GgmlType("iq4_xs", 23, 256, 136),
    GgmlType("iq1_m", 29, 256, 56, needs_imatrix=True),
    GgmlType("bf16", 30, 1, 2),
)

TYPES: dict[str, GgmlType] = {row.name: row for row in _ROWS}
_BY_ID = {row.id: row for row in _ROWS}


def ggml_type(name: str) -> GgmlType:
    """The type of that name, in any case.

    Raises:
        UsageError: there is none; the nearest names are given.
    """
    found = TYPES.get(name.lower())
    if found is None:
        close = nearest(name, list(TYPES)) or list(TYPES)
        raise UsageError(f"{name!r} is not a tensor type", f"Choose one of {', '.join(close)}")
    return found


def ggml_type_by_id(type_id: int) -> GgmlType | None:
    """The type with that number in a GGUF file, or None if edgeq does not know it."""
    return _BY_ID.get(type_id)


def tensor_bytes(name: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor's data without padding.

    Args:
        name: the type's name.
        shape: in ggml's order, the row length first.
    """
    kind = ggml_type(name)
    return kind.row_bytes(shape[0]) * math.prod(shape[1:])
