"""What models and contexts of llama.cpp share: a C pointer with one owner, and the sizes that the log tells."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar

from edgeq.errors import SessionClosedError
from edgeq.llama_library import CapturedLog

__all__ = ["Handle", "buffer_bytes"]

H = TypeVar("H", bound="Handle")

_BUFFER_LINE = re.compile(r"(?P<kind>model|KV|compute|output) buffer size\s*=\s*(?P<mib>[\d.]+) MiB")


class Handle:
    """A pointer that C gave us, freed exactly once: by `close`, by the garbage collector, or at exit.

    Args:
        pointer: not NULL.
        free: the C function that frees it.
        what: the thing's name, for messages.
        owner: what C needs for as long as this lives; closing the owner closes this first.
    """

    def __init__(
        self,
        pointer: Any,  # noqa: ANN401 - an opaque ctypes pointer
        free: Callable[[Any], None],
        what: str,
        *,
        owner: Handle | None = None,
    ) -> None:
        self._pointer = pointer
        self._what = what
        self._owned: weakref.WeakSet[Handle] = weakref.WeakSet()
        # The finalizer holds the owner, so that even the collection of a cycle frees in the right order.
        self._finalizer = weakref.finalize(self, _free, free, pointer, owner)
        if owner is not None:
            owner._owned.add(self)  # noqa: SLF001 - the same class

    @property
    def pointer(self) -> Any:  # noqa: ANN401 - an opaque ctypes pointer
        """The C pointer. Raises SessionClosedError after `close`."""
        if not self._finalizer.alive:
            raise SessionClosedError(f"the {self._what} was closed", "Load it again")
        return self._pointer

    def check_open(self) -> None:
        """Raise SessionClosedError after `close`."""
        _ = self.pointer

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return not self._finalizer.alive

    def close(self) -> None:
        """Free the memory. Calling it again does nothing; no other thread may be using the object."""
        for handle in list(self._owned):
            handle.close()
        self._finalizer()

    def __enter__(self: H) -> H:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _free(free: Callable[[Any], None], pointer: Any, _owner: Handle | None) -> None:  # noqa: ANN401 - ctypes pointer
    free(pointer)


def buffer_bytes(log: CapturedLog) -> dict[str, int]:
    """Bytes of buffers by kind (``model``, ``kv``, ``compute``, ``output``), summed over devices."""
    totals: dict[str, int] = {}
    for line in log:
        match = _BUFFER_LINE.search(line)
        if match is not None:
            kind = match["kind"].lower()
            totals[kind] = totals.get(kind, 0) + round(float(match["mib"]) * 2**20)
    return totals
