"""The language model session: what a program holds and asks."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from edgeq.errors import PromptTooLongError, SessionError
from edgeq.runtime.engine import Engine, EngineSettings
from edgeq.runtime.generation import Generation, Options, Prompt, Token
from edgeq.runtime.prompt import PromptEncoder
from edgeq.runtime.stream import TokenStream
from edgeq.runtime.turns import Turns
from edgeq.types import Manifest

__all__ = ["LLMSession"]


class LLMSession:
    """A loaded language model. A context manager; every method may be called from any thread.

    One request is computed at a time; others wait in the order of their arrival. All memory is taken when the session
    is made: weights are read (not mapped), the KV cache and compute buffers are allocated, so a robot in motion waits
    for no page from disk.

    Args:
        path: the GGUF.
        settings: how to run it.
        manifest: of the bundle that the file belongs to.
        started: when loading began, on the clock of `time.perf_counter`.

    Attributes:
        load_ms: from the call of `edgeq.load` to a session that is ready.
        context_tokens: tokens of prompt and answer together.
        threads: threads that compute.

    Raises:
        SessionError: the file cannot be loaded, it holds no vocabulary, or memory is too small.
        MissingPackageError: llama-cpp-python is not installed.
    """

    def __init__(
        self, path: Path, settings: EngineSettings, *, manifest: Manifest | None = None, started: float | None = None
    ) -> None:
        began = time.perf_counter() if started is None else started
        self._closed = True  # until everything below has succeeded there is nothing to close
        self._manifest = manifest
        self._engine = Engine(path, settings)
        try:
            self._encoder = PromptEncoder(self._engine.model)
        except BaseException:
            self._engine.close()
            raise
        self._turns = Turns(self._engine.context.interrupt, self._engine.context.resume)
        self._closed = False
        self.context_tokens = settings.context_tokens
        self.threads = self._engine.context.threads
        self.load_ms = (time.perf_counter() - began) * 1000

    @property
    def manifest(self) -> Manifest:
        """Of the bundle. Raises SessionError for a session over a bare GGUF."""
        if self._manifest is None:
            raise SessionError("this session runs a bare GGUF, which has no manifest", "Load a bundle")
        return self._manifest

    def generate(  # noqa: PLR0913 - what people ask of a language model
        self,
        prompt: Prompt,
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 40,
        top_p: float = 0.95,
        min_p: float = 0.05,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        deadline_ms: float | None = None,
        on_token: Callable[[Token], object] | None = None,
        ignore_eos: bool = False,
    ) -> Generation:
        """Answer a prompt.

        Args:
            prompt: raw text, in which control tokens are mere text; messages (``role``, ``content``) for the model's
                chat template; or token ids, taken as they are.
            max_tokens: of the answer; the context may end it earlier.
            temperature: 0 takes the most likely token; more is more random.
            top_k: choose among so many tokens; 0 for all.
            top_p: choose among the most likely tokens that hold so much probability.
            min_p: choose among tokens with so large a share of the most likely one's probability.
            seed: the same seed gives the same text; None for another one each time.
            stop: strings that end the answer and are not part of it.
            deadline_ms: from this call; the answer so far is returned when it has passed. Waiting and the prompt count.
            on_token: called with each `Token`. If it raises, generation stops and the exception goes on.
            ignore_eos: go on when the model has ended its answer; for measurements of exact length.

        Raises:
            PromptTooLongError: the prompt does not fit the context.
            UsageError: an argument that makes no sense.
            SessionClosedError: the session was closed before the request's turn.
            SessionError: llama.cpp failed.
        """
        with self.stream(
            prompt,
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
            stop=stop,
            deadline_ms=deadline_ms,
            ignore_eos=ignore_eos,
        ) as stream:
            for token in stream:
                if on_token is not None:
                    on_token(token)
        return stream.result

    def stream(  # noqa: PLR0913 - as `generate`
        self,
        prompt: Prompt,
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 40,
        top_p: float = 0.95,
        min_p: float = 0.05,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        deadline_ms: float | None = None,
        ignore_eos: bool = False,
    ) -> TokenStream:
        """Answer a prompt token by token. Arguments and errors are those of `generate`.

        The request queues when the first token is asked for, and holds the session until the stream ends, is closed
        or is dropped. It belongs to the thread that iterates it.
        """
        started = time.perf_counter()
        options = Options(
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            deadline_ms=deadline_ms,
            ignore_eos=ignore_eos,
        )
        with self._turns.using():
            ids = self._encoder.encode(prompt)
        if len(ids) > self.context_tokens:
            raise PromptTooLongError(
                f"the prompt has {len(ids)} tokens, and the context holds {self.context_tokens}",
                "Shorten the prompt, or convert again with a larger --context",
            )
        return TokenStream(
            self._engine, self._turns, ids, options, limit=self.context_tokens, started=started, owner=self
        )

    def cancel(self) -> None:
        """Stop the request that is being computed, which then ends with ``"cancelled"``. Any thread may call it."""
        self._turns.cancel_running()

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a raw text, as `generate` sees it."""
        with self._turns.using():
            return self._encoder.encode(text) if text else []

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Messages as the text that the model's chat template makes of them, ready for the assistant's answer."""
        with self._turns.using():
            return self._encoder.render(messages)

    def close(self) -> None:
        """Free the model. A running request ends with ``"cancelled"``, waiting ones raise SessionClosedError.

        Calling it again does nothing.
        """
        if not self._closed:
            self._turns.close()
            self._engine.close()
            self._closed = True

    def __enter__(self) -> LLMSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not self._closed:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=1)
            self.close()

    def __repr__(self) -> str:
        name = self._manifest.name if self._manifest is not None else self._engine.model.path.name
        return f"<LLMSession {name}{' (closed)' if self._closed else ''}>"
