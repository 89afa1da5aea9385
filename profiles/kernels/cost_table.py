"""What one matrix costs a decoded token, in nanoseconds, by type and shape: the table and the rule between its entries.

A matrix is named by its type and its shape in ggml's order, row length first: ``("q4_0", (576, 1536))`` multiplies a
vector of 576 into one of 1536.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated

import msgspec

from edgeq.errors import UsageError
from edgeq.ggml_types import ggml_type
from edgeq.record import Count, Record, Threads

__all__ = ["CostEntry", "DecodeCosts", "Matrix", "decoded_matrices"]

Matrix = tuple[str, tuple[int, int]]

_EMBEDDING = "token_embd.weight"
_OUTPUT = "output.weight"

_Positive = Annotated[float, msgspec.Meta(gt=0, lt=1e18)]
_NotNegative = Annotated[float, msgspec.Meta(ge=0, lt=1e18)]
_Size = Annotated[int, msgspec.Meta(ge=1, le=2**48)]


class CostEntry(Record, frozen=True, kw_only=True):
    """One measured matrix.

    Attributes:
        type: of the weights.
        columns: length of a row, what is multiplied.
        rows: length of the result.
        ns: time of one product with one vector on a quiet machine: the lower quartile of what was measured.
        spread: half the distance between the quartiles, as a share of ``ns``.
        n: times that were measured.
        buffer: llama.cpp's name for the memory that held it; ``"CPU_REPACK"`` and its like hold another layout.
    """

    type: str
    columns: _Size
    rows: _Size
    ns: _Positive
    spread: _NotNegative
    n: Annotated[int, msgspec.Meta(ge=1)]
    buffer: str

    @property
    def ns_per_weight(self) -> float:
        """The time divided by the weights."""
        return self.ns / (self.columns * self.rows)


class DecodeCosts(Record, frozen=True, kw_only=True):
    """Costs of matrices on one machine with one number of threads.

    Attributes:
        schema_version: of this record.
        measured: False if the times come from a datasheet's bandwidth.
        machine: the processor's name.
        arch: ``"x86_64"``, ``"aarch64"``.
        threads: that computed; None where the datasheet does not say.
        llama_cpp: version of llama.cpp.
        measured_utc: when the last entry was measured, ISO 8601; None if none was.
        busy_cpus: CPUs that other processes kept busy on average meanwhile, the most of all runs; None if unknown.
        working_set_bytes: bytes of weights that were cycled through, as a model of that size is for each token.
        bytes_per_s: a datasheet's effective bandwidth, the rule for types without an entry; None if measured.
        flops_per_s: a datasheet's throughput, which limits that rule.
        entries: at most one for each type and shape.
    """

    schema_version: Annotated[int, msgspec.Meta(ge=1, le=1)] = 1
    measured: bool
    machine: str
    arch: str
    threads: Threads | None
    llama_cpp: str
    measured_utc: str | None = None
    busy_cpus: _NotNegative | None = None
    working_set_bytes: Count = 0
    bytes_per_s: _Positive | None = None
    flops_per_s: _Positive | None = None
    entries: tuple[CostEntry, ...] = ()

    def __post_init__(self) -> None:
        """Refuse two entries for one matrix, which msgspec reports as an error of the record."""
        if len({(e.type, e.columns, e.rows) for e in self.entries}) != len(self.entries):
            raise ValueError("two entries for one matrix")

    def has(self, type_name: str, shape: tuple[int, int]) -> bool:
        """Whether that very matrix was measured."""
        return any((e.type, e.columns, e.rows) == (type_name, *shape) for e in self.entries)

    def ns(self, type_name: str, shape: tuple[int, int]) -> float:
        """Nanoseconds that a decoded token spends in one matrix.

        Its entry where it has one. Else the time of a weight comes from the entries of the same type whose columns are
        nearest (as a ratio; the longer of two equally near): linear in the logarithm of the rows between two entries,
        and that of the nearest entry beyond them.

        Args:
            type_name: of the weights.
            shape: (columns, rows).

        Raises:
            UsageError: no such type, its blocks do not divide the columns, or no matrix of that type was measured.
        """
        kind = ggml_type(type_name)
        columns, rows = shape
        if not kind.fits(columns):
            raise UsageError(
                f"{kind.name} needs rows of a multiple of {kind.block_weights} weights, not {columns}",
                "Choose a type with a smaller block",
            )
        known = [entry for entry in self.entries if entry.type == kind.name]
        if not known:
            if self.bytes_per_s is not None:
                computing = 0.0 if self.flops_per_s is None else 1e9 * 2 * rows * columns / self.flops_per_s
                return max(1e9 * rows * kind.row_bytes(columns) / self.bytes_per_s, computing)
            raise UsageError(
                f"the cost of {kind.name} was not measured",
                "Choose another type, or probe the device again",
            )
        nearest = max(known, key=lambda e: (-abs(math.log(e.columns / columns)), e.columns)).columns
        return _ns_per_weight([e for e in known if e.columns == nearest], rows) * columns * rows

    def token_ns(self, matrices: Mapping[Matrix, int]) -> float:
        """Time of all matrices of a token; see `decoded_matrices`. Raises UsageError as `ns` does."""
        return sum(count * self.ns(*matrix) for matrix, count in matrices.items())


def _ns_per_weight(entries: list[CostEntry], rows: int) -> float:
    """Time of a weight in a matrix of so many rows, from entries that differ in their rows only."""
    ordered = sorted(entries, key=lambda e: e.rows)
    below = max((e for e in ordered if e.rows <= rows), key=lambda e: e.rows, default=ordered[0])
    above = min((e for e in ordered if e.rows >= rows), key=lambda e: e.rows, default=ordered[-1])
    if below.rows >= above.rows:
        # The entry itself, or the nearest one beyond an end of the table.
        return (below if rows >= below.rows else above).ns_per_weight
    share = math.log(rows / below.rows) / math.log(above.rows / below.rows)
    return (1 - share) * below.ns_per_weight + share * above.ns_per_weight


def decoded_matrices(types: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> dict[Matrix, int]:
    """The matrices that one decoded token is multiplied with, and how often each occurs.

    Every tensor of two or more dimensions (a stack of matrices counts as all of them), without the token embedding
    where the model has an output matrix of its own: a row of it is looked up, which takes no time worth counting.

    Args:
        types: tensor name to type.
        shapes: tensor name to shape in ggml's order, row length first.
    """
    counts: dict[Matrix, int] = {}
    for name, shape in shapes.items():
        if len(shape) < 2 or (name == _EMBEDDING and _OUTPUT in shapes):
            continue
        matrix = (types[name], (shape[0], shape[1]))
        counts[matrix] = counts.get(matrix, 0) + math.prod(shape[2:])
    return counts
