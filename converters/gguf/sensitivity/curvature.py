"""The second-order model of output KL divergence that the search stands on.

For a small change dW of a matrix, the mean KL divergence of the next token's distribution is 1/2 vec(dW)^T F vec(dW)
with F the Fisher information (per token, in nats). F is kept as a Kronecker product, as in K-FAC (Martens and Grosse,
2015): a factor for each output row, and a matrix over the input columns whose diagonal is the Fisher's own and whose
correlations are those of the inputs, weighted by their gradients. The diagonal alone predicts what independent rounding
errors cost; the correlations are what `edgeq.converters.gguf.sensitivity.compensate` needs to make errors cancel.

A block type also rounds what it is multiplied with: ggml's kernels take activations in 8 bits, in blocks of 32 or 256
with one scale each. Beside an outlier the small activations of a block are lost, the more the larger the block; so this
is part of the price of a type.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from edgeq.ggml_types import ggml_type

__all__ = ["ACTIVATION_BLOCKS", "Curvature", "Curvatures", "activation_block"]

Floats = npt.NDArray[np.float32]
Halves = npt.NDArray[np.float16]

ACTIVATION_BLOCKS = (32, 256)


@dataclasses.dataclass(frozen=True)
class Curvature:
    """How the output reacts to one matrix.

    Attributes:
        rows: float32 of (n_rows,), at least 0.
        columns: float32 of (n_columns,), at least 0; F_ij = rows_i * columns_j.
        activation_kld: mean KL divergence in nats from rounding this matrix's inputs to 8 bits, by block size.
        correlation: float16 of (n_columns, n_columns) with ones on the diagonal; None where only the diagonal is known.
    """

    rows: Floats
    columns: Floats
    activation_kld: Mapping[int, float]
    correlation: Halves | None = None

    def column_matrix(self) -> Floats:
        """The factor over the columns, float32 of (n_columns, n_columns); diagonal if there are no correlations."""
        if self.correlation is None:
            return np.diag(self.columns)
        scale = np.sqrt(self.columns)
        matrix: Floats = self.correlation.astype(np.float32)
        matrix *= scale[:, None]
        matrix *= scale[None, :]
        return matrix

    def weight_kld(self, errors: Floats, start: int = 0, column_matrix: Floats | None = None) -> float:
        """Nats for the errors of some rows.

        Args:
            errors: float32 of (n, n_columns), quantized minus true weights.
            start: the first of these rows in the matrix.
            column_matrix: `column_matrix`, where it matters that errors are correlated; without, the diagonal counts.
        """
        if column_matrix is None:
            per_row = np.square(errors) @ self.columns
        else:
            per_row = np.einsum("ij,ij->i", errors @ column_matrix, errors)
        return 0.5 * float(np.dot(per_row.astype(np.float64), self.rows[start : start + len(errors)]))


@dataclasses.dataclass(frozen=True)
class Curvatures:
    """Every matrix's curvature, and how it was found.

    Attributes:
        by_tensor: name to curvature.
        estimator: ``"fisher"`` or ``"imatrix"``.
        tokens: of calibration that it was measured on.
        key: changes when anything does that the figures depend on; for caches.
    """

    by_tensor: Mapping[str, Curvature]
    estimator: str
    tokens: int
    key: str


def activation_block(type_name: str, accelerator: str) -> int:
    """How many activations share a scale when a matrix of that type is multiplied; 0 where they stay floats.

    Source: ``vec_dot_type`` in ggml-cpu.c (q8_K for blocks of 256, q8_0 or q8_1 for blocks of 32), and mmq.cuh and
    mmvq.cu, which take q8_1 for all.
    """
    kind = ggml_type(type_name)
    if kind.is_float:
        return 0
    return 256 if kind.block_weights == 256 and accelerator == "cpu" else 32
