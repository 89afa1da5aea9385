"""ggml's own matrix kernels, run as llama.cpp's CPU backend runs them when it decodes a token.

A weight's speed depends on the layout that the backend keeps it in: many types are interleaved for the vector unit
when they are loaded (ggml-cpu/repack.cpp, AMX tiles, KleidiAI). So weights are placed by the rule of llama.cpp's loader
(``make_cpu_buft_list`` in llama-model.cpp, ``weight_buft_supported`` in llama-model-loader.cpp): the first of the
accelerators' and the CPU's extra buffer types that supports the product, else the plain one. Everything goes through
functions of ggml's C API; no field of one of its structures is read or written.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeq.errors import SessionError, UsageError
from edgeq.ggml_library import InitParams, ggml_call, ggml_function
from edgeq.ggml_types import GgmlType, ggml_type
from edgeq.llama_handle import Handle
from edgeq.llama_library import check_threads

__all__ = ["CpuBackend", "Matrices", "MatrixSet"]

Floats = npt.NDArray[np.float32]
Blocks = npt.NDArray[np.uint8]

_F32 = 0  # GGML_TYPE_F32
_SUCCESS = 0  # GGML_STATUS_SUCCESS
# enum ggml_backend_dev_type
_CPU_DEVICE = 0
_ACCELERATOR_DEVICE = 3
# llama.cpp asks whether a buffer type supports a product with a batch of so many tokens, and stores the weight for it.
_LOADER_BATCH = 512
# Nodes, leaves and hash table entries of a graph beside its matrices.
_SPARE_NODES = 16


def _procedure(device: int, name: bytes, result: Any, *arguments: Any) -> Callable[..., Any] | None:  # noqa: ANN401
    """A function that a backend offers by name, None if it has none."""
    registry = ggml_call("ggml_backend_dev_backend_reg", device)
    address = ggml_call("ggml_backend_reg_get_proc_address", registry, name)
    return ctypes.CFUNCTYPE(result, *arguments)(address) if address else None


def _cpu_device() -> int:
    device: int | None = ggml_call("ggml_backend_dev_by_type", _CPU_DEVICE)
    if device is None:
        raise SessionError("this llama.cpp was built without a CPU backend", "Install llama-cpp-python again")
    return device


@functools.cache
def _buffer_types() -> tuple[tuple[int, int], ...]:
    """(device, buffer type) in the order in which llama.cpp's loader tries them for a weight of the CPU."""
    found: list[tuple[int, int]] = []
    for index in range(ggml_call("ggml_backend_dev_count")):
        device = ggml_call("ggml_backend_dev_get", index)
        if ggml_call("ggml_backend_dev_type", device) == _ACCELERATOR_DEVICE:
            found.append((device, ggml_call("ggml_backend_dev_buffer_type", device)))
    cpu = _cpu_device()
    plain = ggml_call("ggml_backend_dev_buffer_type", cpu)
    found = [pair for pair in found if pair[1] != plain]
    extra = _procedure(cpu, b"ggml_backend_dev_get_extra_bufts", ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)
    array = extra(cpu) if extra is not None else None
    index = 0
    while array and array[index]:
        found.append((cpu, array[index]))
        index += 1
    return (*found, (cpu, plain))


def _legal_type(type_name: str, n_columns: int) -> GgmlType:
    kind = ggml_type(type_name)
    if not kind.fits(n_columns):
        raise UsageError(
            f"{kind.name} needs rows of a multiple of {kind.block_weights} weights, not {n_columns}",
            "Choose a type with a smaller block",
        )
    return kind


class CpuBackend(Handle):
    """llama.cpp's CPU backend with a number of threads. A context manager."""

    def __init__(self, threads: int) -> None:
        """Start the backend.

        Args:
            threads: as a session's; the pool is made anew for each graph, as llama.cpp does by default.

        Raises:
            UsageError: a number of threads that llama.cpp cannot have.
            SessionError: this llama.cpp has no CPU backend.
        """
        check_threads(threads)
        device = _cpu_device()
        set_threads = _procedure(device, b"ggml_backend_set_n_threads", None, ctypes.c_void_p, ctypes.c_int)
        pointer = ggml_call("ggml_backend_dev_init", device, None)
        if not pointer or set_threads is None:
            raise SessionError("the CPU backend of llama.cpp does not start", "Install llama-cpp-python again")
        super().__init__(pointer, ggml_function("ggml_backend_free"), "CPU backend")
        set_threads(pointer, threads)
        self.threads = threads


@dataclasses.dataclass(frozen=True)
class Matrices:
    """Equal matrices, each with memory of its own.

    Attributes:
        type: of the weights.
        shape: (columns, rows) as ggml counts, row length first.
        blocks: uint8 of (rows or fewer, bytes of a row); repeated until a matrix is full.
        copies: how many.
    """

    type: str
    shape: tuple[int, int]
    blocks: Blocks
    copies: int = 1


class MatrixSet(Handle):
    """Matrices in memory as a model's are, and for each kind of them a graph that multiplies all with one vector.

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
        candidates = _buffer_types() if use_extra_bufts else _buffer_types()[-1:]
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
            self.set_vector(index, np.ones(kind.shape[0], np.float32))

    def set_vector(self, kind: int, vector: Floats) -> None:
        """The vector that all matrices of a kind are multiplied with, float32 of (columns,); ones at first."""
        self.check_open()
        if vector.shape != (self._kinds[kind].shape[0],):
            message = f"a vector of {vector.shape} for {self._kinds[kind].shape[0]} columns"
            raise ValueError(message)
        data = np.ascontiguousarray(vector, np.float32)
        ggml_call("ggml_backend_tensor_set", self._graphs[kind].vector, data.ctypes.data, 0, data.nbytes)

    def compute(self, kind: int) -> None:
        """Multiply every matrix of a kind with its vector, one after another, on all threads of the backend.

        Raises:
            SessionError: the backend failed.
        """
        self.check_open()
        status = ggml_call("ggml_backend_graph_compute", self._backend.pointer, self._graphs[kind].pointer)
        if status != _SUCCESS:
            raise SessionError(f"ggml's graph failed with status {status}", "Free memory and try again")

    def product(self, kind: int, copy: int) -> Floats:
        """The last product of one matrix, float32 of (rows,)."""
        self.check_open()
        out = np.empty(self._kinds[kind].shape[1], np.float32)
        ggml_call("ggml_backend_tensor_get", self._graphs[kind].products[copy], out.ctypes.data, 0, out.nbytes)
        return out


class _Graph:
    """One product for each weight, in turn, of one vector that they share."""

    def __init__(self, stack: contextlib.ExitStack, kind: Matrices, weights: Sequence[int]) -> None:
        nodes = 2 * len(weights) + _SPARE_NODES
        room = nodes * ggml_call("ggml_tensor_overhead") + ggml_call("ggml_graph_overhead_custom", nodes, False)
        context = stack.enter_context(_context(room))
        self.vector = ggml_call("ggml_new_tensor_2d", context, _F32, kind.shape[0], 1)
        self.products = [ggml_call("ggml_mul_mat", context, weight, self.vector) for weight in weights]
        self.pointer = ggml_call("ggml_new_graph_custom", context, nodes, False)
        for product in self.products:
            ggml_call("ggml_build_forward_expand", self.pointer, product)
        _allocate(stack, context, _buffer_types()[-1][1])


def _check(kind: Matrices) -> None:
    columns, rows = kind.shape
    row_bytes = _legal_type(kind.type, columns).row_bytes(columns)
    if kind.blocks.ndim != 2 or not 0 < len(kind.blocks) <= rows or kind.blocks.shape[1] != row_bytes:
        message = f"blocks of {kind.blocks.shape} for {rows} rows of {row_bytes} bytes"
        raise ValueError(message)
    if kind.copies < 1:
        message = f"{kind.copies} copies of a matrix"
        raise ValueError(message)


def _home(kind: Matrices, candidates: Sequence[tuple[int, int]]) -> int:
    """The first buffer type whose device supports the product with a weight that lies in it."""
    for device, buffer_type in candidates:
        with contextlib.ExitStack() as attempt:
            context = attempt.enter_context(_context(_SPARE_NODES * ggml_call("ggml_tensor_overhead")))
            weight = ggml_call("ggml_new_tensor_2d", context, ggml_type(kind.type).id, *kind.shape)
            _allocate(attempt, context, buffer_type)
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
    context = stack.enter_context(_context((count + _SPARE_NODES) * ggml_call("ggml_tensor_overhead")))
    weights = {
        key: [
            ggml_call("ggml_new_tensor_2d", context, ggml_type(kind.type).id, *kind.shape) for _ in range(kind.copies)
        ]
        for key, kind in kinds.items()
    }
    _allocate(stack, context, buffer_type)
    for key, kind in kinds.items():
        data = np.ascontiguousarray(np.resize(kind.blocks, (kind.shape[1], kind.blocks.shape[1])))
        for weight in weights[key]:
            ggml_call("ggml_backend_tensor_set", weight, data.ctypes.data, 0, data.nbytes)
    return weights


@contextlib.contextmanager
def _context(room: int) -> Iterator[int]:
    """A ggml context that holds tensors' descriptions, not their data."""
    context: int | None = ggml_call("ggml_init", InitParams(room, None, True))
    if context is None:
        raise SessionError("ggml has no memory for a context", "Free memory and try again")
    try:
        yield context
    finally:
        ggml_call("ggml_free", context)


def _allocate(stack: contextlib.ExitStack, context: int, buffer_type: int) -> None:
    """Give every tensor of a context memory of that type, freed with the stack."""
    buffer = ggml_call("ggml_backend_alloc_ctx_tensors_from_buft", context, buffer_type)
    if not buffer:
        raise SessionError("too little memory for the matrices to measure", "Free memory, or measure a smaller set")
    stack.callback(ggml_function("ggml_backend_buffer_free"), buffer)
