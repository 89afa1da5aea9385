"""How far quantized models are from their reference: KL divergence at every position of a text, streamed.

For each position, with p the reference's and q the candidate's distribution of the next token, KL(p || q) =
sum_i p_i (log p_i - log q_i) in nats. Differences of log-probabilities are float32, every sum over the vocabulary is
float64. Models run side by side, a few rows of logits at a time, so that memory never depends on the text's length.
"""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgeq.errors import ConversionError, UsageError
from edgeq.llama import Context, Model, default_threads
from edgeq.llama_library import check_threads
from edgeq.llama_workers import run_workers

__all__ = ["Chunk", "Divergence", "Judge", "compare"]

Chunk = npt.NDArray[np.int32]
Logits = npt.NDArray[np.float32]
Progress = Callable[[int, int, str], None]

_ROWS_AT_ONCE = 64
_MOST_WORKERS = 4  # each takes memory for contexts and logits of its own
# Tokens of the text whose bytes are compared to tell two vocabularies of one size apart.
_VOCABULARY_SAMPLE = 512


@dataclass(frozen=True)
class Divergence:
    """One candidate against the reference, position by position.

    Attributes:
        kld: KL(reference || candidate) in nats, float64 of (n,).
        same_top: whether both have the same most likely token, bool of (n,).
        chunk: which chunk a position belongs to, int32 of (n,), ascending.
        nll_reference: -log p of the token that really comes next, in nats, float64 of (n_nll,); the last position of
            a chunk has none.
        nll_candidate: likewise of the candidate.
    """

    kld: npt.NDArray[np.float64]
    same_top: npt.NDArray[np.bool_]
    chunk: npt.NDArray[np.int32]
    nll_reference: npt.NDArray[np.float64]
    nll_candidate: npt.NDArray[np.float64]

    @property
    def nll_chunk(self) -> npt.NDArray[np.int32]:
        """The chunk of each of the ``nll`` values, int32 of (n_nll,)."""
        return np.asarray(self.chunk[:-1][self.chunk[1:] == self.chunk[:-1]])

    @property
    def mean_kld(self) -> float:
        """Mean over all positions, in nats."""
        return float(self.kld.mean())


class Judge:
    """A reference model, held ready to be compared with one batch of candidates after another on one text.

    A context manager; not thread-safe.

    Attributes:
        n_positions: tokens of the text, so rows that are compared for each candidate.
    """

    def __init__(
        self,
        reference: Path,
        chunks: Sequence[Chunk],
        *,
        threads: int | None = None,
        rows_at_once: int = _ROWS_AT_ONCE,
    ) -> None:
        """Load the reference.

        Args:
            reference: a GGUF, usually in F16.
            chunks: token ids, int32 of (n,), each run as a text of its own from position 0.
            threads: None for the machine's physical cores. Up to four work on chunks of their own.
            rows_at_once: positions computed together; each model holds so many rows of logits for each of the up to
                four chunks in work, and no more.

        Raises:
            UsageError: no text.
            SessionError: the model does not load, or holds no vocabulary.
        """
        if not chunks or not all(len(chunk) for chunk in chunks):
            raise UsageError("there is no text to compare models on", "Give a longer text")
        threads = check_threads(threads or default_threads())
        self._chunks = list(chunks)
        self._n_workers = min(threads, len(chunks), _MOST_WORKERS)
        self._threads = threads // self._n_workers
        self._rows = max(1, min(rows_at_once, max(map(len, chunks))))
        self.n_positions = sum(map(len, chunks))
        self._kept = contextlib.ExitStack()
        try:
            self._model = self._kept.enter_context(Model.load(reference, use_mmap=True))
            self._model.check_vocabulary()
            self._reference = self._contexts(self._model, self._kept)
        except BaseException:
            self._kept.close()
            raise

    def compare(
        self, candidates: Sequence[Path], *, kv_type: str = "f16", progress: Progress | None = None
    ) -> list[Divergence]:
        """Compare candidates with the reference, all of them loaded at once.

        Args:
            candidates: GGUF files with the reference's vocabulary.
            kv_type: of the candidates' KV caches; the reference's is F16.
            progress: told positions done, positions in all, and what is going on.

        Raises:
            ConversionError: another vocabulary, or logits that are NaN or infinite.
            SessionError: a candidate does not load, or holds no vocabulary.
        """
        with contextlib.ExitStack() as opened:
            contexts = []
            for path in candidates:
                model = opened.enter_context(Model.load(path, use_mmap=True))
                self._check_vocabulary(model)
                contexts.append(self._contexts(model, opened, kv_type=kv_type))
            return self._run(contexts, self._chunks, progress)

    def noise_floor(self, *, n_chunks: int | None = None, progress: Progress | None = None) -> Divergence:
        """The reference against itself, computed in micro-batches of another size: what rounding alone amounts to.

        Zero where llama.cpp happens to use the same kernels for both sizes.

        Args:
            n_chunks: how many of the text's chunks to read; None for all.
            progress: as in `compare`.
        """
        with contextlib.ExitStack() as opened:
            contexts = self._contexts(self._model, opened, ubatch_tokens=self._rows // 4 + 1)
            return self._run([contexts], self._chunks[:n_chunks], progress)[0]

    def close(self) -> None:
        """Free the reference."""
        self._kept.close()

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *_raised: object) -> None:
        self.close()

    def _contexts(
        self,
        model: Model,
        opened: contextlib.ExitStack,
        *,
        ubatch_tokens: int | None = None,
        kv_type: str = "f16",
    ) -> list[Context]:
        """A context for each worker."""
        return [
            opened.enter_context(
                Context(
                    model,
                    context_tokens=max(map(len, self._chunks)),
                    batch_tokens=self._rows,
                    ubatch_tokens=ubatch_tokens or self._rows,
                    threads=self._threads,
                    type_k=kv_type,
                    type_v=kv_type,
                    max_outputs=self._rows,
                )
            )
            for _ in range(self._n_workers)
        ]

    def _check_vocabulary(self, model: Model) -> None:
        mine, name = self._model, model.path.name
        if model.n_vocab != mine.n_vocab:
            raise ConversionError(
                f"{name} has {model.n_vocab} tokens and {mine.path.name} has {mine.n_vocab}",
                "Compare only quantizations of one model",
            )
        used = np.unique(np.concatenate(self._chunks))
        step = max(1, len(used) // _VOCABULARY_SAMPLE)
        for token in used[::step].tolist():
            if model.token_bytes(token, special=True) != mine.token_bytes(token, special=True):
                raise ConversionError(
                    f"token {token} is not the same in {name} and in {mine.path.name}",
                    "Compare only quantizations of one model",
                )

    def _run(
        self, candidates: Sequence[Sequence[Context]], chunks: Sequence[Chunk], progress: Progress | None
    ) -> list[Divergence]:
        """Compare candidates, each given by its workers' contexts, on some of the chunks."""
        results = [_Results(chunks) for _ in candidates]
        workers = [
            _Worker([reference, *(contexts[i] for contexts in candidates)], results, self._rows)
            for i, reference in enumerate(self._reference)
        ]
        firsts = np.cumsum([0, *map(len, chunks[:-1])]).tolist()
        todo = deque(zip(chunks, firsts, strict=True))
        total = sum(map(len, chunks))

        def report() -> None:
            if progress is not None:
                progress(sum(worker.done for worker in workers), total, "Comparing with the reference")

        def stop() -> None:
            for worker in workers:
                worker.interrupt()

        try:
            run_workers([partial(worker.run, todo) for worker in workers], stop=stop, poll=report)
        finally:
            for context in self._reference:
                context.resume()
        return [result.finish() for result in results]


def compare(
    reference: Path,
    candidates: Sequence[Path],
    chunks: Sequence[Chunk],
    *,
    threads: int | None = None,
    progress: Progress | None = None,
    rows_at_once: int = _ROWS_AT_ONCE,
) -> list[Divergence]:
    """Candidates against a reference on one text: a `Judge` for a single use, with its arguments and errors."""
    with Judge(reference, chunks, threads=threads, rows_at_once=rows_at_once) as judge:
        return judge.compare(candidates, progress=progress)


class _Rows:
    """One position of two models: arithmetic on rows of the vocabulary's width, small enough for a core's cache."""

    def __init__(self, n_vocab: int) -> None:
        self._rows = [np.empty(n_vocab, np.float32) for _ in range(4)]

    @np.errstate(invalid="ignore")  # what is not finite is reported below
    def compare(self, p_logits: Logits, q_logits: Logits, following: int | None) -> tuple[float, float, float] | None:
        """KL(p || q) and the negative log-likelihoods of the token that follows under both, NaN if none does.

        None if a logit is NaN or infinite.
        """
        log_p, log_q, weights, work = self._rows
        # Log-probabilities but for a constant each, which is added where it is needed, in float64.
        np.subtract(p_logits, p_logits.max(), out=log_p)
        np.subtract(q_logits, q_logits.max(), out=log_q)
        p_total = float(np.exp(log_p, out=weights).sum(dtype=np.float64))
        q_total = float(np.exp(log_q, out=work).sum(dtype=np.float64))
        np.subtract(log_p, log_q, out=work)
        np.multiply(work, weights, out=work)
        excess = float(work.sum(dtype=np.float64)) / p_total
        # NaN and infinities of any logit end up in one of the three sums.
        if not (math.isfinite(excess) and math.isfinite(p_total) and math.isfinite(q_total)):
            return None
        p_norm, q_norm = math.log(p_total), math.log(q_total)
        kld = excess - p_norm + q_norm
        if following is None:
            return kld, math.nan, math.nan
        return kld, p_norm - float(log_p[following]), q_norm - float(log_q[following])


class _Results:
    """The arrays of a `Divergence` while they fill, in any order."""

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        n_positions = sum(map(len, chunks))
        self.chunk = np.repeat(np.arange(len(chunks), dtype=np.int32), [len(chunk) for chunk in chunks])
        self.figures = np.empty((n_positions, 3))  # as _Rows.compare gives them
        self.same_top = np.empty(n_positions, np.bool_)

    def finish(self) -> Divergence:
        """What was found; every position was filled."""
        followed = ~np.append(np.diff(self.chunk) != 0, True)
        return Divergence(
            kld=self.figures[:, 0].copy(),
            same_top=self.same_top,
            chunk=self.chunk,
            nll_reference=self.figures[followed, 1],
            nll_candidate=self.figures[followed, 2],
        )


class _Worker:
    """One thread's contexts, the reference's first, and the results of all candidates.

    Attributes:
        done: positions that were compared.
    """

    def __init__(self, contexts: Sequence[Context], results: Sequence[_Results], rows: int) -> None:
        self.done = 0
        self._contexts = contexts
        self._results = results
        self._rows = rows
        self._arithmetic = _Rows(contexts[0].model.n_vocab)

    def run(self, todo: deque[tuple[Chunk, int]]) -> None:
        """Compare on one chunk after another until none is left; each comes with its place in the results."""
        while True:
            try:
                chunk, first = todo.popleft()
            except IndexError:  # nothing is left
                return
            if not self._compare(chunk, first):
                return

    def interrupt(self) -> None:
        """Make `run` return early."""
        for context in self._contexts:
            context.interrupt()

    def _compare(self, chunk: Chunk, first: int) -> bool:
        """Whether it went through, which it does unless interrupted."""
        for context in self._contexts:
            context.clear()
        for start in range(0, len(chunk), self._rows):
            tokens = chunk[start : start + self._rows]
            if not all(context.decode(tokens, start, logits="all") for context in self._contexts):
                return False
            expected, *found = (context.all_logits(copy=False) for context in self._contexts)
            following = [*chunk[start + 1 : start + 1 + len(tokens)].tolist(), None][: len(tokens)]
            for row, token in enumerate(following):
                for context, result, logits in zip(self._contexts[1:], self._results, found, strict=True):
                    figures = self._arithmetic.compare(expected[row], logits[row], token)
                    if figures is None:
                        raise _not_finite(context)
                    result.figures[first + start + row] = figures
                    result.same_top[first + start + row] = expected[row].argmax() == logits[row].argmax()
            self.done += len(tokens)
        return True


def _not_finite(candidate: Context) -> ConversionError:
    return ConversionError(
        f"{candidate.model.path.name} or its reference gives logits that are NaN or infinite",
        "Check the source model; try --quant f16",
    )
