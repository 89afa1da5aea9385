"""The parent's end of `edgeq.runtime.bench_worker`: start it, talk to it, and make its death one line."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time
from types import TracebackType
from typing import IO, TypeVar

import msgspec

from edgeq import errors
from edgeq.errors import EdgeqError, SessionError
from edgeq.runtime.bench_messages import Command, Exit, Failed, Ready, Reply

__all__ = ["WorkerProcess"]

R = TypeVar("R")

_TAIL_BYTES = 4096
_EXIT_S = 10.0


class WorkerProcess:
    """One measured process; a context manager that leaves no process behind.

    Attributes:
        ready_ms: from starting the process to its reply that a bundle is loaded, interpreter and imports included.
    """

    def __init__(self) -> None:
        # A file, not a pipe: nobody has to drain it while the worker computes.
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`
        self._started = time.perf_counter()
        self.ready_ms = 0.0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "edgeq.runtime.bench_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            bufsize=0,
        )

    @property
    def pid(self) -> int:
        """Of the worker."""
        return self._process.pid

    def request(self, command: Command, kind: type[R]) -> R:
        """Send a command and wait for its reply.

        Raises:
            EdgeqError: what the worker raised, of the same class.
            SessionError: the worker died or answered nonsense.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(msgspec.json.encode(command) + b"\n")
            line = _read_line(stdout)
        except BrokenPipeError:
            line = b""
        if not line.endswith(b"\n"):
            raise self._death()
        try:
            reply: Reply = msgspec.json.decode(line, type=Reply)
        except msgspec.DecodeError as error:
            raise SessionError(f"The measured process gave a reply that makes no sense: {error}") from error
        if isinstance(reply, Failed):
            raise _rebuild(reply)
        if not isinstance(reply, kind):
            raise SessionError(f"The measured process answered with {type(reply).__name__}, not {kind.__name__}")
        if isinstance(reply, Ready):
            self.ready_ms = (time.perf_counter() - self._started) * 1e3
        return reply

    def _death(self) -> SessionError:
        code = self._process.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        self._stderr.seek(max(0, self._stderr.seek(0, 2) - _TAIL_BYTES))
        tail = [line.strip() for line in self._stderr.read().decode("utf-8", "replace").splitlines() if line.strip()]
        said = f"; its last words: {tail[-1]}" if tail else ""
        remedy = "Run it again; if memory was short (see dmesg), choose a smaller context or a smaller type"
        return SessionError(f"The measured process {how}{said}", remedy, details=tuple(tail[-20:-1]))

    def close(self) -> None:
        """End the worker: asked first, killed if it does not listen."""
        process = self._process
        try:
            if process.poll() is None and process.stdin is not None:
                process.stdin.write(msgspec.json.encode(Exit()) + b"\n")
                process.wait(_EXIT_S)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            process.kill()
        self._release()

    def kill(self) -> None:
        """End the worker at once."""
        self._process.kill()
        self._release()

    def _release(self) -> None:
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._stderr):
            if stream is not None:
                stream.close()

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.kill()


def _read_line(stream: IO[bytes]) -> bytes:
    """One line of an unbuffered pipe, without its end if the writer died."""
    pieces = bytearray()
    while not pieces.endswith(b"\n"):
        piece = stream.read(65536)
        if not piece:
            break
        pieces += piece
    return bytes(pieces)


def _rebuild(failed: Failed) -> EdgeqError:
    kind = getattr(errors, failed.kind, SessionError)
    if not (isinstance(kind, type) and issubclass(kind, EdgeqError)):
        kind = SessionError
    return kind(failed.cause, failed.remedy, details=failed.details)
