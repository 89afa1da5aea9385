"""Text that a model writes itself, so that calibration needs no download and shows the model what it will see.

Half of the tokens continue nothing but BOS; the other half continue the header of a user's turn: the model writes the
question, then the header of the assistant's turn is put in, then it writes the answer. Every other token is drawn from
the model's whole distribution at temperature 1, without top-k or top-p. That a model's own samples serve to quantize it
is the finding of Z. Liu et al., "LLM-QAT: Data-Free Quantization Aware Training for Large Language Models", 2023.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgeq.converters.calibration.texts import Chunk, TokenText
from edgeq.errors import ConversionError, UsageError
from edgeq.llama import Model, default_threads, library
from edgeq.llama_batch import ParallelContext
from edgeq.llama_library import check_threads
from edgeq.llama_workers import run_workers

__all__ = ["self_text"]

Progress = Callable[[int, int, str], None]

# Fixed, so that the text does not depend on the number of threads that share the work.
_GROUPS = 2
_MOST_SEQUENCES = 32  # of a group
_SHORTEST = 8  # tokens of a document; what ends sooner is written anew
_PATIENCE = 8  # steps per wanted token, before a model that ends every text at once is given up
_SENTINEL = "edgeq"


def self_text(
    model_gguf: Path,
    *,
    n_tokens: int,
    chunk_tokens: int,
    seed: int = 0,
    threads: int | None = None,
    progress: Progress | None = None,
) -> TokenText:
    """Let a model write its own calibration text.

    The same file, seed and llama.cpp give the same tokens on the same machine, with any number of threads; chunks of
    512 tokens or more excepted, where ggml splits the attention of a lone sequence among its threads.

    Args:
        model_gguf: best the unquantized model.
        n_tokens: in all; the text has as many or, if its last documents are too short to keep, a few less.
        chunk_tokens: the most tokens of one document, which is one chunk.
        seed: of the sampling.
        threads: this many compute at most; None for the machine's physical cores.
        progress: told tokens written, tokens wanted, and what is going on.

    Raises:
        UsageError: sizes that make no sense.
        ConversionError: logits that are NaN or infinite, or a model that writes nothing.
        SessionError: the model does not load or run.
    """
    if chunk_tokens <= _SHORTEST or n_tokens < chunk_tokens:
        raise UsageError(
            f"{n_tokens} tokens in chunks of {chunk_tokens} are too few", f"Use chunks of more than {_SHORTEST} tokens"
        )
    threads = check_threads(threads or default_threads())
    with ExitStack() as opened:
        model = opened.enter_context(Model.load(model_gguf, use_mmap=True))
        openings, warnings = _openings(model)
        per_group = -(-n_tokens // _GROUPS)
        sequences = max(1, min(_MOST_SEQUENCES, per_group // chunk_tokens))
        writers = []
        for group in range(_GROUPS):
            context = opened.enter_context(
                ParallelContext(
                    model,
                    n_sequences=sequences,
                    sequence_tokens=chunk_tokens,
                    # The first groups take what does not divide; a single thread writes group after group.
                    threads=max(1, (threads + _GROUPS - 1 - group) // _GROUPS),
                )
            )
            writers.append(_Writer(context, openings, per_group, np.random.default_rng((seed, group))))

        def report() -> None:
            if progress is not None:
                progress(min(n_tokens, sum(writer.n_tokens for writer in writers)), n_tokens, "Writing a text")

        def stop() -> None:
            for writer in writers:
                writer.context.interrupt()

        n_workers = min(threads, _GROUPS)
        jobs = [functools.partial(_run_all, writers[worker::n_workers]) for worker in range(n_workers)]
        run_workers(jobs, stop=stop, poll=report)
        documents = [document for writer in writers for document in writer.documents()]
    return _as_text(documents, n_tokens, model_gguf.name, seed, warnings)


def _run_all(writers: Sequence[_Writer]) -> None:
    """Let one write after the other; an interrupted context stays so, which ends those that have not begun."""
    for writer in writers:
        writer.run()


def _as_text(
    documents: Sequence[Sequence[int]], n_tokens: int, name: str, seed: int, warnings: tuple[str, ...]
) -> TokenText:
    chunks: list[Chunk] = []
    digest = hashlib.sha256()
    room = n_tokens
    for document in documents:
        chunk = np.array(document[:room], np.int32)
        room -= len(chunk)
        if len(chunk) >= _SHORTEST:
            chunks.append(chunk)
            digest.update(chunk.astype("<i4").tobytes())
    return TokenText(
        chunks=tuple(chunks),
        text_sha256=digest.hexdigest(),
        source="self",
        name=f"written by {name}",
        seed=seed,
        n_tokens=sum(map(len, chunks)),
        warnings=warnings,
    )


@dataclass(frozen=True)
class _Opening:
    """How documents of one kind begin, and what is put in where the first turn ends (empty: the document ends)."""

    start: tuple[int, ...]
    turn: tuple[int, ...] = ()


def _openings(model: Model) -> tuple[tuple[_Opening, ...], tuple[str, ...]]:
    """The kinds of documents that the model can write, and what is to be said about them."""
    model.check_vocabulary()
    first = model.bos if model.bos is not None else model.eos
    if first is None:
        raise ConversionError(
            f"{model.path.name} has no token that begins a text, so it cannot write one", "Give a calibration text"
        )
    plain = _Opening((first,))
    if model.chat_template is None:
        return (plain,), ()
    turns = _turn_headers(model.chat_template)
    if turns is None:
        return (plain,), ("llama.cpp does not know the model's chat template: the text has no turns of a chat",)
    start = model.tokenize(turns[0], add_special=True, parse_special=True)
    if start[:2] == [first, first]:  # written by the template and added by the tokenizer
        start = start[1:]
    turn = model.tokenize(turns[1], add_special=False, parse_special=True, at_start=False)
    return (plain, _Opening(tuple(start or [first]), tuple(turn))), ()


def _turn_headers(template: str) -> tuple[str, str] | None:
    """What a chat template puts before a user's message, and between it and the answer; None if it is unknown."""
    lib = library()
    messages = (lib.llama_chat_message * 1)()
    messages[0].role, messages[0].content = b"user", _SENTINEL.encode()
    buffer = ctypes.create_string_buffer(16384)
    length = lib.llama_chat_apply_template(template.encode(), messages, 1, True, buffer, len(buffer))
    if not 0 < length <= len(buffer):
        return None
    before, found, after = buffer.raw[:length].decode("utf-8", errors="replace").partition(_SENTINEL)
    return (before, after) if found and after else None


@dataclass
class _Document:
    """A text while it is written: its tokens, and those that come next whatever the model says."""

    kind: int
    turn: tuple[int, ...]
    tokens: list[int] = field(default_factory=list)
    forced: list[int] = field(default_factory=list)


class _Writer:
    """Sequences of one context, each writing one document after another."""

    def __init__(
        self, context: ParallelContext, openings: Sequence[_Opening], wanted: int, rng: np.random.Generator
    ) -> None:
        self.context = context
        self.n_tokens = 0
        self._model = context.model
        self._openings = openings
        self._wanted = wanted
        self._rng = rng
        self._written = [0] * len(openings)
        self._documents: list[_Document] = []
        n = context.n_sequences
        self._slots = [self._begin(slot % len(openings)) for slot in range(n)]
        self._scratch = (np.empty(self._model.n_vocab, np.float32), np.empty(self._model.n_vocab, np.float64))

    def documents(self) -> list[list[int]]:
        """What was written, in the order in which it was begun."""
        return [document.tokens for document in self._documents if len(document.tokens) >= _SHORTEST]

    def run(self) -> None:
        """Write until there is enough, or until the context is interrupted."""
        n = self.context.n_sequences
        tokens, positions = np.zeros(n, np.int32), np.zeros(n, np.int32)
        steps_left = _PATIENCE * -(-self._wanted // n) + self.context.sequence_tokens
        while self.n_tokens < self._wanted:
            for slot, document in enumerate(self._slots):
                if document.forced:
                    self._append(document, document.forced.pop(0))
                tokens[slot], positions[slot] = document.tokens[-1], len(document.tokens) - 1
            open_ended = np.array([not document.forced for document in self._slots])
            if not self.context.step(tokens, positions, open_ended):
                return
            self._continue(np.flatnonzero(open_ended), self.context.logits())
            steps_left -= 1
            if steps_left < 0:
                raise ConversionError(
                    f"{self._model.path.name} ends its texts before they begin", "Give a calibration text"
                )

    def _begin(self, kind: int) -> _Document:
        opening = self._openings[kind]
        document = _Document(kind, opening.turn, forced=list(opening.start[: self.context.sequence_tokens - 1]))
        self._documents.append(document)
        return document

    def _append(self, document: _Document, token: int) -> None:
        document.tokens.append(token)
        self._written[document.kind] += 1
        self.n_tokens += 1

    def _continue(self, slots: npt.NDArray[np.intp], logits: npt.NDArray[np.float32]) -> None:
        draws = self._rng.random(len(slots))
        for slot, row, draw in zip(slots.tolist(), logits, draws.tolist(), strict=True):
            document = self._slots[slot]
            token = self._sample(row, draw)
            ended = self._model.is_eog(token)
            # A question may take a quarter of the document; then it is the assistant's turn.
            if document.turn and (ended or len(document.tokens) >= self.context.sequence_tokens // 4):
                document.forced, document.turn = list(document.turn), ()
            else:
                self._append(document, token)
        for slot, document in enumerate(self._slots):
            self._renew(slot, document)

    def _renew(self, slot: int, document: _Document) -> None:
        """Begin another document where one is full or has come to its end."""
        full = len(document.tokens) + len(document.forced) >= self.context.sequence_tokens
        ended = not document.forced and len(document.tokens) > 1 and self._model.is_eog(document.tokens[-1])
        if not (full or ended):
            return
        if len(document.tokens) < _SHORTEST:
            self._documents.remove(document)
            self.n_tokens -= len(document.tokens)
            self._written[document.kind] -= len(document.tokens)
        self.context.forget(slot)
        self._slots[slot] = self._begin(int(np.argmin(self._written)))

    def _sample(self, logits: npt.NDArray[np.float32], draw: float) -> int:
        """Invert the cumulative distribution at ``draw``."""
        weights, cumulated = self._scratch
        np.subtract(logits, logits.max(), out=weights)
        np.exp(weights, out=weights)
        np.cumsum(weights, out=cumulated)
        if not np.isfinite(cumulated[-1]):
            raise ConversionError(
                f"{self._model.path.name} gives logits that are NaN or infinite", "Check the source model"
            )
        index = int(np.searchsorted(cumulated, draw * cumulated[-1], side="right"))
        return min(index, len(cumulated) - 1)
