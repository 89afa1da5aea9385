"""One thread that computes calls in their order."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["Worker"]

R = TypeVar("R")


class Worker:
    """A thread that stays on its CPUs, if it was given any, and ends with `close`."""

    def __init__(self, cpus: Sequence[int]) -> None:
        """Start nothing yet: the thread begins with the first call."""
        self._cpus = frozenset(cpus)
        self._thread: threading.Thread | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="edgeq-tensor", initializer=self._begin)

    def submit(self, call: Callable[[], R]) -> Future[R]:
        """Compute it after all that came before."""
        return self._pool.submit(call)

    def close(self) -> None:
        """End when all calls are computed, and wait for it, unless this is called from one of them."""
        self._pool.shutdown(wait=threading.current_thread() is not self._thread)

    def _begin(self) -> None:
        self._thread = threading.current_thread()
        if self._cpus:
            os.sched_setaffinity(0, self._cpus)  # 0 is the calling thread alone
