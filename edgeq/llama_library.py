"""llama.cpp as a shared library: loaded on first use, silent, and able to say why something failed.

llama.cpp reports the reason of a failure only through its log, and prints that log to stderr unless told otherwise.
Here the log goes to whoever captures it on the thread that made the call, and nowhere else.

Python's signal handlers run between two bytecodes of the main thread. While that thread is in C, the only bytecodes are
those of a callback such as the log's, and what a callback raises is lost: C cannot pass it on. So long calls run on a
thread of their own (`interruptible`), and without a capture the log never enters Python.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import math
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from edgeq.errors import UsageError, require_package

__all__ = [
    "MAX_THREADS",
    "CapturedLog",
    "capture_log",
    "check_threads",
    "default_threads",
    "interruptible",
    "library",
    "system_info",
    "versions",
]

T = TypeVar("T")

# GGML_MAX_N_THREADS in ggml.h; llama.cpp ends the process with more.
MAX_THREADS = 512

# enum ggml_log_level in ggml.h
_ERROR_LEVEL = 4
_CONTINUED_LEVEL = 5

_POLL_S = 0.2

_captures = threading.local()
_switch = threading.Lock()
_n_captures = 0


class CapturedLog(list[str]):
    """Lines of llama.cpp's log, without their newlines.

    Attributes:
        errors: the lines of level error among them.
        failure: what kept a line from being collected, to be raised when the capture ends.
    """

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[str] = []
        self.failure: BaseException | None = None
        self._level = 0
        self._open = False

    def _write(self, level: int, text: str) -> None:
        if level != _CONTINUED_LEVEL:
            self._level = level
        for line in text.splitlines(keepends=True):
            target = self.errors if self._level == _ERROR_LEVEL else None
            for lines in (self, target):
                if lines is None:
                    continue
                if self._open and lines:
                    lines[-1] += line.rstrip("\n")
                else:
                    lines.append(line.rstrip("\n"))
            self._open = not line.endswith("\n")

    def cause(self, fallback: str) -> str:
        """The first error, which is the specific one (later ones only say that loading failed), or ``fallback``."""
        for line in self.errors:
            text = line.strip()
            # "function_name: what went wrong" says more without the function.
            prefix, separator, rest = text.partition(": ")
            message = rest if separator and prefix.replace("_", "").isalnum() else text
            if message:
                return message
        return fallback


@contextlib.contextmanager
def capture_log() -> Iterator[CapturedLog]:
    """Collect the lines that llama.cpp logs on this thread meanwhile. Captures nest; the inner one takes the lines."""
    stack: list[CapturedLog] = _captures.__dict__.setdefault("stack", [])
    captured = CapturedLog()
    stack.append(captured)
    _listen(1)
    try:
        yield captured
    finally:
        _listen(-1)
        stack.remove(captured)
    if captured.failure is not None:
        raise captured.failure


def _listen(change: int) -> None:
    """Count the captures, and let the log into Python only while there are any."""
    global _n_captures  # noqa: PLW0603 - llama.cpp has one log
    lib = library()
    with _switch:
        _n_captures += change
        lib.llama_log_set(_callback() if _n_captures else _silence(), None)


def _on_log(level: int, text: bytes, _user_data: int | None) -> None:
    stack: list[CapturedLog] = _captures.__dict__.get("stack", [])
    if stack:
        try:
            stack[-1]._write(level, text.decode("utf-8", errors="replace"))  # noqa: SLF001 - one module
        except BaseException as error:  # noqa: BLE001 - raised where it can be: at the end of the capture
            stack[-1].failure = error


# C keeps bare pointers of callbacks, so Python must keep the objects for as long as the process lives.
@functools.cache
def _callback() -> Any:  # noqa: ANN401 - a ctypes function
    return _bindings().llama_log_callback(_on_log)


@functools.cache
def _silence() -> Any:  # noqa: ANN401 - a ctypes function
    """A C function that may be called as a log callback and does nothing: ``abs`` looks at its first argument only."""
    return ctypes.cast(ctypes.CDLL(None).abs, _bindings().llama_log_callback)


def interruptible(
    call: Callable[[], T],
    *,
    poll: Callable[[], None] | None = None,
    stop: Callable[[], None] | None = None,
    undo: Callable[[T], None] | None = None,
) -> T:
    """Make a long call of C on another thread, so that an exception of a signal is raised here at once.

    Captures of the log follow the call.

    Args:
        call: what to do; its exceptions are raised here.
        poll: called every fifth of a second meanwhile.
        stop: makes the call end early.
        undo: given its result if this is interrupted and the call comes to its end nevertheless. With ``undo`` an
            interrupt waits for that end, as it must where the call uses what the caller is about to free; without,
            the call is left to itself and its result is dropped.
    """
    stack: list[CapturedLog] = list(_captures.__dict__.get("stack", []))
    results: list[T] = []
    failures: list[BaseException] = []
    done = threading.Event()

    def work() -> None:
        _captures.stack = stack
        try:
            results.append(call())
        except BaseException as error:  # noqa: BLE001 - raised below
            failures.append(error)
        finally:
            done.set()

    worker = threading.Thread(target=work, name="edgeq-llama.cpp")
    try:
        worker.start()
        while not done.wait(_POLL_S):
            if poll is not None:
                poll()
    except BaseException:
        if stop is not None:
            stop()
        if undo is not None and (worker.is_alive() or done.is_set()):
            done.wait()
            for result in results:
                undo(result)
        raise
    if failures:
        raise failures[0]
    return results[0]


def _bindings() -> ModuleType:
    require_package("llama_cpp", "cpu", "to run and to quantize GGUF models")
    return importlib.import_module("llama_cpp.llama_cpp")


@functools.cache
def library() -> ModuleType:
    """The low-level module of llama-cpp-python: llama.cpp's C API, its backends initialised once, its log captured.

    Raises:
        MissingPackageError: llama-cpp-python is not installed, or its shared library does not load.
    """
    lib = _bindings()
    lib.llama_log_set(_silence(), None)
    lib.llama_backend_init()
    return lib


def versions() -> dict[str, str]:
    """Versions for a manifest: ``llama-cpp-python`` and ``llama.cpp``."""
    lib = library()
    package = importlib.import_module("llama_cpp")
    return {"llama-cpp-python": str(package.__version__), "llama.cpp": lib.llama_version().decode()}


def system_info() -> str:
    """What llama.cpp was compiled for and found here, such as ``CPU : AVX2 = 1 | REPACK = 1``."""
    return str(library().llama_print_system_info().decode()).strip(" |")


def check_threads(threads: int) -> int:
    """The same number of threads.

    Raises:
        UsageError: less than 1, or more than llama.cpp can have.
    """
    if not 1 <= threads <= MAX_THREADS:
        raise UsageError(f"{threads} threads make no sense", f"Choose from 1 to {MAX_THREADS}")
    return threads


def default_threads() -> int:
    """Physical cores that this process may use: hyperthreads share the units that matrix products are bound by.

    Respects the CPU affinity and the CPU quota of a container (cgroup v2).
    """
    allowed = os.sched_getaffinity(0)
    cores = {_core_of(cpu) for cpu in allowed}
    return max(1, min(len(cores), _cgroup_cpus()))


def _core_of(cpu: int) -> str:
    siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    try:
        return siblings.read_text(encoding="ascii").strip()
    except OSError:  # containers and some boards hide the topology: count every CPU as a core
        return str(cpu)


def _cgroup_cpus() -> int:
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return os.cpu_count() or 1
    return os.cpu_count() or 1 if quota == "max" else math.ceil(int(quota) / int(period))
