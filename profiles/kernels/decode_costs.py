"""The decode-cost table of this machine: measured once for each shape, kept on disk, extended when a new shape comes.

The parts: `edgeq.profiles.kernels.cost_table` (the record and the rule between its entries),
`edgeq.profiles.kernels.cost_measure`.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence

import msgspec

from edgeq.disk_cache import DiskCache, cache_root, fingerprint
from edgeq.llama import system_info, versions
from edgeq.profiles.kernels.cost_measure import (
    Progress,
    default_working_set,
    last_level_cache_bytes,
    legal_matrices,
    machine_name,
    measure_matrices,
    other_busy_cpus,
)
from edgeq.profiles.kernels.cost_table import DecodeCosts

__all__ = ["costs_cache", "costs_for"]

# A table that was taken while others kept more CPUs busy than this is taken anew when they keep fewer than the second.
_BUSY_CPUS = 0.5
_QUIET_CPUS = 0.25
_LISTEN_S = 0.3
# Beyond so many last-level caches a larger working set changes nothing.
_MOST_CACHES = 4


def costs_cache() -> DiskCache:
    """Where tables are kept: the folder ``costs`` of edgeq's cache."""
    return DiskCache(cache_root() / "costs")


def costs_for(
    shapes: Sequence[tuple[int, int]],
    types: Sequence[str],
    *,
    threads: int,
    working_set_bytes: int | None = None,
    progress: Progress | None = None,
    budget_s: float = 60.0,
    cache: DiskCache | None = None,
) -> DecodeCosts:
    """The table of this machine with every shape in every type that it can have: what is not there yet is measured.

    A table belongs to a processor, a number of threads, a build of llama.cpp and a size of working set, rounded up to a
    power of two since small differences change nothing. One that was taken while other programs kept the machine busy
    is used while they do, and taken anew when they have stopped.

    Args:
        shapes: (columns, rows) as ggml counts, row length first.
        types: names of types; those whose blocks do not divide a shape's rows are left out for that shape.
        threads: as many as the session will have.
        working_set_bytes: the size of the model's weights; None for `default_working_set`.
        progress: told matrices done, matrices in all, and what is in work; not called if nothing has to be measured.
        budget_s: about how long measuring may take.
        cache: None for `costs_cache`.

    Raises:
        UsageError: a type that there is not, or a number of threads that cannot be.
        SessionError: too little memory.
        MissingPackageError: llama-cpp-python is not installed.
    """
    cache = costs_cache() if cache is None else cache
    working_set = _rounded(working_set_bytes or default_working_set())
    key = fingerprint(
        machine_name(), platform.machine(), threads, *versions().values(), system_info(), f"working set {working_set}"
    )
    known = cache.get(key, DecodeCosts)
    if known is not None and (known.busy_cpus or 0) > _BUSY_CPUS and other_busy_cpus(_LISTEN_S) < _QUIET_CPUS:
        known = None
    missing = [m for m in legal_matrices(shapes, types) if known is None or not known.has(*m)]
    if known is not None and not missing:
        return known
    added = measure_matrices(
        missing, threads=threads, working_set_bytes=working_set, progress=progress, budget_s=budget_s
    )
    merged = added if known is None else _merge(known, added)
    cache.put(key, merged)
    return merged


def _merge(known: DecodeCosts, added: DecodeCosts) -> DecodeCosts:
    """One table of both; the busier time of the two is its."""
    return msgspec.structs.replace(
        added,
        entries=known.entries + added.entries,
        busy_cpus=max(known.busy_cpus or 0, added.busy_cpus or 0),
    )


def _rounded(working_set: int) -> int:
    """The next power of two, but no more than a few last-level caches."""
    most = _MOST_CACHES * (last_level_cache_bytes() or default_working_set())
    return 1 << (min(working_set, most) - 1).bit_length()
