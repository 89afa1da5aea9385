"""The process that is measured: it loads one bundle and generates on command, one line of JSON each way.

A process of its own, so that its high-water mark of memory is that of serving and nothing else. Commands come on
stdin, replies go to the descriptor that was stdout; whatever libraries print goes to stderr. When the parent dies,
stdin ends, and so does the worker, even in the middle of a generation.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import msgspec

from edgeq._version import __version__
from edgeq.errors import EdgeqError, SessionError
from edgeq.runtime.measure import process_memory

if TYPE_CHECKING:
    from edgeq.runtime.llm import LLMSession

__all__ = ["Command", "Exit", "Failed", "Finished", "Generate", "Load", "Loaded", "Reply", "Sample", "Usage"]

_LOST_PARENT = 1


class Load(msgspec.Struct, frozen=True, kw_only=True, tag="load"):
    """Load a bundle, and tokenize ``text`` without making it the start of a prompt."""

    bundle: str
    threads: int | None
    context_tokens: int | None
    text: str


class Generate(msgspec.Struct, frozen=True, kw_only=True, tag="generate"):
    """Answer a prompt with exactly ``max_tokens`` tokens."""

    prompt: list[int]
    max_tokens: int


class Usage(msgspec.Struct, frozen=True, tag="usage"):
    """Tell what was used so far."""


class Exit(msgspec.Struct, frozen=True, tag="exit"):
    """Close the session and end."""


Command = Load | Generate | Usage | Exit


class Loaded(msgspec.Struct, frozen=True, kw_only=True, tag="loaded"):
    """The session is ready."""

    load_ms: float
    context_tokens: int
    threads: int
    text_tokens: list[int]
    resident_before_load_bytes: int | None
    tools: dict[str, str]


class Sample(msgspec.Struct, frozen=True, kw_only=True, tag="sample"):
    """One answer's timings."""

    n_tokens: int
    cached_tokens: int
    ttft_ms: float
    gaps_ms: list[float]


class Finished(msgspec.Struct, frozen=True, kw_only=True, tag="usage"):
    """Processor time and memory of this process since it was executed; None where the kernel does not tell."""

    cpu_s: float
    peak_bytes: int | None
    anonymous_bytes: int | None
    file_bytes: int | None


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """A failure with its remedy. ``kind`` is the name of the class in `edgeq.errors`."""

    kind: str
    cause: str
    remedy: str
    details: tuple[str, ...]


Reply = Loaded | Sample | Finished | Failed


def _read_commands(commands: queue.SimpleQueue[bytes]) -> None:
    # Unbuffered: a buffered reader that waits in a daemon thread holds a lock that the interpreter's end dies on.
    with os.fdopen(os.dup(sys.stdin.fileno()), "rb", buffering=0) as stream:
        for line in stream:
            commands.put(line)
    # Nobody is left to hear a result; the main thread may be inside C and would not notice for a while.
    os._exit(_LOST_PARENT)


def _load(command: Load) -> tuple[LLMSession, Loaded]:
    memory = process_memory()
    from edgeq.llama_library import system_info, versions
    from edgeq.runtime.session import load

    session = load(Path(command.bundle), kind="llm", threads=command.threads, context_tokens=command.context_tokens)
    tools = {
        "edgeq": __version__,
        "python": sys.version.split()[0],
        **versions(),
        "llama.cpp system": system_info(),
    }
    return session, Loaded(
        load_ms=session.load_ms,
        context_tokens=session.context_tokens,
        threads=session.threads,
        text_tokens=session.tokenize(command.text),
        resident_before_load_bytes=None if memory is None else memory.resident_bytes,
        tools=tools,
    )


def _generate(session: LLMSession, command: Generate) -> Sample:
    generation = session.generate(command.prompt, max_tokens=command.max_tokens, temperature=0.0, ignore_eos=True)
    timings = generation.timings
    if timings.ttft_ms is None:
        raise SessionError("The model gave no token at all", "Check the bundle with: edgeq verify")
    return Sample(
        n_tokens=len(generation.token_ids),
        cached_tokens=timings.cached_tokens,
        ttft_ms=timings.ttft_ms,
        gaps_ms=list(timings.gaps_ms),
    )


def _usage() -> Finished:
    memory = process_memory()
    return Finished(
        cpu_s=time.process_time(),
        peak_bytes=None if memory is None else memory.peak_bytes,
        anonymous_bytes=None if memory is None else memory.anonymous_bytes,
        file_bytes=None if memory is None else memory.file_bytes,
    )


def _serve(commands: queue.SimpleQueue[bytes], replies: BinaryIO) -> None:
    session: LLMSession | None = None
    decoder = msgspec.json.Decoder(Command)
    try:
        while not isinstance(command := decoder.decode(commands.get()), Exit):
            reply: Reply
            if isinstance(command, Load):
                session, reply = _load(command)
            elif isinstance(command, Usage):
                reply = _usage()
            elif session is None:
                raise SessionError("The benchmark asked for an answer before it loaded a bundle")
            else:
                reply = _generate(session, command)
            replies.write(msgspec.json.encode(reply) + b"\n")
    finally:
        if session is not None:
            session.close()


def main() -> int:
    """Serve commands until told to exit; an `EdgeqError` is told to the parent, anything else is a traceback."""
    with os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0) as replies:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        commands: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=_read_commands, args=(commands,), daemon=True).start()
        try:
            _serve(commands, replies)
        except EdgeqError as error:
            failed = Failed(
                kind=type(error).__name__, cause=error.cause, remedy=error.remedy, details=tuple(error.details)
            )
            replies.write(msgspec.json.encode(failed) + b"\n")
            return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
