from __future__ import annotations

import os
import signal
import threading

import pytest

from edgeq import llama_workers
from edgeq.llama_workers import run_workers


def test_all_jobs_run_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_workers, "_POLL_S", 0.01)
    meeting = threading.Barrier(3, timeout=30)
    polls: list[int] = []

    def meet() -> None:
        meeting.wait()

    run_workers([meet] * 3, stop=meeting.abort, poll=lambda: polls.append(1))
    assert polls


def test_a_failure_stops_the_others_and_is_raised() -> None:
    stopped = threading.Event()
    ended: list[bool] = []

    def wait() -> None:
        ended.append(stopped.wait(30))

    def fail() -> None:
        raise LookupError("no")

    with pytest.raises(LookupError, match="no"):
        run_workers([wait, fail], stop=stopped.set)
    assert ended == [True], "the other job had ended before this went on"


def test_an_interrupt_stops_the_jobs() -> None:
    stopped = threading.Event()
    ended: list[bool] = []

    def wait() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        ended.append(stopped.wait(30))

    with pytest.raises(KeyboardInterrupt):
        run_workers([wait], stop=stopped.set)
    assert ended == [True]
