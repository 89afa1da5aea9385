"""Build an engine in a process of its own, under a limit of memory."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import msgspec

from edgeq import errors
from edgeq.errors import EdgeqError, SessionError
from edgeq.runtime.tensorrt.build_worker import BuildReply, BuildRequest, NotBuilt
from edgeq.runtime.tensorrt.graph_file import graph_bytes
from edgeq.runtime.tensorrt.records import EngineInfo, EngineSettings, Flavour
from edgeq.units import format_bytes

__all__ = ["build_limited", "likely_peak_bytes"]

_POLL_S = 0.01  # TensorRT allocates a gigabyte in about a tenth of a second
_PROGRESS_S = 0.5
_TAIL_BYTES = 4096
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
# Fitted on peaks of TensorRT-RTX 1.7.1 on x86-64: MobileNetV2 (8.7 MiB of FP32 weights) 239 MiB, MiniLM (87) 525,
# ResNet-50 (90) 476, ViT-B/16 (328) 1290. TensorRT itself, which also needs CUDA's context, was not measured.
_BASE_BYTES = 256 << 20
_BYTES_PER_MODEL_BYTE = 3.4
_LIMIT_STEP_BYTES = 256 << 20

Progress = Callable[[float, int], None]


def likely_peak_bytes(onnx: Path) -> int:
    """What a build takes about, by the size of the model: the library itself, and its copies of the weights.

    Raises:
        SourceError: the model cannot be read.
    """
    return _BASE_BYTES + int(_BYTES_PER_MODEL_BYTE * graph_bytes(onnx))


def build_limited(
    flavour: Flavour,
    onnx: Path,
    out: Path,
    settings: EngineSettings,
    *,
    limit_bytes: int | None = None,
    progress: Progress | None = None,
) -> EngineInfo:
    """`edgeq.runtime.tensorrt.builder.build_engine` in a process of its own.

    Args:
        flavour: the library.
        onnx: the graph.
        out: the engine; written whole or not at all.
        settings: what it shall be.
        limit_bytes: resident memory at which the process is ended; None for no limit. CUDA's memory of a Jetson is not
            part of what the kernel counts there; TensorRT is told the limit as its own for it (``tactic_bytes``).
        progress: called about twice a second with the seconds and the memory so far.

    Raises:
        EdgeqError: what building raises, of the same class.
        SessionError: the limit was reached, with one that would do, or the process died.
    """
    likely = likely_peak_bytes(onnx)
    if limit_bytes is not None and settings.tactic_bytes is None:
        settings = msgspec.structs.replace(settings, tactic_bytes=limit_bytes)
    request = BuildRequest(
        flavour=flavour, onnx=os.fspath(onnx), out=os.fspath(out), settings=settings, parent=os.getpid()
    )
    # Files, not pipes: nobody has to drain them while the worker computes.
    with tempfile.TemporaryFile() as replies, tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "edgeq.runtime.tensorrt.build_worker"],
            stdin=subprocess.PIPE,
            stdout=replies,
            stderr=stderr,
        )
        try:
            _send(process, msgspec.json.encode(request))
            peak = _watch(process, limit_bytes, progress)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
            with contextlib.suppress(OSError):
                out.with_name(f"{out.name}.{process.pid}.part").unlink(missing_ok=True)
        if limit_bytes is not None and peak > limit_bytes:
            raise _limit_reached(onnx, limit_bytes, likely)
        return _result(process.returncode, replies, stderr, peak, likely)


def _send(process: subprocess.Popen[bytes], request: bytes) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError), process.stdin as stdin:  # its death is told when it is waited for
        stdin.write(request)


def _watch(process: subprocess.Popen[bytes], limit_bytes: int | None, progress: Progress | None) -> int:
    """Wait for the end, or end it at the limit; the largest memory that was seen."""
    started = told = time.monotonic()
    peak = 0
    while process.poll() is None:
        peak = max(peak, _resident_bytes(process.pid))
        if limit_bytes is not None and peak > limit_bytes:
            process.kill()
            break
        now = time.monotonic()
        if progress is not None and now - told >= _PROGRESS_S:
            told = now
            progress(now - started, peak)
        time.sleep(_POLL_S)
    return peak


def _resident_bytes(pid: int) -> int:
    """By /proc/PID/statm (proc_pid_statm(5)), the quickest of the kernel's answers; 0 for a process that is gone."""
    try:
        fields = Path(f"/proc/{pid}/statm").read_bytes().split()
        return int(fields[1]) * _PAGE_BYTES
    except (OSError, IndexError, ValueError):
        return 0


def _round_up(n_bytes: int) -> str:
    steps = -(-n_bytes // _LIMIT_STEP_BYTES)
    return f"{steps * (_LIMIT_STEP_BYTES >> 20)}MiB"


def _limit_reached(onnx: Path, limit_bytes: int, likely: int) -> SessionError:
    # Where the model's size says less than was already used, half as much again is the next guess.
    enough = likely if likely > limit_bytes else limit_bytes + limit_bytes // 2
    return SessionError(
        f"Building the engine of {onnx.name} took more than the limit of {format_bytes(limit_bytes)}",
        f"By its size it needs about {format_bytes(enough)}: use --memory-limit {_round_up(enough)}",
    )


def _result(code: int, replies: IO[bytes], stderr: IO[bytes], peak: int, likely: int) -> EngineInfo:
    replies.seek(0)
    data = replies.read()
    if code == 0 and data:
        reply: BuildReply = msgspec.json.decode(data, type=BuildReply)
        if isinstance(reply, NotBuilt):
            raise _rebuild(reply)
        return reply.info
    if code == -signal.SIGKILL:
        enough = max(likely, peak + peak // 2)
        raise SessionError(
            f"The system ended the building process at {format_bytes(peak)}, most likely because memory ran out",
            f"By its size it needs about {format_bytes(enough)}: stop other programs, add swap, or build on another "
            "machine",
        )
    stderr.seek(max(0, stderr.seek(0, 2) - _TAIL_BYTES))
    tail = [line.strip() for line in stderr.read().decode("utf-8", "replace").splitlines() if line.strip()]
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    said = f"; its last words: {tail[-1]}" if tail else ""
    raise SessionError(
        f"The building process {how}{said}",
        "Run it again; if it stays so, tell TensorRT's developers",
        details=tuple(tail[-20:-1]),
    )


def _rebuild(failed: NotBuilt) -> EdgeqError:
    kind = getattr(errors, failed.kind, SessionError)
    if not (isinstance(kind, type) and issubclass(kind, EdgeqError)):
        kind = SessionError
    return kind(failed.cause, failed.remedy, details=failed.details)
