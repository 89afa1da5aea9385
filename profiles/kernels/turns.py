"""Kernels that are measured in turns: which of them together, as memory allows, and how often, as time allows."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

__all__ = ["MEMORY_SHARE", "groups_that_fit", "rounds"]

T = TypeVar("T")

MEMORY_SHARE = 4
"""What takes turns holds at most this fraction of the free memory."""


def groups_that_fit(sized: Iterable[tuple[T, int]], limit_bytes: int) -> list[list[T]]:
    """Neighbours together as far as they fit in memory; what is larger than all of it is alone.

    Args:
        sized: what takes turns, each with its bytes.
        limit_bytes: of a group.
    """
    groups: list[list[T]] = []
    held = 0
    for item, size in sized:
        if not groups or held + size > limit_bytes:
            groups.append([])
            held = 0
        groups[-1].append(item)
        held += size
    return groups


def rounds(fewest: int, most: int, end_s: float) -> Iterator[int]:
    """Numbers of rounds, from 0 on, until another one as long as the last would end too late.

    Args:
        fewest: as many are done however long they take.
        most: there are never more.
        end_s: when they should be over, as `time.monotonic` counts.
    """
    for turn in range(most):
        begin = time.monotonic()
        yield turn
        now = time.monotonic()
        if turn + 1 >= fewest and now + (now - begin) > end_s:
            return
