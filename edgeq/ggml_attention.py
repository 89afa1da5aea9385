"""llama.cpp's flash attention on the CPU, as its graph computes it for one layer: store keys and values, then attend.

The nodes are those of ``build_attn`` and ``build_attn_mha`` in llama-graph.cpp and of ``cpy_k``, ``get_k`` in
llama-kv-cache.cpp: a cell of the cache holds all key heads of a token side by side, the mask is float16, cells are
visited up to a multiple of 256, and where the cache is quantized, queries, keys and values are rotated by a
Walsh-Hadamard matrix first and the result is rotated back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeq.errors import UsageError
from edgeq.ggml_backend import (
    SPARE_NODES,
    CpuBackend,
    allocate,
    fill,
    ggml_context,
    graph_room,
    plain_buffer_type,
    read_floats,
)
from edgeq.ggml_library import ggml_call
from edgeq.ggml_types import ggml_type
from edgeq.llama_handle import Handle

__all__ = ["AttentionBatch", "AttentionSet", "KvCaches", "padded_cells", "rotation"]

Floats = npt.NDArray[np.float32]
Blocks = npt.NDArray[np.uint8]

_F32, _F16, _I64 = 0, 1, 27  # enum ggml_type
_PRECISION_F32 = 10  # GGML_PREC_F32
_IS_HADAMARD = 1  # GGML_HINT_SRC0_IS_HADAMARD
_PAD_CELLS = 256  # llama_kv_cache::get_n_kv
_ROTATION = 64  # llama_kv_cache::build_input_v_rot
_NODES_PER_LAYER = 32  # with the views between them


@dataclasses.dataclass(frozen=True)
class KvCaches:
    """How keys and values are kept, and what the caches hold at first.

    Attributes:
        type: of keys and values.
        head_dim: values of one head.
        n_kv_heads: heads that a cell holds.
        keys: uint8 of (at least one, bytes of a cell); repeated until the caches are full.
        values: as ``keys``.
    """

    type: str
    head_dim: int
    n_kv_heads: int
    keys: Blocks
    values: Blocks

    @property
    def cell_bytes(self) -> int:
        """Bytes of the keys of one cell; the values take as many."""
        return ggml_type(self.type).row_bytes(self.head_dim * self.n_kv_heads)


@dataclasses.dataclass(frozen=True)
class AttentionBatch:
    """Tokens that attend at once, in each of some layers that have caches of their own.

    Attributes:
        n_heads: query heads, a multiple of the caches' heads.
        n_tokens: 1 when a token is decoded, many when a prompt is read.
        n_cached: tokens that were there before; each token attends to them and to its like up to itself.
        layers: how many; a batch never touches the caches of another.
    """

    n_heads: int
    n_tokens: int
    n_cached: int
    layers: int = 1

    @property
    def n_cells(self) -> int:
        """Cells that llama.cpp visits, in a multiple of 256; those beyond the last token are masked."""
        return padded_cells(self.n_cached + self.n_tokens)


def padded_cells(n_tokens: int) -> int:
    """The cells of a cache that llama.cpp visits for so many tokens."""
    return -(-n_tokens // _PAD_CELLS) * _PAD_CELLS


def rotation(size: int) -> Floats:
    """The orthonormal Walsh-Hadamard matrix, its own inverse, float32 of (size, size); ``size`` a power of two."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return (matrix / math.sqrt(size)).astype(np.float32)


class AttentionSet(Handle):
    """Caches in memory, and for each batch a graph that attends in one layer after another.

    A context manager; the backend must stay open for as long.
    """

    def __init__(self, backend: CpuBackend, caches: KvCaches, batches: Sequence[AttentionBatch]) -> None:
        """Allocate and fill the caches.

        Args:
            backend: what computes.
            caches: of every layer of every batch.
            batches: at least one; `compute` and `output` know them by their index.

        Raises:
            UsageError: no such type, one that llama.cpp copies first, or its block does not divide a head.
            SessionError: too little memory.
        """
        _check(caches, batches)
        self._backend = backend
        self._caches = caches
        self._batches = tuple(batches)
        n_cells = sum(batch.layers * batch.n_cells for batch in batches)
        with contextlib.ExitStack() as stack:
            context = stack.enter_context(ggml_context(SPARE_NODES * ggml_call("ggml_tensor_overhead")))
            width = caches.head_dim * caches.n_kv_heads
            pools = [
                ggml_call("ggml_new_tensor_2d", context, ggml_type(caches.type).id, width, n_cells) for _ in range(2)
            ]
            allocate(stack, context, plain_buffer_type())
            for pool, blocks in zip(pools, (caches.keys, caches.values), strict=True):
                for start in range(0, n_cells, len(blocks)):
                    fill(pool, blocks[: n_cells - start], start * caches.cell_bytes)
            self._graphs: list[_Graph] = []
            first_cell = 0
            for batch in batches:
                self._graphs.append(_Graph(stack, caches, batch, pools, first_cell))
                first_cell += batch.layers * batch.n_cells
            owned = stack.pop_all()
        super().__init__(owned, contextlib.ExitStack.close, "set of caches", owner=backend)

    def set_tokens(self, batch: int, queries: Floats, keys: Floats, values: Floats) -> None:
        """What the tokens of a batch bring, the same in every layer; zeros at first.

        Args:
            batch: its index.
            queries: float32 of (tokens, heads, head_dim).
            keys: float32 of (tokens, heads of the caches, head_dim); stored after the cached tokens.
            values: as ``keys``.
        """
        self.check_open()
        shape = self._batches[batch]
        heads = (shape.n_heads, self._caches.n_kv_heads, self._caches.n_kv_heads)
        graph = self._graphs[batch]
        for tensor, data, n_heads in zip(graph.inputs, (queries, keys, values), heads, strict=True):
            expected = (shape.n_tokens, n_heads, self._caches.head_dim)
            if data.shape != expected:
                message = f"an array of {data.shape}, not {expected}"
                raise ValueError(message)
            fill(tensor, data.astype(np.float32, copy=False))

    def compute(self, batch: int) -> None:
        """Attend with a batch in each of its layers, one after another, on all threads of the backend.

        Raises:
            SessionError: the backend failed.
        """
        self.check_open()
        self._backend.compute(self._graphs[batch].pointer)

    def output(self, batch: int, layer: int) -> Floats:
        """The last result of one layer, float32 of (tokens, heads, head_dim)."""
        self.check_open()
        shape = self._batches[batch]
        return read_floats(self._graphs[batch].outputs[layer], (shape.n_tokens, shape.n_heads, self._caches.head_dim))


def _check(caches: KvCaches, batches: Sequence[AttentionBatch]) -> None:
    kind = ggml_type(caches.type)
    if kind.name == "f32":
        raise UsageError("llama.cpp attends over a copy of an f32 cache in f16", "Choose f16")
    if not kind.fits(caches.head_dim):
        raise UsageError(
            f"a cache of {kind.name} needs heads of a multiple of {kind.block_weights} values, not {caches.head_dim}",
            "Choose f16",
        )
    for blocks in (caches.keys, caches.values):
        if blocks.ndim != 2 or not len(blocks) or blocks.shape[1] != caches.cell_bytes:
            message = f"blocks of {blocks.shape} for cells of {caches.cell_bytes} bytes"
            raise ValueError(message)
    for batch in batches:
        if batch.n_heads % caches.n_kv_heads or min(batch.n_heads, batch.n_tokens, batch.layers) < 1:
            message = f"{batch} with {caches.n_kv_heads} heads in the cache"
            raise ValueError(message)


class _Graph:
    """One layer after another, of tokens that they share."""

    def __init__(
        self,
        stack: contextlib.ExitStack,
        caches: KvCaches,
        batch: AttentionBatch,
        pools: Sequence[int],
        first_cell: int,
    ) -> None:
        nodes = _NODES_PER_LAYER * batch.layers + SPARE_NODES
        self._context = stack.enter_context(ggml_context(graph_room(nodes)))
        self._caches, self._batch = caches, batch
        self.inputs = tuple(
            self._new(_F32, caches.head_dim, heads, batch.n_tokens)
            for heads in (batch.n_heads, caches.n_kv_heads, caches.n_kv_heads)
        )
        self._rows = self._new(_I64, batch.n_tokens, 1, 1)
        self._mask = self._new(_F16, batch.n_cells, batch.n_tokens, 1)
        self._rotations = self._new_rotations()
        self.pointer = ggml_call("ggml_new_graph_custom", self._context, nodes, False)
        self.outputs = [self._layer(pools, first_cell + layer * batch.n_cells) for layer in range(batch.layers)]
        allocate(stack, self._context, plain_buffer_type())
        self._fill()

    def _new(self, kind: int, *shape: int) -> int:
        return int(ggml_call("ggml_new_tensor_3d", self._context, kind, *shape))

    def _new_rotations(self) -> dict[int, int]:
        """Tensors of the matrices that keys and values are rotated with, by their sizes; none for a cache of floats."""
        if ggml_type(self._caches.type).is_float or self._caches.head_dim % _ROTATION:
            return {}
        return {size: self._new(_F32, size, size, 1) for size in {_ROTATION, self._key_rotation}}

    @property
    def _key_rotation(self) -> int:
        """The largest power of two, 64 at least, that divides a head."""
        return self._caches.head_dim & -self._caches.head_dim

    def _layer(self, pools: Sequence[int], first_cell: int) -> int:
        """Add one layer to the graph; its result."""
        queries, keys, values = self.inputs
        if self._rotations:
            queries, keys = (self._rotate(tensor, self._key_rotation) for tensor in (queries, keys))
            values = self._rotate(values, _ROTATION)
        for tensor in (queries, values, keys):
            self._expand(tensor)
        width = self._caches.head_dim * self._caches.n_kv_heads
        for pool, tensor in zip(pools, (keys, values), strict=True):
            flat = self._call("reshape_2d", tensor, width, self._batch.n_tokens)
            cells = self._call(
                "view_2d",
                pool,
                width,
                self._batch.n_cells,
                self._caches.cell_bytes,
                first_cell * self._caches.cell_bytes,
            )
            self._expand(self._call("set_rows", cells, flat, self._rows))
        queries, keys, values = (
            self._call("permute", tensor, 0, 2, 1, 3)
            for tensor in (queries, *(self._visited(pool, first_cell) for pool in pools))
        )
        scale = 1 / math.sqrt(self._caches.head_dim)
        output = self._call("flash_attn_ext", queries, keys, values, self._mask, scale, 0.0, 0.0)
        ggml_call("ggml_prec_set_acc", output, _PRECISION_F32)
        if self._rotations:
            output = self._rotate(output, _ROTATION)
        self._expand(output)
        return output

    def _visited(self, pool: int, first_cell: int) -> int:
        """The cells of one layer, [head_dim, heads, cells, 1]."""
        head, cell = ggml_type(self._caches.type).row_bytes(self._caches.head_dim), self._caches.cell_bytes
        sizes = (self._caches.head_dim, self._caches.n_kv_heads, self._batch.n_cells, 1)
        return self._call("view_4d", pool, *sizes, head, cell, cell * self._batch.n_cells, first_cell * cell)

    def _rotate(self, tensor: int, size: int) -> int:
        """A tensor of [head_dim, heads, tokens] with every ``size`` of its values rotated."""
        values = ggml_call("ggml_nbytes", tensor) // 4
        flat = self._call("reshape_2d", tensor, size, values // size)
        product = self._call("mul_mat", self._rotations[size], flat)
        ggml_call("ggml_mul_mat_set_hint", product, _IS_HADAMARD)
        heads = values // (self._caches.head_dim * self._batch.n_tokens)
        return self._call("reshape_3d", product, self._caches.head_dim, heads, self._batch.n_tokens)

    def _call(self, name: str, *arguments: Any) -> int:  # noqa: ANN401 - ctypes
        return int(ggml_call(f"ggml_{name}", self._context, *arguments))

    def _expand(self, tensor: int) -> None:
        ggml_call("ggml_build_forward_expand", self.pointer, tensor)

    def _fill(self) -> None:
        """Give the inputs their values: tokens of zeros, their cells, and who sees whom."""
        batch = self._batch
        for tensor in self.inputs:
            fill(tensor, np.zeros(ggml_call("ggml_nbytes", tensor), np.uint8))
        own_cells = np.arange(batch.n_cached, batch.n_cached + batch.n_tokens, dtype=np.int64)
        fill(self._rows, own_cells)
        visible = np.arange(batch.n_cells) <= own_cells[:, None]
        fill(self._mask, np.where(visible, np.float16(0), np.float16(-np.inf)))
        for size, tensor in self._rotations.items():
            fill(tensor, rotation(size))
