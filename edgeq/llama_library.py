"""llama.cpp as a shared library: loaded on first use, silent, and able to say why something failed.

llama.cpp reports the reason of a failure only through its log, and prints that log to stderr unless told otherwise.
Here the log goes to whoever captures it on the thread that made the call, and nowhere else.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from edgeq.errors import require_package

__all__ = ["CapturedLog", "capture_log", "default_threads", "library", "system_info", "versions"]

# enum ggml_log_level in ggml.h
_ERROR_LEVEL = 4
_CONTINUED_LEVEL = 5

_captures = threading.local()
# C keeps the bare pointer of the callback, so Python must keep the object for as long as the process lives.
_log_callback: Any = None


class CapturedLog(list[str]):
    """Lines of llama.cpp's log, without their newlines.

    Attributes:
        errors: the lines of level error among them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[str] = []
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
    try:
        yield captured
    finally:
        stack.remove(captured)


def _on_log(level: int, text: bytes, _user_data: int | None) -> None:
    stack: list[CapturedLog] = _captures.__dict__.get("stack", [])
    if stack:
        stack[-1]._write(level, text.decode("utf-8", errors="replace"))  # noqa: SLF001 - one module


@functools.cache
def library() -> ModuleType:
    """The low-level module of llama-cpp-python: llama.cpp's C API, its backends initialised once, its log captured.

    Raises:
        MissingPackageError: llama-cpp-python is not installed, or its shared library does not load.
    """
    require_package("llama_cpp", "cpu", "to run and to quantize GGUF models")
    lib = importlib.import_module("llama_cpp.llama_cpp")
    global _log_callback  # noqa: PLW0603 - see its definition
    _log_callback = lib.llama_log_callback(_on_log)
    lib.llama_log_set(_log_callback, None)
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
