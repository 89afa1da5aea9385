"""Names to things, with an answer for a name that is not there."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")

__all__ = ["Registry", "nearest"]


def nearest(name: str, known: list[str], *, limit: int = 3) -> list[str]:
    """The known names most like ``name``, best first; empty when none is close."""
    lowered = {k.lower(): k for k in known}
    return [lowered[match] for match in difflib.get_close_matches(name.lower(), list(lowered), n=limit, cutoff=0.5)]


class Registry(Generic[T]):
    """A dictionary that refuses to hold one name twice.

    Args:
        kind: what the values are, in the singular, for messages ("architecture").
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._items: dict[str, T] = {}

    def add(self, name: str, item: T) -> None:
        """Register ``item``; a name that is taken is a programming error."""
        if name in self._items:
            message = f"{self.kind} {name!r} is registered twice"
            raise ValueError(message)
        self._items[name] = item

    def get(self, name: str) -> T | None:
        """The item of that name, or None."""
        return self._items.get(name)

    def names(self) -> list[str]:
        """All registered names, sorted."""
        return sorted(self._items)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self._items)
