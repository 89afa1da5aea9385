"""Several threads of one core each on independent work: one thread of llama.cpp waits for no other.

The threads of one llama.cpp context meet after every operation of the graph and spin until the last one is there, so
when anything else wants a core, all of them wait for the one that lost its own. Where the work falls into parts that do
not depend on each other, a context for each thread has no such meetings.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

__all__ = ["run_workers"]

_POLL_S = 0.2


def run_workers(
    jobs: Sequence[Callable[[], None]], *, stop: Callable[[], None], poll: Callable[[], None] | None = None
) -> None:
    """Run jobs, each on a thread of its own. When this returns or raises, none of them runs any more.

    Args:
        jobs: their first exception is raised here.
        stop: makes all jobs end early; called if one fails or if this thread is interrupted.
        poll: called on this thread every fifth of a second, and once at the end.
    """
    crew = _Crew(len(jobs))
    try:
        for job in jobs:
            threading.Thread(target=crew.work, args=(job,), name="edgeq-worker").start()
        ended = False
        while not ended:
            ended = crew.wait(_POLL_S)
            if poll is not None:
                poll()
    except BaseException:
        crew.dismiss(stop)
        raise


class _Crew:
    """Who is at work. An interrupt may come while a thread starts, so each job asks here whether it may begin."""

    def __init__(self, n_jobs: int) -> None:
        self._changed = threading.Condition()
        self._left = n_jobs
        self._running = 0
        self._dismissed = False
        self._failures: list[BaseException] = []

    def work(self, job: Callable[[], None]) -> None:
        """Do a job, on its thread."""
        with self._changed:
            if self._dismissed:
                return
            self._running += 1
        try:
            job()
        except BaseException as error:  # noqa: BLE001 - raised by wait
            self._failures.append(error)
        finally:
            with self._changed:
                self._running -= 1
                self._left -= 1
                self._changed.notify_all()

    def wait(self, seconds: float) -> bool:
        """Whether all jobs are done, after so long at most. Raises the first exception of any."""
        with self._changed:
            self._changed.wait_for(lambda: self._failures or not self._left, seconds)
        if self._failures:
            raise self._failures[0]
        return not self._left

    def dismiss(self, stop: Callable[[], None]) -> None:
        """Let no further job begin, stop those that run, and wait for their end."""
        with self._changed:
            self._dismissed = True
        stop()
        with self._changed:
            self._changed.wait_for(lambda: not self._running)
