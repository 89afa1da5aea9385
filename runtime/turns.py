"""One request at a time, in the order of arrival, and a way to close while others are at work."""

from __future__ import annotations

import collections
import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from edgeq.errors import SessionClosedError, SessionError

__all__ = ["Ticket", "Turns"]


class Ticket:
    """One request's place in the queue.

    Attributes:
        deadline: when waiting or computing must end, on the clock of `time.perf_counter`; None for never.
        cancelled: whether `Turns.cancel` was called for it.
    """

    def __init__(self, deadline: float | None) -> None:
        self.deadline = deadline
        self.cancelled = False
        self._thread = 0
        self._expired = False

    @property
    def expired(self) -> bool:
        """Whether the deadline has passed."""
        return self._expired or (self.deadline is not None and time.perf_counter() >= self.deadline)


class Turns:
    """A fair queue for a resource that computes one request at a time.

    Two things are guarded: whose turn it is (a ticket, from `enter` to `leave`), and that nobody is inside the resource
    when it is freed (`using` around every use).

    Args:
        interrupt: makes a running use return early; called with the lock held, from any thread.
        resume: undoes ``interrupt``; called before a new ticket's turn begins.
    """

    def __init__(self, interrupt: Callable[[], None], resume: Callable[[], None]) -> None:
        self._lock = threading.RLock()  # re-entrant: the collection of a dropped stream can come at any time
        self._changed = threading.Condition(self._lock)
        self._unused = threading.Condition(self._lock)
        self._queue: collections.deque[Ticket] = collections.deque()
        self._interrupt = interrupt
        self._resume = resume
        self._closed = False
        self._users = 0

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def enter(self, ticket: Ticket) -> bool:
        """Wait for the ticket's turn.

        Returns:
            False if it was cancelled or its deadline passed while it waited; it is out of the queue then.

        Raises:
            SessionClosedError: closed before its turn came.
            SessionError: the turn belongs to an unfinished stream of this same thread, which could never end.
        """
        with self._lock:
            ticket._thread = threading.get_ident()  # noqa: SLF001 - one module
            if self._queue and self._queue[0]._thread == ticket._thread:  # noqa: SLF001
                raise SessionError(
                    "this thread has an unfinished stream or on_token call in this session",
                    "Finish or close the stream first, or use another thread",
                )
            self._queue.append(ticket)
            try:
                granted = self._wait(ticket)
            except BaseException:  # KeyboardInterrupt too: a ticket that stayed would block everyone behind it
                self._remove(ticket)
                raise
            if not granted:
                self._remove(ticket)
            return granted

    def _wait(self, ticket: Ticket) -> bool:
        while True:
            if self._closed:
                raise _closed_error()
            if ticket.cancelled or ticket.expired:
                return False
            if self._queue[0] is ticket:
                self._resume()
                return True
            timeout = None if ticket.deadline is None else ticket.deadline - time.perf_counter()
            self._changed.wait(timeout)

    def leave(self, ticket: Ticket) -> None:
        """End the ticket's turn. Does nothing if it is not in the queue."""
        with self._lock:
            self._remove(ticket)

    def _remove(self, ticket: Ticket) -> None:
        if ticket in self._queue:
            self._queue.remove(ticket)
            self._changed.notify_all()

    def cancel(self, ticket: Ticket) -> None:
        """Let the ticket's request end early, whether it waits or computes."""
        with self._lock:
            ticket.cancelled = True
            self._stop_if_running(ticket)
            self._changed.notify_all()

    def cancel_running(self) -> None:
        """Cancel the ticket whose turn it is, if there is one."""
        with self._lock:
            if self._queue:
                self.cancel(self._queue[0])

    def expire(self, ticket: Ticket) -> None:
        """Interrupt the computation because the ticket's deadline has passed."""
        with self._lock:
            ticket._expired = True  # noqa: SLF001 - one module
            self._stop_if_running(ticket)

    def _stop_if_running(self, ticket: Ticket) -> None:
        if self._queue and self._queue[0] is ticket:
            self._interrupt()

    @contextlib.contextmanager
    def using(self) -> Iterator[None]:
        """Keep the resource alive inside the block. Raises SessionClosedError after `close`."""
        with self._lock:
            if self._closed:
                raise _closed_error()
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    self._unused.notify_all()

    def close(self) -> None:
        """Interrupt what runs, refuse what waits, and return when nobody is inside the resource any more."""
        with self._lock:
            self._closed = True
            self._interrupt()
            self._changed.notify_all()
            while self._users:
                self._unused.wait()


def _closed_error() -> SessionClosedError:
    return SessionClosedError("the session was closed", "Load the bundle again")
