"""Ctrl-C while llama.cpp works: it arrives at once, and nothing that llama.cpp logs can swallow it."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from edgeq import llama_library
from edgeq.errors import UsageError
from edgeq.llama import Context, Model, capture_log
from edgeq.llama_library import check_threads, interruptible


def interrupt_when(ready: Callable[[], bool]) -> None:
    """SIGINT to the main thread as soon as ``ready`` says so."""

    def work() -> None:
        while not ready():
            time.sleep(0.001)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    threading.Thread(target=work, daemon=True).start()


def test_the_result_and_the_exception_of_a_call() -> None:
    assert interruptible(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        interruptible(lambda: 1 // 0)


def test_polling_goes_on_while_the_call_lasts() -> None:
    polled = threading.Event()
    assert interruptible(lambda: polled.wait(30), poll=polled.set)


def test_an_interrupt_leaves_a_call_to_itself() -> None:
    release, started, ended = threading.Event(), threading.Event(), threading.Event()

    def call() -> None:
        started.set()
        release.wait(30)
        ended.set()

    interrupt_when(started.is_set)
    with pytest.raises(KeyboardInterrupt):
        interruptible(call)
    assert not ended.is_set()
    release.set()
    assert ended.wait(30)


def test_an_interrupt_stops_a_call_and_undoes_what_it_made() -> None:
    stopped, started = threading.Event(), threading.Event()
    undone: list[str] = []

    def call() -> str:
        started.set()
        stopped.wait(30)
        return "made"

    interrupt_when(started.is_set)
    with pytest.raises(KeyboardInterrupt):
        interruptible(call, stop=stopped.set, undo=undone.append)
    assert undone == ["made"]


def test_an_interrupt_of_loading_a_model(smollm2_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal comes in the middle of llama.cpp's log, which is where it was lost."""
    logging = threading.Event()
    write = llama_library.CapturedLog._write

    def slow(self: llama_library.CapturedLog, level: int, text: str) -> None:
        logging.set()
        time.sleep(0.002)
        write(self, level, text)

    monkeypatch.setattr(llama_library.CapturedLog, "_write", slow)
    interrupt_when(logging.is_set)
    with pytest.raises(KeyboardInterrupt):
        Model.load(smollm2_gguf)
    monkeypatch.undo()
    with Model.load(smollm2_gguf, vocab_only=True) as model:
        assert model.n_vocab == 49152


def test_an_interrupt_of_making_a_context(smollm2_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Model.load(smollm2_gguf, use_mmap=True) as model:
        logging = threading.Event()

        def slow(*_: object) -> None:
            logging.set()
            time.sleep(0.01)

        monkeypatch.setattr(llama_library.CapturedLog, "_write", slow)
        interrupt_when(logging.is_set)
        with pytest.raises(KeyboardInterrupt):
            Context(model, context_tokens=256)
        monkeypatch.undo()
        with Context(model, context_tokens=256) as context:
            assert context.n_ctx == 256


def test_what_goes_wrong_in_the_log_is_raised_after_the_call(
    smollm2_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("no room for a line")

    monkeypatch.setattr(llama_library.CapturedLog, "_write", fail)
    with pytest.raises(MemoryError, match="no room for a line"), capture_log():
        Model.load(smollm2_gguf, vocab_only=True)


@pytest.mark.parametrize("threads", [0, -1, 513, 100_000])
def test_numbers_of_threads_that_would_end_the_process(smollm2_gguf: Path, threads: int) -> None:
    with pytest.raises(UsageError, match="1 to 512"):
        check_threads(threads)
    if threads > 0:
        with (
            Model.load(smollm2_gguf, use_mmap=True) as model,
            pytest.raises(UsageError, match="1 to 512"),
        ):
            Context(model, context_tokens=256, threads=threads)
