"""Collect an importance matrix in process: llama.cpp runs a text, and every product with a weight is looked at.

ggml's scheduler asks a callback about every node of the graph and hands it those that it wants once they are computed.
What is summed is what ``llama-imatrix`` sums; unlike it, a tied output matrix is observed too, under the name of the
embedding, where llama.cpp's quantizer looks for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgeq.converters.gguf.ggml_tensor import TensorHead, Tensors
from edgeq.converters.gguf.header import GgufHeader, GgufTensor, read_header
from edgeq.converters.gguf.imatrix import Activations, ImportanceMatrix
from edgeq.errors import ConversionError, UsageError
from edgeq.ggml_types import ggml_type
from edgeq.llama import Context, Model
from edgeq.llama_library import interruptible

__all__ = ["Collector", "collect_imatrix"]

Progress = Callable[[int, int, str], None]
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

# The output matrix sees those positions only whose logits are asked for, and each takes a row of the vocabulary.
_BATCH_TOKENS = 128
_DENSE, _ROUTED = b"MUL_MAT", b"MUL_MAT_ID"
_REMEDY = "Install the llama.cpp that edgeq was tested with: pip install 'llama-cpp-python==0.3.36'"


def collect_imatrix(
    reference: Path,
    chunks: Sequence[npt.NDArray[np.int32]],
    *,
    threads: int | None = None,
    progress: Progress | None = None,
    datasets: tuple[str, ...] = (),
) -> ImportanceMatrix:
    """Run pieces of text through a model and sum the squares of what each of its matrices is multiplied with.

    Args:
        reference: the unquantized GGUF.
        chunks: token ids, each int32 of (n_tokens,), a text of its own; every position counts the same.
        threads: None for the machine's physical cores.
        progress: told chunks done, chunks in all, and what is going on.
        datasets: names of the text, for the record.

    Raises:
        UsageError: no text, or a token that the model does not have.
        ConversionError: this llama.cpp's tensors cannot be read from Python, or activations are not finite.
        SessionError: the model cannot be loaded.
    """
    lengths = [len(chunk) for chunk in chunks]
    if not lengths or not min(lengths):
        raise UsageError("The calibration text has no tokens, or an empty piece", "Give a longer text")
    tensors = Tensors(TensorHead)
    collector = Collector(tensors, read_header(reference))
    with (
        Model.load(reference, use_mmap=True, use_extra_bufts=False) as model,
        Context(
            model,
            context_tokens=max(lengths),
            batch_tokens=_BATCH_TOKENS,
            ubatch_tokens=_BATCH_TOKENS,
            threads=threads,
            max_outputs=_BATCH_TOKENS,
            eval_callback=collector,
        ) as context,
    ):
        for index, chunk in enumerate(chunks):
            _run(context, collector, chunk)
            if progress is not None:
                progress(index + 1, len(chunks), "importance matrix")
    return ImportanceMatrix(collector.entries(), len(chunks), max(lengths), datasets)


def _run(context: Context, collector: Collector, chunk: npt.NDArray[np.int32]) -> None:
    context.clear()
    for start in range(0, len(chunk), _BATCH_TOKENS):
        batch = chunk[start : start + _BATCH_TOKENS]
        # On a thread of its own, so that a signal reaches Python and not the callback, which could not pass it on.
        interruptible(
            functools.partial(context.decode, batch, start, logits="all"),
            stop=context.interrupt,
            undo=lambda _done: None,
        )
        if collector.failure is not None:
            raise collector.failure


class Collector:
    """The callback, and the sums so far.

    Args:
        tensors: reads ggml's tensors.
        header: of the model that runs; matrices that it does not name (the cache) are not weights.

    Attributes:
        failure: what went wrong in a call; C cannot pass it on, so whoever started the decode has to raise it.
    """

    def __init__(self, tensors: Tensors, header: GgufHeader) -> None:
        self._tensors, self._header = tensors, header
        self._sums: dict[str, Doubles] = {}
        self._counts: dict[str, Counts] = {}
        self.failure: BaseException | None = None

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
            sums, counts = dense_squares(tensors.floats(activations), n_matrices, entry.name)
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
