"""The standard streams: results to stdout, everything else to stderr, whatever state the shell left them in."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

from edgeq.errors import EdgeqError

__all__ = ["ReaderGoneError", "discard", "note", "prepare_streams", "show", "show_lines", "stream"]


class ReaderGoneError(Exception):
    """Whoever read our output has closed it (``edgeq … | head``), which is no failure."""


def prepare_streams() -> None:
    """Make the streams take any text, and open those that the shell closed.

    A descriptor that stayed closed would go to the next file that is opened, such as a model, and llama.cpp's last
    words to stderr would land in it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w" if number else "r", encoding="utf-8"))  # noqa: SIM115
    for output in (sys.stdout, sys.stderr):
        if isinstance(output, io.TextIOWrapper):
            output.reconfigure(errors="backslashreplace")


def show(text: str) -> None:
    """Write results to stdout; silent if nobody reads them any more.

    Raises:
        EdgeqError: they cannot be written.
    """
    with contextlib.suppress(ReaderGoneError):
        stream(text)


def show_lines(lines: Iterable[str]) -> None:
    """`show` of lines, each kept on its own line: control characters that a manifest smuggled in are escaped."""
    show("".join(f"{_printable(line)}\n" for line in lines))


def stream(text: str) -> None:
    """Write a piece of a result to stdout.

    Raises:
        ReaderGoneError: nobody reads it any more.
        EdgeqError: it cannot be written.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        discard(sys.stdout)
        raise ReaderGoneError from None
    except OSError as error:
        discard(sys.stdout)
        raise EdgeqError(
            f"The results cannot be written to standard output: {error.strerror}", "Send them somewhere else"
        ) from error


def note(text: str) -> None:
    """Write a line to stderr, control characters escaped; where that is impossible there is nobody to tell."""
    try:
        print(_printable(text), file=sys.stderr, flush=True)
    except OSError:
        discard(sys.stderr)


def discard(output: TextIO) -> None:
    """Send what is buffered in a broken stream, and all that follows, to nowhere: Python flushes it once more."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), output.fileno())


def _printable(line: str) -> str:
    return "".join(c if c.isprintable() or c == "\t" else c.encode("unicode_escape").decode("ascii") for c in line)
