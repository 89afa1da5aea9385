"""Threads for work on matrices: one for each core, and none of the linear algebra library's own beside them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from edgeq.errors import require_package

__all__ = ["matrix_workers", "one_blas_thread"]


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """Matrix products of numpy and scipy in the block use one thread each, where others already fill the cores.

    Raises:
        MissingPackageError: threadpoolctl is not installed.
    """
    threadpoolctl = require_package("threadpoolctl", "convert", "to share the cores among matrices")
    with threadpoolctl.threadpool_limits(1, "blas"):
        yield


@contextlib.contextmanager
def matrix_workers(threads: int) -> Iterator[ThreadPoolExecutor]:
    """A pool whose tasks each use one thread, in numpy's matrix products too.

    Left to itself, every worker's product starts a thread for each core, and they spin against each other: pricing
    SmolLM2 took three times the CPU time. What is still waiting when the block ends by an exception is dropped.

    Raises:
        MissingPackageError: threadpoolctl is not installed.
    """
    with (
        one_blas_thread(),
        ThreadPoolExecutor(max(1, threads), "edgeq-matrix") as pool,
    ):
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
