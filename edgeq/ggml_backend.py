"""llama.cpp's CPU backend: its threads, the memories that it keeps tensors in, and graphs that it computes.

Everything goes through functions of ggml's C API; no field of one of its structures is read or written.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeq.errors import SessionError
from edgeq.ggml_library import InitParams, ggml_call, ggml_function
from edgeq.llama_handle import Handle
from edgeq.llama_library import check_threads

__all__ = [
    "SPARE_NODES",
    "CpuBackend",
    "allocate",
    "buffer_types",
    "fill",
    "ggml_context",
    "graph_room",
    "plain_buffer_type",
    "read_floats",
]

# Nodes, leaves and hash table entries of a graph beside those that its author counts.
SPARE_NODES = 16

_SUCCESS = 0  # GGML_STATUS_SUCCESS
# enum ggml_backend_dev_type
_CPU_DEVICE = 0
_ACCELERATOR_DEVICE = 3


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
def buffer_types() -> tuple[tuple[int, int], ...]:
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


def plain_buffer_type() -> int:
    """The CPU's ordinary memory."""
    return buffer_types()[-1][1]


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

    def compute(self, graph: int) -> None:
        """Run a graph.

        Raises:
            SessionError: the backend failed.
        """
        status = ggml_call("ggml_backend_graph_compute", self.pointer, graph)
        if status != _SUCCESS:
            raise SessionError(f"ggml's graph failed with status {status}", "Free memory and try again")


def graph_room(nodes: int) -> int:
    """Bytes of a context that describes a graph of so many nodes and as many tensors."""
    overhead: int = ggml_call("ggml_graph_overhead_custom", nodes, False)
    return nodes * int(ggml_call("ggml_tensor_overhead")) + overhead


@contextlib.contextmanager
def ggml_context(room: int) -> Iterator[int]:
    """A ggml context that holds tensors' descriptions, not their data.

    Args:
        room: bytes of all descriptions.

    Raises:
        SessionError: too little memory.
    """
    context: int | None = ggml_call("ggml_init", InitParams(room, None, True))
    if context is None:
        raise SessionError("ggml has no memory for a context", "Free memory and try again")
    try:
        yield context
    finally:
        ggml_call("ggml_free", context)


def allocate(stack: contextlib.ExitStack, context: int, buffer_type: int) -> None:
    """Give every tensor of a context memory of that type, freed with the stack.

    Raises:
        SessionError: too little memory.
    """
    buffer = ggml_call("ggml_backend_alloc_ctx_tensors_from_buft", context, buffer_type)
    if not buffer:
        raise SessionError("too little memory for the tensors to measure", "Free memory, or measure a smaller set")
    stack.callback(ggml_function("ggml_backend_buffer_free"), buffer)


def fill(tensor: int, data: npt.NDArray[Any], offset: int = 0) -> None:
    """Write an array's bytes into a tensor, ``offset`` bytes from its start."""
    whole = np.ascontiguousarray(data)
    ggml_call("ggml_backend_tensor_set", tensor, whole.ctypes.data, offset, whole.nbytes)


def read_floats(tensor: int, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """A float32 tensor's values in C order: ggml's first dimension is the last of ``shape``."""
    out = np.empty(shape, np.float32)
    ggml_call("ggml_backend_tensor_get", tensor, out.ctypes.data, 0, out.nbytes)
    return out
