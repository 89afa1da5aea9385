"""ggml's own matrix kernels, run as llama.cpp's CPU backend runs them on a token or a batch of a prompt.

A weight's speed depends on the layout that the backend keeps it in: many types are interleaved for the vector unit
when they are loaded (ggml-cpu/repack.cpp, AMX tiles, KleidiAI). So weights are placed by the rule of llama.cpp's loader
(``make_cpu_buft_list`` in llama-model.cpp, ``weight_buft_supported`` in llama-model-loader.cpp): the first of the
accelerators' and the CPU's extra buffer types that supports the product, else the plain one. Everything goes through
functions of ggml's C API; no field of one of its structures is read or written.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from edgeq.errors import SessionError, UsageError
from edgeq.ggml_backend import (
    SPARE_NODES,
    CpuBackend,
    allocate,
    buffer_types,
    fill,
    ggml_context,
    graph_room,
    plain_buffer_type,
    read_floats,
)
from edgeq.ggml_library import ggml_call
from edgeq.ggml_types import GgmlType, ggml_type
from edgeq.llama_handle import Handle

__all__ = ["Matrices", "MatrixSet"]

Floats = npt.NDArray[np.float32]
Blocks = npt.NDArray[np.uint8]

_F32 = 0  # GGML_TYPE_F32
# llama.cpp asks whether a buffer type supports a product with a batch of so many tokens, and stores the weight for it.
_LOADER_BATCH = 512


def _legal_type(type_name: str, n_columns: int) -> GgmlType:
    kind = ggml_type(type_name)
    if not kind.fits(n_columns):
        raise UsageError(
            f"{kind.name} needs rows of a multiple of {kind.block_weights} weights, not {n_columns}",
            "Choose a type with a smaller block",
        )
    return kind


@dataclasses.dataclass(frozen=True)
class Matrices:
    """Equal matrices, each with memory of its own.

    Attributes:
        type: of the weights.
        shape: (columns, rows) as ggml counts, row length first.
        blocks: uint8 of (rows or fewer, bytes of a row); repeated until a matrix is full.
        copies: how many.
        batch: vectors that each is multiplied with at once: 1 when a token is decoded, many when a prompt is read.
    """

    type: str
    shape: tuple[int, int]
    blocks: Blocks
    copies: int = 1
    batch: int = 1


class MatrixSet(Handle):
    """Matrices in memory as a model's are, and for each kind a graph that multiplies all with one batch of vectors.

    All that one buffer type takes lies in one allocation, as when a model is loaded. Small ones may come from recycled
    memory that numpy asked huge pages for, on which Q4_1 was seen to run 1.4 times as fast.
    A context manager; the backend must stay open for as long.

    Attributes:
        buffers: for each kind the name of the buffer type that holds it, such as ``"CPU"`` or ``"CPU_REPACK"``.
    """

    def __init__(self, backend: CpuBackend, kinds: Sequence[Matrices], *, use_extra_bufts: bool = True) -> None:
        """Allocate and fill the matrices.

        Args:
            backend: what computes.
            kinds: at least one; `compute` and `product` know them by their index.
            use_extra_bufts: let the backend choose its own layout, as llama.cpp does by default.

        Raises:
            UsageError: no such type, or its block does not divide the columns.
            SessionError: too little memory.
        """
        for kind in kinds:
            _check(kind)
        self._backend = backend
        self._kinds = tuple(kinds)
        candidates = buffer_types() if use_extra_bufts else buffer_types()[-1:]
        homes = [_home(kind, candidates) for kind in kinds]
        self.buffers = tuple(str(ggml_call("ggml_backend_buft_name", home).decode()) for home in homes)
        with contextlib.ExitStack() as stack:
            weights: dict[int, list[int]] = {}
            for home in dict.fromkeys(homes):
                members = [index for index in range(len(kinds)) if homes[index] == home]
                weights |= _allocate_weights(stack, home, {index: kinds[index] for index in members})
            self._graphs = [_Graph(stack, kind, weights[index]) for index, kind in enumerate(kinds)]
            owned = stack.pop_all()
        super().__init__(owned, contextlib.ExitStack.close, "set of matrices", owner=backend)
        for index, kind in enumerate(kinds):
            self.set_vectors(index, np.ones((kind.batch, kind.shape[0]), np.float32))

    def set_vector(self, kind: int, vector: Floats) -> None:
        """The one vector that all matrices of a kind are multiplied with, float32 of (columns,); ones at first."""
        self.set_vectors(kind, vector[None])

    def set_vectors(self, kind: int, vectors: Floats) -> None:
        """The vectors that all matrices of a kind are multiplied with, float32 of (batch, columns); ones at first."""
        self.check_open()
        expected = (self._kinds[kind].batch, self._kinds[kind].shape[0])
        if vectors.shape != expected:
            message = f"vectors of {vectors.shape}, not {expected}"
            raise ValueError(message)
        fill(self._graphs[kind].vectors, vectors.astype(np.float32, copy=False))

    def compute(self, kind: int) -> None:
        """Multiply every matrix of a kind with its vectors, one after another, on all threads of the backend.

        Raises:
            SessionError: the backend failed.
        """
        self.check_open()
        self._backend.compute(self._graphs[kind].pointer)

    def product(self, kind: int, copy: int) -> Floats:
        """The last product of one matrix with its first vector, float32 of (rows,)."""
        only: Floats = self.products(kind, copy)[0]
        return only

    def products(self, kind: int, copy: int) -> Floats:
        """The last products of one matrix, float32 of (batch, rows)."""
        self.check_open()
        return read_floats(self._graphs[kind].products[copy], (self._kinds[kind].batch, self._kinds[kind].shape[1]))


class _Graph:
    """One product for each weight, in turn, of a batch of vectors that they share."""

    def __init__(self, stack: contextlib.ExitStack, kind: Matrices, weights: Sequence[int]) -> None:
        nodes = 2 * len(weights) + SPARE_NODES
        context = stack.enter_context(ggml_context(graph_room(nodes)))
        self.vectors = ggml_call("ggml_new_tensor_2d", context, _F32, kind.shape[0], kind.batch)
        self.products = [ggml_call("ggml_mul_mat", context, weight, self.vectors) for weight in weights]
        self.pointer = ggml_call("ggml_new_graph_custom", context, nodes, False)
        for product in self.products:
            ggml_call("ggml_build_forward_expand", self.pointer, product)
        allocate(stack, context, plain_buffer_type())


def _check(kind: Matrices) -> None:
    columns, rows = kind.shape
    row_bytes = _legal_type(kind.type, columns).row_bytes(columns)
    if kind.blocks.ndim != 2 or not 0 < len(kind.blocks) <= rows or kind.blocks.shape[1] != row_bytes:
        message = f"blocks of {kind.blocks.shape} for {rows} rows of {row_bytes} bytes"
        raise ValueError(message)
    if kind.copies < 1 or kind.batch < 1:
        message = f"{kind.copies} copies of a matrix with {kind.batch} vectors"
        raise ValueError(message)


def _home(kind: Matrices, candidates: Sequence[tuple[int, int]]) -> int:
    """The first buffer type whose device supports the product with a weight that lies in it."""
    for device, buffer_type in candidates:
        with contextlib.ExitStack() as attempt:
            context = attempt.enter_context(ggml_context(SPARE_NODES * ggml_call("ggml_tensor_overhead")))
            weight = ggml_call("ggml_new_tensor_2d", context, ggml_type(kind.type).id, *kind.shape)
            allocate(attempt, context, buffer_type)
            # Made after the allocation, which would otherwise give memory to the batch too.
            batch = ggml_call("ggml_new_tensor_2d", context, _F32, kind.shape[0], _LOADER_BATCH)
            if ggml_call("ggml_backend_dev_supports_op", device, ggml_call("ggml_mul_mat", context, weight, batch)):
                return buffer_type
    raise SessionError(f"no buffer of llama.cpp's CPU backend takes {kind.type}", "Choose another type")


def _allocate_weights(
    stack: contextlib.ExitStack, buffer_type: int, kinds: Mapping[int, Matrices]
) -> dict[int, list[int]]:
    """Weights of several kinds in one allocation, filled; lists by the same keys."""
    count = sum(kind.copies for kind in kinds.values())
    context = stack.enter_context(ggml_context((count + SPARE_NODES) * ggml_call("ggml_tensor_overhead")))
    weights = {
        key: [
            ggml_call("ggml_new_tensor_2d", context, ggml_type(kind.type).id, *kind.shape) for _ in range(kind.copies)
        ]
        for key, kind in kinds.items()
    }
    allocate(stack, context, buffer_type)
    for key, kind in kinds.items():
        data = np.ascontiguousarray(np.resize(kind.blocks, (kind.shape[1], kind.blocks.shape[1])))
        for weight in weights[key]:
            fill(weight, data)
    return weights
