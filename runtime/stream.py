"""One request from queue to answer, as an iterator of tokens."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Sequence
from types import TracebackType

import numpy as np

from edgeq.errors import SessionClosedError, SessionError
from edgeq.runtime.engine import Engine
from edgeq.runtime.generation import FinishReason, Generation, Options, Timings, Token
from edgeq.runtime.sampling import make_sampler
from edgeq.runtime.text import TextStream
from edgeq.runtime.turns import Ticket, Turns

__all__ = ["TokenStream"]


class TokenStream:
    """Iterates over the tokens of an answer; `edgeq.runtime.llm.LLMSession.stream` makes it.

    Left early (``break`` out of ``with``, `close`, or dropped), it gives the session back and counts as cancelled.
    """

    def __init__(
        self,
        engine: Engine,
        turns: Turns,
        prompt: Sequence[int],
        options: Options,
        *,
        limit: int,
        started: float,
        owner: object,
    ) -> None:
        self._owner = owner  # a session that nobody else holds must not be collected under its stream
        self._engine = engine
        self._turns = turns
        self._prompt = np.asarray(prompt, np.int32)
        self._options = options
        self._limit = limit
        self._text = TextStream(options.stop)
        self._record = _Record(started)
        deadline = None if options.deadline_ms is None else started + options.deadline_ms / 1000
        self._ticket = Ticket(deadline)
        self._reason: FinishReason | None = None
        self._result: Generation | None = None
        self._sampler = make_sampler(options)
        self._tokens = self._run()

    def __iter__(self) -> TokenStream:
        return self

    def __next__(self) -> Token:
        return next(self._tokens)

    @property
    def result(self) -> Generation:
        """The whole answer. Raises SessionError while the stream is not at its end."""
        if self._result is None:
            raise SessionError("the stream is not at its end", "Iterate over it or close it first")
        return self._result

    def cancel(self) -> None:
        """Let the stream end with ``"cancelled"``, at once even inside of a long prompt. Any thread may call it."""
        self._turns.cancel(self._ticket)

    def close(self) -> None:
        """End the stream here and give the session back. Only for the thread that iterates; others call `cancel`."""
        self._tokens.close()
        if self._result is None:  # closed before it was started: the generator's own clean-up never ran
            self._finish()

    def __enter__(self) -> TokenStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self) -> Generator[Token, None, None]:
        timer: threading.Timer | None = None
        try:
            if not self._turns.enter(self._ticket):
                return
            self._record.turn = time.perf_counter()
            if self._ticket.deadline is not None:
                remaining = max(0.0, self._ticket.deadline - self._record.turn)
                timer = threading.Timer(remaining, self._turns.expire, (self._ticket,))
                timer.daemon = True
                timer.start()
            yield from self._compute()
        except SessionClosedError:
            if not self._record.turn:
                raise
            self._reason = "cancelled"  # closed by another thread while this one was at work
        finally:
            if timer is not None:
                timer.cancel()
            self._finish()

    def _compute(self) -> Generator[Token, None, None]:
        record, text = self._record, self._text
        step = self._prefill()
        while step is not None:
            token, ends, piece = step
            if ends and not self._options.ignore_eos:
                self._reason = "stop"
                break
            gap_ms = record.add(token)
            shown = text.push(piece)
            if text.stopped:
                self._reason = "stop"
            elif len(record.ids) >= self._options.max_tokens or self._position > self._limit:
                self._reason = "length"
            if self._reason is not None:
                shown += text.finish()
            record.text.append(shown)
            record.hand_over()
            yield Token(shown, token, gap_ms)
            record.take_back()
            if self._reason is not None or self._interrupted():
                break
            step = self._advance(token)
        rest = text.finish()
        if rest:
            record.text.append(rest)
            yield Token(rest, None, None)

    @property
    def _position(self) -> int:
        """Where the next token will be put, counted from 1."""
        return len(self._prompt) + len(self._record.ids)

    def _prefill(self) -> tuple[int, bool, bytes] | None:
        """Compute the prompt. Returns the first token, whether it ends the answer, and its bytes; None if stopped."""
        with self._turns.using():
            position: int | None = self._engine.begin(self._prompt)
        self._record.cached = position or 0
        while position is not None and position < len(self._prompt):
            if self._interrupted():
                return None
            with self._turns.using():
                position = self._engine.prefill(self._prompt, position)
                if position == len(self._prompt):
                    return self._choose()
        self._interrupted()
        return None

    def _advance(self, token: int) -> tuple[int, bool, bytes] | None:
        with self._turns.using():
            if self._engine.context.decode_one(token, self._position - 1):
                return self._choose()
        self._interrupted()
        return None

    def _choose(self) -> tuple[int, bool, bytes]:
        model = self._engine.model
        token = self._sampler.sample(self._engine.context)
        return token, model.is_eog(token), model.token_bytes(token)

    def _interrupted(self) -> bool:
        """Whether to stop now; notes the reason."""
        if self._ticket.cancelled or self._turns.closed:
            self._reason = "cancelled"
        elif self._ticket.expired:
            self._reason = "deadline"
        return self._reason is not None

    def _finish(self) -> None:
        self._turns.leave(self._ticket)
        self._sampler.close()
        if self._reason is None:
            self._reason = "deadline" if self._ticket.expired and not self._ticket.cancelled else "cancelled"
        record = self._record
        self._result = Generation(
            text="".join(record.text),
            token_ids=tuple(record.ids),
            prompt_tokens=len(self._prompt),
            finish_reason=self._reason,
            timings=record.timings(),
        )


class _Record:
    """Tokens and times of one request, in seconds on the clock of `time.perf_counter`."""

    def __init__(self, started: float) -> None:
        self.started = started
        self.turn = 0.0
        self.cached = 0
        self.ids: list[int] = []
        self.text: list[str] = []
        self._first: float | None = None
        self._since = 0.0
        self._handed_over = 0.0
        self._gaps_ms: list[float] = []

    def add(self, token: int) -> float | None:
        """Note a token that was computed just now. Returns its gap in milliseconds."""
        now = time.perf_counter()
        since, self._since = self._since, now
        self.ids.append(token)
        if self._first is None:
            self._first = now
            return None
        gap_ms = (now - since) * 1000
        self._gaps_ms.append(gap_ms)
        return gap_ms

    def hand_over(self) -> None:
        """The caller gets a token: what follows is the caller's time."""
        self._handed_over = time.perf_counter()

    def take_back(self) -> None:
        """The caller has asked for the next token."""
        self._since += time.perf_counter() - self._handed_over

    def timings(self) -> Timings:
        """What `Timings` says, as of now."""
        now = time.perf_counter()
        turn = self.turn or now
        first = now if self._first is None else self._first
        decode_ms = sum(self._gaps_ms)
        return Timings(
            queue_ms=(turn - self.started) * 1000,
            prompt_ms=(first - turn) * 1000,
            ttft_ms=None if self._first is None else (self._first - self.started) * 1000,
            gaps_ms=tuple(self._gaps_ms),
            total_ms=(now - self.started) * 1000,
            tokens_per_s=1000 * len(self._gaps_ms) / decode_ms if decode_ms else None,
            cached_tokens=self.cached,
        )
