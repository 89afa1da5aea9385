"""Progress on stderr: one line that is rewritten on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TextIO

from edgeq.cli.output import discard

__all__ = ["Progress"]

_TERMINAL_S = 0.1
_LOG_S = 10.0
_CLEAR_LINE = "\r\x1b[K"


class Progress:
    """Called with steps done, steps in all (0 if unknown) and what is going on; a context manager.

    A terminal sees one line that is rewritten at most ten times a second and cleared at the end. Anything else sees a
    line when something new begins, and every ten seconds while it lasts. Work goes on if nobody can be told.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._terminal = stream.isatty()
        self._what = ""
        self._shown = -_LOG_S

    def __call__(self, done: int, total: int, what: str) -> None:
        """Show it, unless something was shown just now."""
        now = time.monotonic()
        if what == self._what and now - self._shown < (_TERMINAL_S if self._terminal else _LOG_S):
            return
        self._what, self._shown = what, now
        text = f"{what}: {done / total:.0%}" if total else what
        self._write(f"{_CLEAR_LINE}{text}" if self._terminal else f"{text}\n")

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:
            discard(self._stream)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._terminal:
            self._write(_CLEAR_LINE)
