from __future__ import annotations

import threading
import time

import pytest

from edgeq.errors import SessionClosedError, SessionError
from edgeq.runtime.turns import Ticket, Turns


def idle() -> None:
    pass


def wait_until(condition: threading.Event) -> None:
    assert condition.wait(20)


def test_turns_come_in_the_order_of_arrival() -> None:
    turns = Turns(idle, idle)
    first = Ticket(None)
    assert turns.enter(first)
    order: list[int] = []
    threads = []
    for number in range(5):
        ticket = Ticket(None)

        def work(number: int = number, ticket: Ticket = ticket) -> None:
            turns.enter(ticket)
            order.append(number)
            turns.leave(ticket)

        thread = threading.Thread(target=work)
        thread.start()
        while ticket not in turns._queue:
            time.sleep(0.001)
        threads.append(thread)
    assert order == []
    turns.leave(first)
    for thread in threads:
        thread.join(20)
    assert order == [0, 1, 2, 3, 4]


def test_a_deadline_ends_waiting() -> None:
    turns = Turns(idle, idle)
    holder = Ticket(None)
    threading.Thread(target=turns.enter, args=(holder,)).start()
    while not turns._queue:
        time.sleep(0.001)
    late = Ticket(time.perf_counter() + 0.05)
    assert not turns.enter(late)
    assert late.expired
    turns.leave(holder)
    assert turns.enter(Ticket(None)), "the ticket that gave up is still in the queue"


def test_a_waiting_ticket_can_be_cancelled() -> None:
    turns = Turns(idle, idle)
    holder, waiting = Ticket(None), Ticket(None)
    turns.enter(holder)
    granted: list[bool] = []
    thread = threading.Thread(target=lambda: granted.append(turns.enter(waiting)))
    thread.start()
    while waiting not in turns._queue:
        time.sleep(0.001)
    turns.cancel(waiting)
    thread.join(20)
    assert granted == [False]


def test_cancelling_a_waiting_ticket_does_not_interrupt_the_running_one() -> None:
    interrupts: list[int] = []
    turns = Turns(lambda: interrupts.append(1), idle)
    holder = Ticket(None)
    turns.enter(holder)
    turns.cancel(Ticket(None))
    turns.expire(Ticket(None))
    assert interrupts == []
    turns.cancel_running()
    assert interrupts == [1]
    assert holder.cancelled


def test_a_thread_cannot_wait_for_itself() -> None:
    turns = Turns(idle, idle)
    turns.enter(Ticket(None))
    with pytest.raises(SessionError, match="this thread has an unfinished stream"):
        turns.enter(Ticket(None))


def test_close_waits_for_users_and_refuses_those_who_wait() -> None:
    left = threading.Event()
    interrupted = threading.Event()
    entered = threading.Event()
    turns = Turns(interrupted.set, idle)
    refused: list[SessionClosedError] = []

    def use() -> None:
        with turns.using():
            entered.set()
            wait_until(interrupted)
            time.sleep(0.05)
            left.set()

    def wait() -> None:
        try:
            turns.enter(Ticket(None))
        except SessionClosedError as error:
            refused.append(error)

    turns.enter(Ticket(None))
    threads = [threading.Thread(target=use), threading.Thread(target=wait)]
    for thread in threads:
        thread.start()
    wait_until(entered)
    turns.close()
    assert left.is_set()
    for thread in threads:
        thread.join(20)
    assert len(refused) == 1
    with pytest.raises(SessionClosedError), turns.using():
        pass
