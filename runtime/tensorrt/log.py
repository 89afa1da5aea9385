"""TensorRT's messages, kept for our own: of one build all lines, by severity."""

from __future__ import annotations

import functools
import threading
from types import ModuleType
from typing import Any

__all__ = ["Messages", "logger_of"]

_MOST = 200  # lines kept of a kind; a broken graph can make thousands


class Messages:
    """What the library said since the last `clear`. Safe to be called by the library's own threads.

    Attributes:
        errors: errors and internal errors, one line each.
        warnings: without repetitions.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.errors: list[str] = []
        self.warnings: list[str] = []

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self.errors.clear()
            self.warnings.clear()

    def take_errors(self) -> list[str]:
        """The errors so far, which are forgotten: of a step that may fail without harm."""
        with self._lock:
            taken = list(self.errors)
            self.errors.clear()
        return taken

    def add(self, message: str, *, error: bool) -> None:
        """Keep one."""
        line = " ".join(message.split())
        with self._lock:
            kept = self.errors if error else self.warnings
            if len(kept) < _MOST and line not in kept:
                kept.append(line)


@functools.cache
def logger_of(trt: ModuleType) -> tuple[Any, Messages]:
    """The library's logger and where its messages are kept; one a process, since the library keeps to its first."""
    messages = Messages()
    severity = trt.ILogger.Severity

    def init(self: Any) -> None:  # noqa: ANN401 - a class of the library
        trt.ILogger.__init__(self)

    def log(_self: Any, level: Any, message: str) -> None:  # noqa: ANN401
        if level in (severity.INTERNAL_ERROR, severity.ERROR):
            messages.add(message, error=True)
        elif level == severity.WARNING:
            messages.add(message, error=False)

    # Made here, since the base class is only known when the module is.
    return type("EdgeqLogger", (trt.ILogger,), {"__init__": init, "log": log})(), messages
