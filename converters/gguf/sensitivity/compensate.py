"""Rounding that makes up for itself: the error of each block is taken out by the columns that are still to come.

With H the curvature over a row's columns, the change of the remaining columns that best makes up for an error e in
columns B is ``e (U_BB)^-1 U_BR``, with ``H^-1 = U^T U`` and U upper triangular (Hassibi and Stork 1993; Frantar et al.
2022, for single columns). Here it is done a block of ggml at a time, so that every block is made by ggml's own code for
its type, whatever that does with scales, and the file is an ordinary GGUF.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from edgeq.ggml_blocks import dequantize, quantize_rows
from edgeq.ggml_types import ggml_type

__all__ = ["Compensation", "compensation", "quantize_compensated"]

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

# Share of the mean diagonal that is added to it. Correlations come from some ten thousand tokens; trusting them further
# fits noise. On SmolLM2 0.1 was never much worse than 0.01 and far better for wide inputs with outliers.
_DAMPING = 0.1
_MOST_DAMPING = 1e6


@dataclasses.dataclass(frozen=True)
class Compensation:
    """How the error of each block spreads over the columns after it.

    Attributes:
        block: columns of a block.
        spread: for each block but the last, float32 of (block, columns after it).
    """

    block: int
    spread: Sequence[Floats]


def compensation(column_matrix: Floats, blocks: Sequence[int]) -> dict[int, Compensation]:
    """The spreads for every size of block that divides the columns.

    Args:
        column_matrix: symmetric and positive semi-definite, (n_columns, n_columns).
        blocks: sizes of blocks, in columns.
    """
    n_columns = len(column_matrix)
    mean = float(np.trace(column_matrix, dtype=np.float64)) / n_columns
    if not np.isfinite(mean) or mean <= 0.0:
        return {}
    upper = _inverse_root(column_matrix.astype(np.float64) / mean)
    if upper is None:
        return {}
    result = {}
    for block in blocks:
        if n_columns % block == 0:
            starts = range(0, n_columns - block, block)
            spread = [
                np.linalg.solve(upper[a : a + block, a : a + block], upper[a : a + block, a + block :]) for a in starts
            ]
            result[block] = Compensation(block, [matrix.astype(np.float32) for matrix in spread])
    return result


def _inverse_root(matrix: npt.NDArray[np.float64]) -> npt.NDArray[np.float64] | None:
    """The upper triangular root of a damped matrix's inverse; None if no damping makes it positive definite.

    Correlations are kept in half precision: where a few columns carry nearly everything and almost agree, rounding
    makes the matrix so indefinite that it needs more than the usual damping.
    """
    damping = _DAMPING
    while damping <= _MOST_DAMPING:
        damped = matrix + damping * np.eye(len(matrix))
        try:
            root: npt.NDArray[np.float64] = np.linalg.cholesky(np.linalg.inv(damped)).T
        except np.linalg.LinAlgError:
            damping *= 4
        else:
            return root
    return None


def quantize_compensated(
    rows: Floats, type_name: str, importance: Floats | None, compensations: dict[int, Compensation]
) -> Bytes:
    """Like `edgeq.ggml_blocks.quantize_rows`, with every block's error made up for by the later ones.

    Args:
        rows: float32 of (n_rows, n_columns).
        type_name: any type that fits the rows; float types are stored as they are.
        importance: column weights for the search of scales inside a block.
        compensations: by size of block; types with another one are rounded as usual.

    Returns:
        uint8 of (n_rows, row bytes).
    """
    kind = ggml_type(type_name)
    plan = compensations.get(kind.block_weights)
    if kind.is_float or plan is None:
        return quantize_rows(rows, type_name, importance)
    left = rows.copy()
    parts: list[Bytes] = []
    for index, start in enumerate(range(0, rows.shape[1], plan.block)):
        end = start + plan.block
        wanted = np.ascontiguousarray(left[:, start:end])
        made = quantize_rows(wanted, type_name, None if importance is None else importance[start:end])
        parts.append(made)
        if index < len(plan.spread):
            left[:, end:] += (dequantize(made, type_name, plan.block) - wanted) @ plan.spread[index]
    return np.concatenate(parts, axis=1)
