"""The process that builds one engine: a request as JSON on stdin, a reply as JSON to what was stdout.

A process of its own, so that its memory can be watched and taken back whole: TensorRT keeps what it allocated for
kernels, and on a Jetson all of it is memory that the robot's other programs need.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from pathlib import Path
from typing import BinaryIO

import msgspec

from edgeq.errors import EdgeqError
from edgeq.runtime.measure import process_memory
from edgeq.runtime.tensorrt.builder import build_engine
from edgeq.runtime.tensorrt.records import EngineInfo, EngineSettings, Flavour
from edgeq.runtime.tensorrt.versions import find_tensorrt

__all__ = ["BuildReply", "BuildRequest", "Built", "NotBuilt"]

_PR_SET_PDEATHSIG = 1  # prctl(2)


class BuildRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Build this."""

    flavour: Flavour
    onnx: str
    out: str
    settings: EngineSettings
    parent: int


class Built(msgspec.Struct, frozen=True, kw_only=True, tag="built"):
    """It is there."""

    info: EngineInfo


class NotBuilt(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """An `EdgeqError`, by the name of its class."""

    kind: str
    cause: str
    remedy: str
    details: tuple[str, ...]


BuildReply = Built | NotBuilt


def _die_with(parent: int) -> None:
    """Let the kernel end this process when its parent is gone, even in the middle of a build."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it was gone before
        os.kill(os.getpid(), signal.SIGKILL)


def _build(request: BuildRequest) -> BuildReply:
    try:
        trt = find_tensorrt(request.flavour)
        info = build_engine(trt, Path(request.onnx), Path(request.out), request.settings)
    except EdgeqError as error:
        return NotBuilt(kind=type(error).__name__, cause=error.cause, remedy=error.remedy, details=error.details)
    memory = process_memory()
    return Built(info=msgspec.structs.replace(info, peak_memory_bytes=None if memory is None else memory.peak_bytes))


def _claim_stdout() -> BinaryIO:
    """The descriptor for the reply; what libraries print goes to stderr from now on."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return replies


def main() -> int:
    """Serve one request."""
    with _claim_stdout() as replies:
        request = msgspec.json.decode(sys.stdin.buffer.read(), type=BuildRequest)
        with contextlib.suppress(AttributeError):  # a C library without prctl
            _die_with(request.parent)
        replies.write(msgspec.json.encode(_build(request)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
