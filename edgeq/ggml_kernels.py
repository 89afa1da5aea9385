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
from edgeq.ggml_types import GgmlType, ggml_type
from edgeq.llama_handle import Handle
from edgeq.llama_library import check_threads, library

__all__ = ["CpuBackend", "Matrices", "MatrixSet", "quantize_blocks"]

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


class _InitParams(ctypes.Structure):
    """``struct ggml_init_params`` of ggml.h."""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


_P, _I, _L, _Z = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_size_t
_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_init": (_P, (_InitParams,)),
    "ggml_free": (None, (_P,)),
    "ggml_tensor_overhead": (_Z, ()),
    "ggml_graph_overhead_custom": (_Z, (_Z, ctypes.c_bool)),
    "ggml_new_tensor_2d": (_P, (_P, _I, _L, _L)),
    "ggml_mul_mat": (_P, (_P, _P, _P)),
    "ggml_new_graph_custom": (_P, (_P, _Z, ctypes.c_bool)),
    "ggml_build_forward_expand": (None, (_P, _P)),
    "ggml_quantize_chunk": (_Z, (_I, _P, _P, _L, _L, _L, _P)),
    "ggml_backend_alloc_ctx_tensors_from_buft": (_P, (_P, _P)),
    "ggml_backend_buffer_free": (None, (_P,)),
    "ggml_backend_buft_name": (ctypes.c_char_p, (_P,)),
    "ggml_backend_dev_backend_reg": (_P, (_P,)),
    "ggml_backend_dev_buffer_type": (_P, (_P,)),
    "ggml_backend_dev_by_type": (_P, (_I,)),
    "ggml_backend_dev_count": (_Z, ()),
    "ggml_backend_dev_get": (_P, (_Z,)),
    "ggml_backend_dev_init": (_P, (_P, ctypes.c_char_p)),
    "ggml_backend_dev_supports_op": (ctypes.c_bool, (_P, _P)),
    "ggml_backend_dev_type": (_I, (_P,)),
    "ggml_backend_free": (None, (_P,)),
    "ggml_backend_graph_compute": (_I, (_P, _P)),
    "ggml_backend_reg_get_proc_address": (_P, (_P, ctypes.c_char_p)),
    "ggml_backend_tensor_get": (None, (_P, _P, _Z, _Z)),
    "ggml_backend_tensor_set": (None, (_P, _P, _Z, _Z)),
}


@functools.cache
def _function(name: str) -> Callable[..., Any]:
    """A function of ggml through the handle of libllama, which links to it."""
    lib: ctypes.CDLL = library()._lib  # noqa: SLF001 - the bindings have no public name for their handle
    try:
        function = lib[name]  # a new object, so that nobody else's argument types are changed
    except AttributeError as error:
        raise SessionError(
            f"this llama.cpp has no {name}",
            "Install a llama-cpp-python that edgeq was tested with: pip install 'llama-cpp-python==0.3.36'",
        ) from error
    result, arguments = _SIGNATURES[name]
    function.restype, function.argtypes = result, arguments
    return function


def _call(name: str, *arguments: Any) -> Any:  # noqa: ANN401 - ctypes
    """The function's result; pointers are integers, None for NULL."""
    return _function(name)(*arguments)


def _procedure(device: int, name: bytes, result: Any, *arguments: Any) -> Callable[..., Any] | None:  # noqa: ANN401
    """A function that a backend offers by name, None if it has none."""
    registry = _call("ggml_backend_dev_backend_reg", device)
    address = _call("ggml_backend_reg_get_proc_address", registry, name)
    return ctypes.CFUNCTYPE(result, *arguments)(address) if address else None


def _cpu_device() -> int:
    device: int | None = _call("ggml_backend_dev_by_type", _CPU_DEVICE)
    if device is None:
        raise SessionError("this llama.cpp was built without a CPU backend", "Install llama-cpp-python again")
    return device


@functools.cache
def _buffer_types() -> tuple[tuple[int, int], ...]:
    """(device, buffer type) in the order in which llama.cpp's loader tries them for a weight of the CPU."""
    found: list[tuple[int, int]] = []
    for index in range(_call("ggml_backend_dev_count")):
        device = _call("ggml_backend_dev_get", index)
        if _call("ggml_backend_dev_type", device) == _ACCELERATOR_DEVICE:
            found.append((device, _call("ggml_backend_dev_buffer_type", device)))
    cpu = _cpu_device()
    plain = _call("ggml_backend_dev_buffer_type", cpu)
    found = [pair for pair in found if pair[1] != plain]
    extra = _procedure(cpu, b"ggml_backend_dev_get_extra_bufts", ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)
    array = extra(cpu) if extra is not None else None
    index = 0
    while array and array[index]:
        found.append((cpu, array[index]))
        index += 1
    return (*found, (cpu, plain))


def quantize_blocks(rows: Floats, type_name: str) -> Blocks:
    """Rows as ggml stores them, with every column of equal importance.

    Args:
        rows: finite float32 of (n_rows, n_columns).
        type_name: any type whose block divides ``n_columns``.

    Returns:
        uint8 of (n_rows, bytes of a row).

    Raises:
        UsageError: no such type, or its block does not divide the rows.
    """
    kind = _legal_type(type_name, rows.shape[1])
    source = np.ascontiguousarray(rows, np.float32)
    equal = np.ones(rows.shape[1], np.float32)
    blocks = np.empty((len(rows), kind.row_bytes(rows.shape[1])), np.uint8)
    _call("ggml_quantize_chunk", kind.id, source.ctypes.data, blocks.ctypes.data, 0, *rows.shape, equal.ctypes.data)
    return blocks


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
        pointer = _call("ggml_backend_dev_init", device, None)
        if not pointer or set_threads is None:
            raise SessionError("the CPU backend of llama.cpp does not start", "Install llama-cpp-python again")
        super().__init__(pointer, _function("ggml_backend_free"), "CPU backend")
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
        self.buffers = tuple(str(_call("ggml_backend_buft_name", home).decode()) for home in homes)
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
        _call("ggml_backend_tensor_set", self._graphs[kind].vector, data.ctypes.data, 0, data.nbytes)

    def compute(self, kind: int) -> None:
        """Multiply every matrix of a kind with its vector, one after another, on all threads of the backend.

        Raises:
            SessionError: the backend failed.
        """
        self.check_open()
        status = _call("ggml_backend_graph_compute", self._backend.pointer, self._graphs[kind].pointer)
        if status != _SUCCESS:
            raise SessionError(f"ggml's graph failed with status {status}", "Free memory and try again")

    def product(self, kind: int, copy: int) -> Floats:
        """The last product of one matrix, float32 of (rows,)."""
        self.check_open()
        out = np.empty(self._kinds[kind].shape[1], np.float32)
        _call("ggml_backend_tensor_get", self._graphs[kind].products[copy], out.ctypes.data, 0, out.nbytes)
        return out


class _Graph:
    """One product for each weight, in turn, of one vector that they share."""

    def __init__(self, stack: contextlib.ExitStack, kind: Matrices, weights: Sequence[int]) -> None:
        nodes = 2 * len(weights) + _SPARE_NODES
        room = nodes * _call("ggml_tensor_overhead") + _call("ggml_graph_overhead_custom", nodes, False)
        context = stack.enter_context(_context(room))
        self.vector = _call("ggml_new_tensor_2d", context, _F32, kind.shape[0], 1)
        self.products = [_call("ggml_mul_mat", context, weight, self.vector) for weight in weights]
        self.pointer = _call("ggml_new_graph_custom", context, nodes, False)
        for product in self.products:
            _call("ggml_build_forward_expand", self.pointer, product)
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
            context = attempt.enter_context(_context(_SPARE_NODES * _call("ggml_tensor_overhead")))
            weight = _call("ggml_new_tensor_2d", context, ggml_type(kind.type).id, *kind.shape)
            _allocate(attempt, context, buffer_type)
            # Made after the allocation, which would otherwise give memory to the batch too.
            batch = _call("ggml_new_tensor_2d", context, _F32, kind.shape[0], _LOADER_BATCH)
            if _call("ggml_backend_dev_supports_op", device, _call("ggml_mul_mat", context, weight, batch)):
                return buffer_type
    raise SessionError(f"no buffer of llama.cpp's CPU backend takes {kind.type}", "Choose another type")


def _allocate_weights(
    stack: contextlib.ExitStack, buffer_type: int, kinds: Mapping[int, Matrices]
) -> dict[int, list[int]]:
    """Weights of several kinds in one allocation, filled; lists by the same keys."""
    count = sum(kind.copies for kind in kinds.values())
    context = stack.enter_context(_context((count + _SPARE_NODES) * _call("ggml_tensor_overhead")))
    weights = {
        key: [_call("ggml_new_tensor_2d", context, ggml_type(kind.type).id, *kind.shape) for _ in range(kind.copies)]
        for key, kind in kinds.items()
    }
    _allocate(stack, context, buffer_type)
    for key, kind in kinds.items():
        data = np.ascontiguousarray(np.resize(kind.blocks, (kind.shape[1], kind.blocks.shape[1])))
        for weight in weights[key]:
            _call("ggml_backend_tensor_set", weight, data.ctypes.data, 0, data.nbytes)
    return weights


@contextlib.contextmanager
def _context(room: int) -> Iterator[int]:
    """A ggml context that holds tensors' descriptions, not their data."""
    context: int | None = _call("ggml_init", _InitParams(room, None, True))
    if context is None:
        raise SessionError("ggml has no memory for a context", "Free memory and try again")
    try:
        yield context
    finally:
        _call("ggml_free", context)


def _allocate(stack: contextlib.ExitStack, context: int, buffer_type: int) -> None:
    """Give every tensor of a context memory of that type, freed with the stack."""
    buffer = _call("ggml_backend_alloc_ctx_tensors_from_buft", context, buffer_type)
    if not buffer:
        raise SessionError("too little memory for the matrices to measure", "Free memory, or measure a smaller set")
    stack.callback(_function("ggml_backend_buffer_free"), buffer)
