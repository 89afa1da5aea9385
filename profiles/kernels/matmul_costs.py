"""The rule between measured points of prompt matrices: what a matrix takes for other shapes and batches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from edgeq.errors import UsageError
from edgeq.ggml_types import ggml_type
from edgeq.probe_points import MatmulPoint

__all__ = ["matmul_ns"]


def matmul_ns(
    points: Sequence[MatmulPoint], type_name: str, shape: tuple[int, int], *, batch: int, threads: int
) -> float:
    """Nanoseconds of one matrix with so many vectors at once.

    The time of a weight and vector comes from points of the same type and threads whose columns are nearest (as a
    ratio; the longer of two equally near); it is linear in the logarithm of the rows, then in that of the batch,
    and that of the last point beyond them.

    Args:
        points: as measured.
        type_name: of the weights.
        shape: (columns, rows) as ggml counts, row length first.
        batch: vectors.
        threads: that work.

    Raises:
        UsageError: no such type, or none of its matrices was measured with so many threads.
    """
    name, (columns, rows) = ggml_type(type_name).name, shape
    known = [p for p in points if p.type == name and p.threads == threads]
    if not known:
        raise UsageError(
            f"prompts through {name} were not measured on {threads} threads", "Probe the device again with them"
        )
    nearest = max(known, key=lambda p: (-abs(math.log(p.columns / columns)), p.columns)).columns
    by_batch: dict[int, float] = {}
    for size in {p.batch for p in known if p.columns == nearest}:
        by_rows = {
            p.rows: p.ns / (p.columns * p.rows * p.batch) for p in known if (p.columns, p.batch) == (nearest, size)
        }
        by_batch[size] = _between(by_rows, rows)
    return _between(by_batch, batch) * columns * rows * batch


def _between(values: Mapping[int, float], at: int) -> float:
    """Linear in the logarithm between the two marks around ``at``, that of the last one beyond them."""
    below = max((mark for mark in values if mark <= at), default=min(values))
    above = min((mark for mark in values if mark >= at), default=max(values))
    if below >= above:
        return values[below if at >= below else above]
    share = math.log(at / below) / math.log(above / below)
    return (1 - share) * values[below] + share * values[above]
