"""The process that is measured: it loads one bundle and computes on command, one line of JSON each way.

A process of its own, so that its high-water mark of memory is that of serving and nothing else. Commands come on
stdin, replies go to the descriptor that was stdout; whatever libraries print goes to stderr. When the parent dies,
stdin ends, and so does the worker, even in the middle of a computation.
"""

from __future__ import annotations

import itertools
import os
import queue
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol

import msgspec

from edgeq._version import __version__
from edgeq.errors import EdgeqError, SessionError
from edgeq.runtime.bench_messages import (
    Call,
    Called,
    Command,
    Exit,
    Failed,
    Fed,
    Feed,
    Finished,
    Generate,
    Load,
    Loaded,
    LoadTensor,
    Reply,
    Sample,
    TensorLoaded,
    Usage,
)
from edgeq.runtime.measure import process_memory

if TYPE_CHECKING:
    from edgeq.inputs.arrays import Array

__all__ = ["main"]

_LOST_PARENT = 1
_TENSOR_TOOLS = ("numpy", "onnxruntime", "tensorrt", "tensorrt_rtx")


class _Served(Protocol):
    """A loaded bundle."""

    ready: Reply

    def answer(self, command: Command) -> Reply:
        """What a command of this kind of bundle leads to."""
        ...

    def close(self) -> None:
        """Free the model."""
        ...


class _LanguageModel:
    """A language model; see `_Served`."""

    def __init__(self, command: Load) -> None:
        before = _resident_bytes()
        from edgeq.llama_library import system_info, versions
        from edgeq.runtime.session import load

        self._session = load(
            Path(command.bundle), kind="llm", threads=command.threads, context_tokens=command.context_tokens
        )
        self.ready: Reply = Loaded(
            load_ms=self._session.load_ms,
            context_tokens=self._session.context_tokens,
            threads=self._session.threads,
            text_tokens=self._session.tokenize(command.text),
            resident_before_load_bytes=before,
            tools=_tools({**versions(), "llama.cpp system": system_info()}),
        )

    def answer(self, command: Command) -> Reply:
        if not isinstance(command, Generate):
            raise _unexpected(command)
        generation = self._session.generate(
            command.prompt, max_tokens=command.max_tokens, temperature=0.0, ignore_eos=True
        )
        timings = generation.timings
        if timings.ttft_ms is None:
            raise SessionError("The model gave no token at all", "Check the bundle with: edgeq verify")
        return Sample(
            n_tokens=len(generation.token_ids),
            cached_tokens=timings.cached_tokens,
            ttft_ms=timings.ttft_ms,
            gaps_ms=list(timings.gaps_ms),
        )

    def close(self) -> None:
        self._session.close()


class _TensorModel:
    """A model that is called with arrays; see `_Served`."""

    def __init__(self, command: LoadTensor) -> None:
        before = _resident_bytes()
        from edgeq.runtime.session import load
        from edgeq.runtime.tensor.session import TensorSession

        # As a robot loads it: a text encoder brings its tokenizer, which takes time and memory too.
        session = load(Path(command.bundle), threads=command.threads, device=command.device)
        if not isinstance(session, TensorSession):
            session.close()
            raise SessionError("The benchmark asked a language model for calls with arrays")
        self._session = session
        self._calls: list[dict[str, Array]] = []
        self._turns = itertools.cycle(self._calls)
        versions = {name: sys.modules[name].__version__ for name in _TENSOR_TOOLS if name in sys.modules}
        self.ready: Reply = TensorLoaded(
            load_ms=session.load_ms,
            threads=session.threads,
            resident_before_load_bytes=before,
            tools=_tools(versions),
            providers=session.providers,
        )

    def answer(self, command: Command) -> Reply:
        if isinstance(command, Feed):
            self._calls = _read_calls(Path(command.inputs))
            self._turns = itertools.cycle(self._calls)
            return Fed(calls=len(self._calls))
        if not isinstance(command, Call) or not self._calls:
            raise _unexpected(command)
        run, latencies_ms = self._session.run, []
        end = time.perf_counter() + command.seconds
        for feed in itertools.islice(self._turns, command.most):
            started = time.perf_counter()
            run(feed)
            ended = time.perf_counter()
            latencies_ms.append((ended - started) * 1e3)
            if ended >= end:
                break
        return Called(latencies_ms=latencies_ms)

    def close(self) -> None:
        self._session.close()


def _read_calls(path: Path) -> list[dict[str, Array]]:
    import numpy as np

    calls: dict[str, dict[str, Array]] = {}
    with np.load(path, allow_pickle=False) as archive:
        for place in archive.files:
            index, _, name = place.partition(".")
            calls.setdefault(index, {})[name] = archive[place]
    return list(calls.values())


def _unexpected(command: Command) -> SessionError:
    return SessionError(f"The benchmark asked this bundle for {type(command).__name__}, which it does not know")


def _tools(others: dict[str, str]) -> dict[str, str]:
    return {"edgeq": __version__, "python": sys.version.split()[0], **others}


def _resident_bytes() -> int | None:
    memory = process_memory()
    return None if memory is None else memory.resident_bytes


def _read_commands(commands: queue.SimpleQueue[bytes]) -> None:
    # Unbuffered: a buffered reader that waits in a daemon thread holds a lock that the interpreter's end dies on.
    with os.fdopen(os.dup(sys.stdin.fileno()), "rb", buffering=0) as stream:
        for line in stream:
            commands.put(line)
    # Nobody is left to hear a result; the main thread may be inside C and would not notice for a while.
    os._exit(_LOST_PARENT)


def _usage() -> Finished:
    memory = process_memory()
    return Finished(
        cpu_s=time.process_time(),
        peak_bytes=None if memory is None else memory.peak_bytes,
        anonymous_bytes=None if memory is None else memory.anonymous_bytes,
        file_bytes=None if memory is None else memory.file_bytes,
    )


def _serve(commands: queue.SimpleQueue[bytes], replies: BinaryIO) -> None:
    served: _Served | None = None
    decoder = msgspec.json.Decoder(Command)
    try:
        while not isinstance(command := decoder.decode(commands.get()), Exit):
            if isinstance(command, Usage):
                reply: Reply = _usage()
            elif isinstance(command, Load | LoadTensor):
                served = _LanguageModel(command) if isinstance(command, Load) else _TensorModel(command)
                reply = served.ready
            elif served is None:
                raise SessionError("The benchmark asked for an answer before it loaded a bundle")
            else:
                reply = served.answer(command)
            replies.write(msgspec.json.encode(reply) + b"\n")
    finally:
        if served is not None:
            served.close()


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
