"""One matrix on its way to blocks: its weights, how they are rounded, and what it costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt

from edgeq.converters.gguf.assemble import read_tensor
from edgeq.converters.gguf.header import GgufHeader
from edgeq.converters.gguf.sensitivity.compensate import Compensation, compensation, quantize_compensated, refine
from edgeq.converters.gguf.sensitivity.curvature import Curvature
from edgeq.ggml_blocks import dequantize
from edgeq.ggml_types import ggml_type

__all__ = ["CHUNK_WEIGHTS", "Importance", "Matrix"]

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Importance = Mapping[str, Floats]

# Weights that are worked on at once.
CHUNK_WEIGHTS = 1 << 20
_BLOCKS = (32, 256)


@dataclasses.dataclass(frozen=True)
class Matrix:
    """Weights in their float file, with everything that rounding them depends on; made by `of`.

    Attributes:
        name: of the tensor.
        stored: its type in the float file.
        n_columns: weights in a row.
        raw: uint8 of (n_rows, row bytes).
        curvature: what errors cost.
        importance: float32 of (n_columns,), or None.
        column_matrix: the curvature's, if it has correlations.
        compensations: by size of block; empty without correlations.
    """

    name: str
    stored: str
    n_columns: int
    raw: Bytes
    curvature: Curvature
    importance: Floats | None
    column_matrix: Floats | None
    compensations: dict[int, Compensation]

    @classmethod
    def of(cls, header: GgufHeader, name: str, curvature: Curvature, importance: Floats | None) -> Matrix:
        """Read a tensor and factorise its curvature."""
        tensor = header.tensors[name]
        columns = None if curvature.correlation is None else curvature.column_matrix()
        compensations = {} if columns is None else compensation(columns, _BLOCKS)
        raw = read_tensor(header, name)
        return cls(name, tensor.type, tensor.shape[0], raw, curvature, importance, columns, compensations)

    @property
    def n_weights(self) -> int:
        """Rows times columns."""
        return len(self.raw) * self.n_columns

    def rows(self, picked: npt.NDArray[np.intp]) -> Floats:
        """Some rows as floats, (n, n_columns)."""
        return dequantize(np.ascontiguousarray(self.raw[picked]), self.stored, self.n_columns)

    def parts(self) -> Iterator[tuple[int, Floats]]:
        """All rows as floats, some at a time, each with the number of its first row."""
        step = max(1, CHUNK_WEIGHTS // self.n_columns)
        for start in range(0, len(self.raw), step):
            yield start, dequantize(self.raw[start : start + step], self.stored, self.n_columns)

    def quantize(self, weights: Floats, kind: str) -> Bytes:
        """Rows as blocks: uint8 of (n, row bytes)."""
        return quantize_compensated(weights, kind, self.importance, self.compensations)

    def errors(self, weights: Floats, kind: str) -> Floats:
        """Quantized minus true weights, float32 of (n, n_columns)."""
        errors = dequantize(self.quantize(weights, kind), kind, self.n_columns)
        errors -= weights
        return errors

    def blocks(self, kind: str, *, refined: bool = True) -> Bytes:
        """The whole matrix in a type; not refined it has the errors that `errors` tells."""
        if kind == self.stored:
            return self.raw
        rows = ggml_type(kind).row_bytes(self.n_columns)
        out = np.empty((len(self.raw), rows), np.uint8)
        for start, weights in self.parts():
            made = self.quantize(weights, kind)
            if refined:
                made = refine(made, weights, kind, self.importance, self.compensations)
            out[start : start + len(weights)] = made
        return out
