"""Collect an importance matrix in process: llama.cpp runs a text, and every product with a weight is looked at.

ggml's scheduler asks a callback about every node of the graph and hands it those that it wants once they are computed.
What is summed is what ``llama-imatrix`` sums; unlike it, a tied output matrix is observed too, under the name of the
embedding, where llama.cpp's quantizer looks for it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgeq.converters.gguf.ggml_tensor import TensorHead, Tensors
from edgeq.converters.gguf.grams import Grams
from edgeq.converters.gguf.header import GgufHeader, GgufTensor, read_header
from edgeq.converters.gguf.imatrix import Activations, ImportanceMatrix
from edgeq.errors import ConversionError, UsageError
from edgeq.ggml_types import ggml_type
from edgeq.llama import Context, Model, default_threads
from edgeq.llama_library import check_threads
from edgeq.llama_workers import run_workers

__all__ = ["Collector", "Observed", "collect_imatrix", "observe_inputs"]

Progress = Callable[[int, int, str], None]
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

# The output matrix sees those positions only whose logits are asked for, and each takes a row of the vocabulary.
_BATCH_TOKENS = 128
_MOST_WORKERS = 2  # each takes memory for sums of its own
_DENSE, _ROUTED = b"MUL_MAT", b"MUL_MAT_ID"
_REMEDY = "Install the llama.cpp that edgeq was tested with: pip install 'llama-cpp-python==0.3.36'"


@dataclasses.dataclass(frozen=True)
class Observed:
    """What a model's matrices were multiplied with.

    Attributes:
        matrix: mean squares.
        correlations: by matrix, as `edgeq.converters.gguf.grams.Grams.correlations` gives them; empty if not asked for.
    """

    matrix: ImportanceMatrix
    correlations: Mapping[str, npt.NDArray[np.float16]]


def collect_imatrix(
    reference: Path,
    chunks: Sequence[npt.NDArray[np.int32]],
    *,
    threads: int | None = None,
    progress: Progress | None = None,
    datasets: tuple[str, ...] = (),
) -> ImportanceMatrix:
    """The importance matrix alone of `observe_inputs`, with its arguments and errors."""
    return observe_inputs(reference, chunks, threads=threads, progress=progress, datasets=datasets).matrix


def observe_inputs(
    reference: Path,
    chunks: Sequence[npt.NDArray[np.int32]],
    *,
    threads: int | None = None,
    progress: Progress | None = None,
    datasets: tuple[str, ...] = (),
    correlations: bool = False,
) -> Observed:
    """Run pieces of text through a model and look at what each of its matrices is multiplied with.

    The result is the same every time with the same number of threads; with another, sums are rounded otherwise.

    Args:
        reference: the unquantized GGUF.
        chunks: token ids, each int32 of (n_tokens,), a text of its own; every position counts the same.
        threads: None for the machine's physical cores; some work on chunks of their own.
        progress: told chunks done, chunks in all, and what is going on.
        datasets: names of the text, for the record.
        correlations: whether to measure these too; each of two workers takes memory for them.

    Raises:
        UsageError: no text, or a token that the model does not have.
        ConversionError: this llama.cpp's tensors cannot be read from Python, or activations are not finite.
        SessionError: the model cannot be loaded.
    """
    lengths = [len(chunk) for chunk in chunks]
    if not lengths or not min(lengths):
        raise UsageError("The calibration text has no tokens, or an empty piece", "Give a longer text")
    threads = check_threads(threads or default_threads())
    n_workers = min(threads, len(chunks), _MOST_WORKERS)
    tensors, header = Tensors(TensorHead), read_header(reference)
    with contextlib.ExitStack() as opened:
        model = opened.enter_context(Model.load(reference, use_mmap=True, use_extra_bufts=False))
        collectors = [Collector(tensors, header, Grams() if correlations else None) for _ in range(n_workers)]
        contexts = [
            opened.enter_context(
                Context(
                    model,
                    context_tokens=max(lengths),
                    batch_tokens=_BATCH_TOKENS,
                    ubatch_tokens=_BATCH_TOKENS,
                    threads=threads // n_workers,
                    max_outputs=_BATCH_TOKENS,
                    eval_callback=collector,
                )
            )
            for collector in collectors
        ]
        workers = [_Worker(*one, chunks[i::n_workers]) for i, one in enumerate(zip(contexts, collectors, strict=True))]
        _run(workers, len(chunks), progress)
    for other in collectors[1:]:
        collectors[0].take_in(other)
    matrix = ImportanceMatrix(collectors[0].entries(), len(chunks), max(lengths), datasets)
    grams = collectors[0].grams
    return Observed(matrix, {} if grams is None else grams.correlations())


def _run(workers: Sequence[_Worker], n_chunks: int, progress: Progress | None) -> None:
    reported = 0

    def poll() -> None:
        nonlocal reported
        done = sum(worker.done for worker in workers)
        if progress is not None and done > reported:
            reported = done
            progress(done, n_chunks, "importance matrix")

    def stop() -> None:
        for worker in workers:
            worker.context.interrupt()

    run_workers([worker.run for worker in workers], stop=stop, poll=poll)


@dataclasses.dataclass
class _Worker:
    """One thread's share of the text.

    Attributes:
        done: chunks that were run.
    """

    context: Context
    collector: Collector
    chunks: Sequence[npt.NDArray[np.int32]]
    done: int = 0

    def run(self) -> None:
        """Run all chunks, unless interrupted."""
        for chunk in self.chunks:
            self.context.clear()
            for start in range(0, len(chunk), _BATCH_TOKENS):
                self.collector.begin_pass()
                went_through = self.context.decode(chunk[start : start + _BATCH_TOKENS], start, logits="all")
                if self.collector.failure is not None:
                    raise self.collector.failure
                if not went_through:
                    return
            self.done += 1


class Collector:
    """The callback, and the sums so far.

    Args:
        tensors: reads ggml's tensors.
        header: of the model that runs; matrices that it does not name (the cache) are not weights.
        grams: takes in the inputs of every matrix that is not one of several in a tensor; None for none.

    Attributes:
        grams: as given.
        failure: what went wrong in a call; C cannot pass it on, so whoever started the decode has to raise it.
    """

    def __init__(self, tensors: Tensors, header: GgufHeader, grams: Grams | None = None) -> None:
        self.grams = grams
        self._tensors, self._header = tensors, header
        self._sums: dict[str, Doubles] = {}
        self._counts: dict[str, Counts] = {}
        self.failure: BaseException | None = None

    def begin_pass(self) -> None:
        """Say that another batch of tokens goes through the model."""
        if self.grams is not None:
            self.grams.begin_pass()

    def __call__(self, node: int, ask: bool, _user_data: int | None = None) -> bool:
        """Say whether a node is of interest (``ask``), or take it in once it is computed; False ends the graph."""
        if self.failure is not None:
            return False
        try:
            if ask:
                return self._weight_of(node) is not None
            self._add(node)
        except BaseException as error:  # noqa: BLE001 - raised by whoever started the decode
            self.failure = error
            return False
        return True

    def take_in(self, other: Collector) -> None:
        """Add what another saw of the same model, which it loses."""
        for name, sums in other._sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + sums
            self._counts[name] = self._counts.get(name, 0) + other._counts[name]
        if self.grams is not None and other.grams is not None:
            self.grams.take_in(other.grams)

    def entries(self) -> dict[str, Activations]:
        """What was summed, by the weight's name."""
        return {
            name: Activations(self._sums[name].astype(np.float32), self._counts[name].copy()) for name in self._sums
        }

    def _weight_of(self, node: int) -> tuple[int, GgufTensor] | None:
        """Address and entry of the weight in a product of matrices; None for any other node."""
        tensors = self._tensors
        if tensors.operation(node) not in (_DENSE, _ROUTED):
            return None
        weight = tensors.sources(node)[0]
        entry = None if weight is None else self._header.tensors.get(tensors.name(weight))
        return None if weight is None or entry is None else (weight, entry)

    def _add(self, node: int) -> None:
        tensors = self._tensors
        found = self._weight_of(node)
        _, activations, routes = tensors.sources(node)
        if found is None or activations is None:
            raise ConversionError("llama.cpp computed a node that nobody asked for", _REMEDY)
        weight, entry = found
        if entry.name not in self._sums:
            self._check_weight(weight, entry)
        shape = tensors.shape(weight)
        n_matrices = shape[2] * shape[3]
        if tensors.operation(node) == _ROUTED:
            if routes is None:
                raise ConversionError(f"llama.cpp routes nothing to {entry.name}", _REMEDY)
            sums, counts = routed_squares(tensors.floats(activations)[0], tensors.integers(routes)[0, 0], n_matrices)
        else:
            inputs = tensors.floats(activations)
            sums, counts = dense_squares(inputs, n_matrices, entry.name)
            if self.grams is not None and n_matrices == 1:
                self.grams.add(entry.name, activations, inputs.reshape(-1, inputs.shape[-1]))
        if not np.isfinite(sums).all():
            raise ConversionError(
                f"The activations of {entry.name} are NaN or infinite",
                "Check the source model; a reference in f32 or bf16 may hold what f16 cannot",
            )
        if entry.name in self._sums:
            self._sums[entry.name] += sums
            self._counts[entry.name] += counts
        else:
            self._sums[entry.name], self._counts[entry.name] = sums, counts

    def _check_weight(self, weight: int, entry: GgufTensor) -> None:
        """The first row of a weight in memory must be that of the file, or nothing read so far can be trusted."""
        tensors = self._tensors
        shape = tensors.shape(weight)
        padded = (*entry.shape, 1, 1, 1)[: len(shape)]
        same = shape == padded and tensors.type_id(weight) == entry.type_id
        if same:
            row = ggml_type(entry.type).row_bytes(entry.shape[0])
            expected = np.fromfile(self._header.path, np.uint8, count=row, offset=entry.offset)
            same = np.array_equal(tensors.raw(weight, row), expected)
        if not same:
            raise ConversionError(f"{entry.name} in memory is not what {self._header.path.name} holds", _REMEDY)


def dense_squares(activations: Floats, n_matrices: int, name: str) -> tuple[Doubles, Counts]:
    """Sums of squares for ``MUL_MAT``.

    Args:
        activations: float32 of (n3, n2, n_tokens, n_columns).
        n_matrices: in the weight; 1 takes all activations, otherwise each matrix has its own.
        name: of the weight, for messages.

    Returns:
        Sums, float64 of (n_matrices, n_columns), and counts, int64 of (n_matrices,).
    """
    n3, n2, _, n_columns = activations.shape
    if n_matrices not in (1, n2 * n3):
        raise ConversionError(
            f"{name} has {n_matrices} matrices for {n2 * n3} sets of activations", "Quantize this model without imatrix"
        )
    rows = activations.reshape(n_matrices, -1, n_columns)
    sums = np.stack([np.einsum("ij,ij->j", matrix, matrix) for matrix in rows]).astype(np.float64)
    return sums, np.full(n_matrices, rows.shape[1], np.int64)


def routed_squares(activations: Floats, routes: npt.NDArray[np.int32], n_experts: int) -> tuple[Doubles, Counts]:
    """Sums of squares for ``MUL_MAT_ID``, in which each token goes to some of the experts.

    Args:
        activations: float32 of (n_tokens, n_inputs, n_columns): one for all experts of a token, or one for each.
        routes: int32 of (n_tokens, n_used), the experts of each token.
        n_experts: matrices in the weight.

    Returns:
        Sums, float64 of (n_experts, n_columns), and counts, int64 of (n_experts,).
    """
    _, n_inputs, n_columns = activations.shape
    n_used = routes.shape[1]
    if routes.min() < 0 or routes.max() >= n_experts or n_used % n_inputs:
        raise ConversionError(f"llama.cpp routes to experts beyond the {n_experts} that there are", _REMEDY)
    sums = np.zeros((n_experts, n_columns))
    counts = np.bincount(routes.ravel(), minlength=n_experts).astype(np.int64)
    order = np.argsort(routes, axis=None, kind="stable")
    token, slot = np.divmod(order, n_used)
    squares = np.square(activations[token, slot % n_inputs])
    used = np.flatnonzero(counts)
    starts = np.cumsum(counts) - counts
    sums[used] = np.add.reduceat(squares, starts[used], axis=0, dtype=np.float64)
    return sums, counts
