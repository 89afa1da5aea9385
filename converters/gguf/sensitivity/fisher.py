"""Curvature by backward passes in torch: the Fisher information of the output distribution.

The Fisher information is E[g g^T] with g the gradient of log p(y | context) and y drawn from the model itself (Amari;
Kunstner et al. 2019 on why y must not be the text's next token). Labels of different positions are drawn independently,
so their gradients are uncorrelated, and the square of one backward pass through a whole sequence has the sum of the
per-position squares as its expectation. Only sums over rows and columns of these squares are kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeq.converters.checkpoint import TensorEntry
from edgeq.converters.gguf.grams import MAX_CORRELATED, correlation, correlation_bytes
from edgeq.converters.gguf.layout import PlannedTensor, plan_layout
from edgeq.converters.gguf.sensitivity.curvature import ACTIVATION_BLOCKS, Curvature
from edgeq.converters.gguf.weights import interleave_halves
from edgeq.errors import UnsupportedModelError, require_package

__all__ = ["fisher_curvatures", "fisher_memory_bytes"]

Progress = Callable[[int, int, str], None]
Doubles = npt.NDArray[np.float64]

_LOGITS = 5  # arrays of that size at once, probabilities and gradients among them; 4.1 were measured
_NO_MEMORY = ("DefaultCPUAllocator", "bad_alloc")  # in torch's errors, which have no class of their own


def fisher_memory_bytes(shapes: Sequence[Sequence[int]], *, chunk_tokens: int = 256) -> int:
    """What `fisher_curvatures` takes at most, about: weights, gradients, correlations and logits in float32, and more.

    Args:
        shapes: of all tensors, row length first.
        chunk_tokens: in the longest text.
    """
    n_params = sum(math.prod(shape) for shape in shapes)
    # Matrices that share an input are counted one by one.
    correlations = correlation_bytes(shape[0] for shape in shapes if len(shape) > 1)
    n_vocab = max((shape[1] for shape in shapes if len(shape) == 2), default=0)  # the embedding's rows are the most
    return 9 * n_params + correlations + _LOGITS * 4 * chunk_tokens * n_vocab + (1 << 30)


@dataclasses.dataclass
class _Sums:
    """Of one matrix, over all sequences so far, in the checkpoint's order of rows."""

    rows: Doubles
    columns: Doubles
    rounding: dict[int, float]
    group: _Group | None = None


@dataclasses.dataclass(eq=False)
class _Group:
    """Matrices that multiply the same input, as query, key and value do.

    Attributes:
        inputs: of the sequence in work, a tensor of (n_tokens, n_columns).
        weights: the squared gradients of their outputs at each token, summed.
        gram: the sum of weighted outer products of the inputs, a tensor; None before the first sequence.
        correlation: ``gram`` with ones on its diagonal, once it is asked for.
    """

    inputs: Any
    weights: Any = 0.0
    gram: Any = None
    correlation: npt.NDArray[np.float16] | None = None


def fisher_curvatures(
    folder: Path, chunks: Sequence[npt.NDArray[np.int32]], *, seed: int, threads: int, progress: Progress
) -> dict[str, Curvature]:
    """The curvature of every matrix of a Hugging Face model.

    Args:
        folder: with config.json and safetensors, of an architecture that edgeq converts.
        chunks: token ids, each a text of its own.
        seed: of the labels.
        threads: of torch.
        progress: told sequences done, sequences in all, and a detail.

    Raises:
        MissingPackageError: no torch or transformers.
        UnsupportedModelError: transformers names this model's tensors otherwise than its checkpoint does, its
            gradients overflow, or there is too little memory.
    """
    try:
        return _measured(folder, chunks, seed, threads, progress)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
    # Not chained: the traceback would keep the model and its gradients, and whoever catches this needs the memory.
    raise UnsupportedModelError("there is too little memory for gradients", "Use --estimator imatrix, which takes less")


def _is_out_of_memory(error: Exception) -> bool:
    """Python's and numpy's way of saying it, or torch's."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in _NO_MEMORY)


def _measured(
    folder: Path, chunks: Sequence[npt.NDArray[np.int32]], seed: int, threads: int, progress: Progress
) -> dict[str, Curvature]:
    torch: Any = require_package("torch", "fisher", "for the estimator fisher")
    with _threads(torch, threads):
        model = _load(torch, folder)
        planned = _matrices(folder, model)
        sums = {name: _zeros(tensor) for name, tensor in planned.items()}
        watch = _Watch(torch, model, sums)
        try:
            generator = torch.Generator().manual_seed(seed)
            for index, chunk in enumerate(chunks):
                progress(index, len(chunks), "curvature")
                _one_sequence(torch, model, chunk, generator, sums)
                watch.end_sequence()
        finally:
            watch.remove()
    _refuse_overflow(sums)
    n_tokens = sum(map(len, chunks))
    tied = model.get_input_embeddings().weight
    parameters = dict(model.named_parameters())
    return {
        tensor.name: _curvature(sums[name], n_tokens, tensor, tied=parameters[name] is tied)
        for name, tensor in planned.items()
    }


@contextlib.contextmanager
def _threads(torch: Any, threads: int) -> Iterator[None]:  # noqa: ANN401 - optional package
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _load(torch: Any, folder: Path) -> Any:  # noqa: ANN401 - optional package
    transformers: Any = require_package("transformers", "fisher", "for the estimator fisher")
    bars_shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
    except (ValueError, OSError, KeyError, ImportError) as error:
        raise UnsupportedModelError(
            f"transformers cannot load {folder}: {error}", "Use --estimator imatrix, which needs no torch"
        ) from error
    finally:
        if bars_shown:
            transformers.utils.logging.enable_progress_bar()
    # Padding is often a token that texts have too, such as the end of one; torch would give its row no gradient.
    model.get_input_embeddings().padding_idx = None
    return model.eval()


def _matrices(folder: Path, model: Any) -> dict[str, PlannedTensor]:  # noqa: ANN401 - optional package
    """The GGUF's matrices by the names of their parameters in torch."""
    parameters = dict(model.named_parameters())
    found = {}
    for tensor in plan_layout(folder, "f16").tensors:
        if len(tensor.shape) == 2 and isinstance(tensor.source, TensorEntry):
            name = tensor.source.name
            if name not in parameters or tuple(parameters[name].shape) != tensor.shape:
                raise UnsupportedModelError(
                    f"transformers has no parameter {name} of {tensor.shape} for this model",
                    "Use --estimator imatrix, which needs no torch",
                )
            found[name] = tensor
    return found


def _zeros(tensor: PlannedTensor) -> _Sums:
    return _Sums(np.zeros(tensor.shape[0]), np.zeros(tensor.shape[1]), dict.fromkeys(ACTIVATION_BLOCKS, 0.0))


class _Watch:
    """Hooks on every linear layer: what its inputs are, and how the output reacts to their rounding."""

    def __init__(self, torch: Any, model: Any, sums: dict[str, _Sums]) -> None:  # noqa: ANN401 - optional package
        self._torch = torch
        self._groups: dict[int, _Group] = {}
        self._handles: list[Any] = []
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        for module in model.modules():
            if isinstance(module, torch.nn.Linear) and (name := names.get(id(module.weight))) in sums:
                self._hook(module, sums[name])

    def _hook(self, module: Any, sums: _Sums) -> None:  # noqa: ANN401 - optional package
        def forward(_module: Any, received: Any) -> None:  # noqa: ANN401 - optional package
            inputs = received[0].detach()[0]
            # The same memory in one forward pass is the same input: all are kept alive until the pass is over.
            group = self._groups.setdefault(inputs.data_ptr(), sums.group or _Group(inputs))
            group.inputs, sums.group = inputs, group

        def backward(_module: Any, gradients: Any, outputs: Any) -> None:  # noqa: ANN401 - optional package
            group = sums.group
            if group is None or gradients[0] is None:
                return
            group.weights = group.weights + outputs[0][0].square().sum(1)
            _add_rounding(sums, group.inputs, gradients[0][0])

        # The gradient must be the layer's own: several layers share an input.
        self._handles += [module.register_forward_pre_hook(forward), module.register_full_backward_hook(backward)]

    def end_sequence(self) -> None:
        """Add the sequence's outer products, once for all matrices that share an input."""
        for group in self._groups.values():
            x = group.inputs
            if x.shape[1] <= MAX_CORRELATED and not isinstance(group.weights, float):
                if group.gram is None:
                    group.gram = self._torch.zeros(x.shape[1], x.shape[1])
                group.gram.addmm_((x * group.weights[:, None]).T, x)
            group.inputs, group.weights = None, 0.0
        self._groups.clear()

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()


def _add_rounding(sums: _Sums, x: Any, gradient: Any) -> None:  # noqa: ANN401 - optional package
    """What rounding each block to 8 bits with one scale really does to these activations, squared and weighted."""
    weight = gradient.square()
    for block in sums.rounding:
        if x.shape[1] % block == 0:
            blocks = x.reshape(len(x), -1, block)
            steps = (blocks.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-30)
            errors = (blocks / steps).round_().mul_(steps).sub_(blocks).reshape(x.shape)
            sums.rounding[block] += float(errors.square_().mul_(weight).sum())


def _one_sequence(
    torch: Any,  # noqa: ANN401 - optional package
    model: Any,  # noqa: ANN401 - optional package
    chunk: npt.NDArray[np.int32],
    generator: Any,  # noqa: ANN401 - optional package
    sums: dict[str, _Sums],
) -> None:
    logits = model(torch.from_numpy(chunk.astype(np.int64))[None], use_cache=False).logits[0]
    log_p = torch.log_softmax(logits, -1)
    if not torch.isfinite(log_p).all():
        raise UnsupportedModelError(
            "torch computes logits that are NaN or infinite", "Use --estimator imatrix, which needs no torch"
        )
    labels = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
    model.zero_grad(set_to_none=True)
    log_p.gather(1, labels).sum().backward()
    for name, parameter in model.named_parameters():
        if name in sums and parameter.grad is not None:
            squares = parameter.grad.square_()
            sums[name].rows += squares.sum(1).numpy()
            sums[name].columns += squares.sum(0).numpy()
    model.zero_grad(set_to_none=True)


def _refuse_overflow(sums: Mapping[str, _Sums]) -> None:
    """Refuse gradients without limits, as normalising an embedding of zeros gives: ggml ends the process on NaN."""
    for name, of in sums.items():
        gram = 0.0 if of.group is None or of.group.gram is None else float(of.group.gram.sum())
        if not np.isfinite([gram, of.rows.sum(), of.columns.sum(), *of.rounding.values()]).all():
            raise UnsupportedModelError(
                f"the gradients of {name} overflow", "Use --estimator imatrix, which needs no gradients"
            )


def _correlation(group: _Group | None) -> npt.NDArray[np.float16] | None:
    """One array for all matrices that share an input; None if it is too wide."""
    if group is None or group.gram is None:
        return None
    if group.correlation is None:
        group.correlation = correlation(group.gram.numpy())
    return group.correlation


def _weakened(strong: npt.NDArray[np.float16] | None, sums: _Sums, total: float) -> npt.NDArray[np.float16] | None:
    """Off-diagonal entries times the output's share of the Fisher information."""
    if strong is None or sums.group is None or not total > 0.0:
        return None
    share = min(1.0, float(sums.group.gram.trace()) / total)
    result: npt.NDArray[np.float16] = (strong * np.float16(share)).astype(np.float16)
    np.fill_diagonal(result, 1.0)
    return result


def _curvature(sums: _Sums, n_tokens: int, tensor: PlannedTensor, *, tied: bool) -> Curvature:
    """Per token, rows in the GGUF's order, with rows_i * columns_j = F_ij of the best outer product.

    A tied embedding has two parts in its Fisher information: as the output matrix, whose inputs are correlated, and
    as a table, where columns of a row have nothing to do with each other. The correlations are weakened accordingly.
    """
    rows: npt.NDArray[np.float32] = (sums.rows / n_tokens).astype(np.float32)[:, None]
    if tensor.interleave:
        rows = interleave_halves(rows, tensor.interleave).astype(np.float32)
    total = float(sums.rows.sum())
    columns = sums.columns / total if total > 0 else sums.columns
    return Curvature(
        np.ascontiguousarray(rows[:, 0]),
        np.asarray(columns, np.float32),
        {block: value / 2 / n_tokens for block, value in sums.rounding.items()},
        _weakened(_correlation(sums.group), sums, total) if tied else _correlation(sums.group),
    )
