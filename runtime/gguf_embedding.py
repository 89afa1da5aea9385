"""The embedding session over a GGUF: texts in, vectors out, computed by llama.cpp."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from edgeq.errors import SessionClosedError, UsageError
from edgeq.inputs.text import check_texts
from edgeq.llama_embedding import EmbeddingContext, Pooling
from edgeq.llama_model import Model
from edgeq.runtime.tensor.pooling import normalized

__all__ = ["GgufEmbeddingSession"]


class GgufEmbeddingSession:
    """A loaded text encoder. A context manager; every method may be called from any thread, one is served at a time.

    Args:
        path: the GGUF.
        threads: that compute; None for the physical cores.
        batch_tokens: the most tokens that are computed at once. Texts of more, or of more than the model was trained
            for, are cut.
        pooling: how states of tokens become one vector; None for what the GGUF says.
        normalize: whether vectors get the length 1; GGUFs do not say it.
        lowercase: texts before they are tokenized, whatever the GGUF's tokenizer does; GGUFs do not say that either.
        started: when loading began, on the clock of `time.perf_counter`.

    Attributes:
        dimensions: of a vector.
        pooling: that counts.
        max_tokens: of a text, special ones included.
        threads: that compute.
        load_ms: from the beginning of loading to a session that is ready.

    Raises:
        SessionError: the file cannot be loaded, memory is too small, or nothing says how to pool.
        UsageError: numbers that make no sense.
        MissingPackageError: llama-cpp-python is not installed.
    """

    def __init__(
        self,
        path: Path,
        *,
        threads: int | None = None,
        batch_tokens: int = 512,
        pooling: Pooling | None = None,
        normalize: bool = True,
        lowercase: bool = False,
        started: float | None = None,
    ) -> None:
        began = time.perf_counter() if started is None else started
        self._closed = True  # until everything below has succeeded there is nothing to close
        self._model = Model.load(path)
        try:
            self._model.check_vocabulary()
            self._context = EmbeddingContext(self._model, batch_tokens=batch_tokens, threads=threads, pooling=pooling)
        except BaseException:
            self._model.close()
            raise
        self._lock = threading.Lock()
        self._normalize, self._lowercase = normalize, lowercase
        self._closed = False
        self.dimensions = self._context.dimensions
        self.pooling = self._context.pooling
        self.max_tokens = self._context.longest_tokens
        self.threads = self._context.threads
        self.load_ms = (time.perf_counter() - began) * 1000

    def embed(self, texts: Sequence[str], batch_size: int = 32) -> npt.NDArray[np.float32]:
        """One vector a text.

        Args:
            texts: any number of them.
            batch_size: the most that are computed at once; less where they have too many tokens.

        Returns:
            float32 of (texts, dimensions), in the order of the texts.

        Raises:
            UsageError: one string instead of several, text that is no valid Unicode, or a batch size below one.
            SessionClosedError: the session was closed.
            SessionError: llama.cpp failed.
        """
        if batch_size < 1:
            raise UsageError(f"batch_size={batch_size} makes no sense", "Choose at least 1")
        if not isinstance(texts, str) and not len(texts):
            return np.empty((0, self.dimensions), np.float32)
        check_texts(texts)
        result = np.empty((len(texts), self.dimensions), np.float32)
        with self._lock:
            if self._closed:
                raise SessionClosedError("the session was closed", "Load it again")
            tokens = [self._tokens(text) for text in texts]
            for chosen in self._batches([len(ids) for ids in tokens], batch_size):
                result[chosen] = self._context.embed([tokens[index] for index in chosen])
        return normalized(result) if self._normalize else result

    def _tokens(self, text: str) -> list[int]:
        given = text.lower() if self._lowercase else text
        return self._cut(self._model.tokenize(given, add_special=True, parse_special=False))

    def _cut(self, ids: list[int]) -> list[int]:
        """At most `max_tokens`, the end token kept; a text without any token gets the end token."""
        if not ids:
            return [self._model.eos if self._model.eos is not None else 0]
        if len(ids) <= self.max_tokens:
            return ids
        last = ids[-1:] if self._model.is_control(ids[-1]) else []
        return ids[: self.max_tokens - len(last)] + last

    def _batches(self, lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
        """Indices of texts that are computed together, long ones with long ones."""
        limit = min(batch_size, self._context.most_texts)
        part: list[int] = []
        total = 0
        for index in sorted(range(len(lengths)), key=lambda index: lengths[index], reverse=True):
            if part and (len(part) == limit or total + lengths[index] > self._context.batch_tokens):
                yield part
                part, total = [], 0
            part.append(index)
            total += lengths[index]
        if part:
            yield part

    def close(self) -> None:
        """Free the model when the texts that are being computed are done. Calling it again does nothing."""
        if self._closed:
            return
        with self._lock:
            self._closed = True
            self._context.close()
            self._model.close()

    def __enter__(self) -> GgufEmbeddingSession:
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
        return f"<GgufEmbeddingSession {self._model.path.name}{' (closed)' if self._closed else ''}>"
