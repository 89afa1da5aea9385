"""The exact path: a mixed-integer programme for HiGHS, made small by reduced costs and checked in exact integers."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import math
import os
import tempfile
import time
from collections.abc import Iterator

import numpy as np

from edgeq.errors import require_package
from edgeq.planner.branching import Branch, promising
from edgeq.planner.knapsack import Choice, Floats, Knapsack, Mask

__all__ = ["Found", "branch_and_bound"]

_ROW_RANGE = 1e2  # HiGHS keeps rows to 1e-6; at larger ranges it finds its own roundings to violate them
_REJECTED_MOST = 8
_MOST_OPTIONS = 20_000  # beyond that HiGHS takes minutes, and the Lagrangian's gap is tiny
_TIME_OUT, _NO_SOLUTION = 1, 2


@dataclasses.dataclass(frozen=True)
class Found:
    """What branch and bound came to.

    Attributes:
        choice: the best choice; None if there is none, or none was found in time.
        bound: no choice within the limits costs less; infinite if there is proven to be none.
    """

    choice: Choice | None
    bound: float


def branch_and_bound(problem: Knapsack, branch: Branch, best: Choice | None, *, gap: float, deadline: float) -> Found:
    """Improve on the best choice so far within one branch until that is proven, or the deadline is reached.

    Options whose reduced cost shows that they cannot be part of a better choice are left out first, which usually
    leaves a few dozens of thousands.

    Args:
        problem: what to solve.
        branch: the part of it to look at.
        best: the best choice so far, of this branch or another.
        gap: stop when the choice is proven to be this near to the branch's optimum, relative.
        deadline: of `time.monotonic`.

    Raises:
        MissingPackageError: scipy is not installed.
    """
    value = math.inf if best is None else problem.value(best)
    kept = promising(problem, branch, value)
    bound = branch.relaxation.bound
    least = np.where(kept, problem.use, np.inf).min(axis=2).sum(axis=1)
    if not kept.any(axis=1).all() or (least > problem.limit + 1e-12 * np.abs(problem.limit)).any():
        return Found(choice=best, bound=value)
    if kept.sum() > _MOST_OPTIONS:
        return Found(choice=best, bound=bound)
    rejected: list[Choice] = []
    while True:
        found, proven = _highs(problem, kept, rejected, value, gap=gap, time_left_s=deadline - time.monotonic())
        bound = max(bound, min(proven, value))
        if found is None or problem.feasible(found) or len(rejected) == _REJECTED_MOST:
            break
        # A choice that keeps the limits only within the tolerances of HiGHS is cut off by itself: still exact.
        rejected.append(found)
    if found is not None and problem.feasible(found) and problem.value(found) < value:
        best, value = found, problem.value(found)
    return Found(choice=best, bound=min(bound, value))


def _highs(
    problem: Knapsack, kept: Mask, rejected: list[Choice], value: float, *, gap: float, time_left_s: float
) -> tuple[Choice | None, float]:
    """HiGHS on the options that are kept: its choice, and the bound that it proved for them."""
    if time_left_s <= 0:
        return None, -math.inf
    optimize = require_package("scipy.optimize", "convert", "to solve for the best types exactly")
    sparse = require_package("scipy.sparse", "convert", "to solve for the best types exactly")
    items, options = np.nonzero(kept)
    columns = np.arange(len(items))
    cost = problem.cost[items, options]
    base = np.where(kept, problem.cost, np.inf).min(axis=1)
    offset = math.fsum(base)
    expected = value - offset if math.isfinite(value) else float((cost - base[items]).sum())
    unit = 1e-4 * expected if expected > 0 else 1.0  # the optimum is about 1e4, far above HiGHS's absolute gap of 1e-6
    one_each = sparse.csr_array((np.ones(len(items)), (items, columns)), shape=(len(kept), len(items)))
    constraints = [optimize.LinearConstraint(one_each, 1, 1)]
    for row, limit in _rows(problem, kept, rejected):
        constraints.append(optimize.LinearConstraint(sparse.csr_array(row[None, :]), -np.inf, limit))
    # HiGHS relates its gap to an objective that lacks the offset.
    relative = gap * abs(value) / expected if math.isfinite(value) and expected > 0 else gap
    # Presolving takes longer than solving here, and makes HiGHS stumble over its own roundings.
    with _stdout_without(b"HighsMip"):
        solved = optimize.milp(
            (cost - base[items]) / unit,
            integrality=np.ones(len(items)),
            bounds=optimize.Bounds(0, 1),
            constraints=constraints,
            options={"time_limit": time_left_s, "mip_rel_gap": min(relative, 1.0), "presolve": False},
        )
    if solved.status == _NO_SOLUTION:
        return None, math.inf
    bound = -math.inf if solved.mip_dual_bound is None else offset + unit * float(solved.mip_dual_bound)
    if solved.x is None:
        return None, bound
    taken = np.full(kept.shape, -1.0)
    taken[items, options] = solved.x
    return taken.argmax(axis=1), bound


def _rows(problem: Knapsack, kept: Mask, rejected: list[Choice]) -> list[tuple[Floats, float]]:
    """The resources as rows of the same range, and a cut for each rejected choice."""
    items, options = np.nonzero(kept)
    rows = []
    for use, limit in zip(problem.use, problem.limit, strict=True):
        least = np.where(kept, use, np.inf).min(axis=1)
        row = use[items, options] - least[items]
        room = float(limit) - math.fsum(least)
        widest = np.where(kept, use - least[:, None], 0).max(axis=1).sum()
        if widest <= max(room, 0.0):  # never exceeded; or nothing left to choose, which `Knapsack.feasible` judges
            continue
        divisor = float(widest) / _ROW_RANGE
        rows.append((row / divisor, room / divisor))
    cuts = [((choice[items] == options).astype(np.float64), len(choice) - 1.0) for choice in rejected]
    return rows + cuts


@contextlib.contextmanager
def _stdout_without(start: bytes) -> Iterator[None]:
    """Hold back what the process writes to its standard output, then write it without the lines that begin so.

    HiGHS 1.12 prints a left-over debugging line with C's ``printf``, which no option silences and which would end up
    among the results of a command.
    """
    try:
        stdout = os.dup(1)
    except OSError:  # closed: nothing to protect
        yield
        return
    libc = ctypes.CDLL(None)
    with tempfile.TemporaryFile() as held:
        libc.fflush(None)
        os.dup2(held.fileno(), 1)
        try:
            yield
        finally:
            libc.fflush(None)
            os.dup2(stdout, 1)
            os.close(stdout)
            held.seek(0)
            for line in held:
                if not line.startswith(start):
                    os.write(1, line)
