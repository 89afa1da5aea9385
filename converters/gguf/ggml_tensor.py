"""``struct ggml_tensor`` read from Python, after it was seen to be laid out as this module believes.

Nodes of a graph reach a callback as bare pointers. What ggml has functions for (name, operation, data) is asked of
ggml; only type, shape, strides and sources are read from memory, for which it has none.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from edgeq.errors import ConversionError
from edgeq.llama_library import library

__all__ = ["TensorHead", "Tensors"]

_DIMS, _SOURCES, _PARAMETERS = 4, 10, 16  # GGML_MAX_DIMS, GGML_MAX_SRC, GGML_MAX_OP_PARAMS / 4
_F32, _F16, _I32 = 0, 1, 26  # enum ggml_type
_MEMORY_BYTES = 1 << 16


class TensorHead(ctypes.Structure):
    """The head of ``struct ggml_tensor`` of ggml.h, up to the last field that is read here."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * _DIMS),
        ("nb", ctypes.c_size_t * _DIMS),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * _PARAMETERS),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * _SOURCES),
    )


class _InitParams(ctypes.Structure):
    """``struct ggml_init_params`` of ggml.h."""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


@functools.cache
def _ggml() -> ctypes.CDLL:
    """The handle of libllama, which links to ggml."""
    lib: ctypes.CDLL = library()._lib  # noqa: SLF001 - the bindings have no public name for their handle
    pointer, number, size = ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t
    signatures = (
        ("ggml_init", pointer, (_InitParams,)),
        ("ggml_free", None, (pointer,)),
        ("ggml_new_tensor_2d", pointer, (pointer, ctypes.c_int, number, number)),
        ("ggml_new_tensor_3d", pointer, (pointer, ctypes.c_int, number, number, number)),
        ("ggml_mul_mat", pointer, (pointer, pointer, pointer)),
        ("ggml_mul_mat_id", pointer, (pointer, pointer, pointer, pointer)),
        ("ggml_get_name", ctypes.c_char_p, (pointer,)),
        ("ggml_op_desc", ctypes.c_char_p, (pointer,)),
        ("ggml_nbytes", size, (pointer,)),
        ("ggml_backend_tensor_get", None, (pointer, pointer, size, size)),
    )
    for name, result, arguments in signatures:
        try:
            function = getattr(lib, name)
        except AttributeError as error:
            raise _strange(f"has no {name}") from error
        function.restype, function.argtypes = result, arguments
    return lib


def _strange(what: str) -> ConversionError:
    return ConversionError(
        f"This llama.cpp {what}, so edgeq cannot observe its activations",
        "Install the one that edgeq was tested with: pip install 'llama-cpp-python==0.3.36'",
    )


class Tensors:
    """Reads tensors of ggml by their address; only made where the layout is as expected.

    Args:
        head: the layout to read with; anything but `TensorHead` is for tests.

    Raises:
        ConversionError: this library lays ``ggml_tensor`` out in another way, or lacks a function.
    """

    def __init__(self, head: type[ctypes.Structure] = TensorHead) -> None:
        self._lib, self._head = _ggml(), head
        context = self._lib.ggml_init(_InitParams(_MEMORY_BYTES, None, False))
        if not context:
            raise _strange("gives no memory for a few tensors")
        try:
            for address, expected in _examples(self._lib, context):
                read = (self.type_id(address), self.shape(address), self._strides(address), self.sources(address))
                if read != expected:
                    raise _strange(f"lays ggml_tensor out in another way ({read} instead of {expected})")
        finally:
            self._lib.ggml_free(context)

    def name(self, address: int) -> str:
        """The tensor's name."""
        name: bytes = self._lib.ggml_get_name(address)
        return name.decode("utf-8", errors="surrogateescape")

    def operation(self, address: int) -> bytes:
        """What a node of a graph computes, such as ``b"MUL_MAT"``."""
        operation: bytes = self._lib.ggml_op_desc(address)
        return operation

    def type_id(self, address: int) -> int:
        """``enum ggml_type``."""
        return int(self._head.from_address(address).type)

    def shape(self, address: int) -> tuple[int, ...]:
        """Four sizes in ggml's order, the row length first."""
        return tuple(self._head.from_address(address).ne)

    def sources(self, address: int) -> tuple[int | None, ...]:
        """Addresses of the first three operands, None where there is none."""
        return tuple(self._head.from_address(address).src[:3])

    def _strides(self, address: int) -> tuple[int, ...]:
        return tuple(self._head.from_address(address).nb)

    def raw(self, address: int, n_bytes: int | None = None) -> npt.NDArray[np.uint8]:
        """A copy of a computed tensor's first bytes, from whatever memory it is in; of all that it spans by default."""
        spanned = int(self._lib.ggml_nbytes(address))
        out = np.empty(spanned if n_bytes is None else min(n_bytes, spanned), np.uint8)
        self._lib.ggml_backend_tensor_get(address, out.ctypes.data, 0, out.nbytes)
        return out

    def floats(self, address: int) -> npt.NDArray[np.float32]:
        """A copy of a computed F32 tensor, float32 of (ne3, ne2, ne1, ne0), with the strides that it has in ggml.

        Raises:
            ConversionError: it has another type.
        """
        self._check_type(address, _F32)
        shape, strides = self.shape(address)[::-1], self._strides(address)[::-1]
        array: npt.NDArray[np.float32] = np.ndarray(shape, np.float32, self.raw(address), strides=strides)
        return array

    def integers(self, address: int) -> npt.NDArray[np.int32]:
        """A copy of a computed I32 tensor, like `floats`."""
        self._check_type(address, _I32)
        shape, strides = self.shape(address)[::-1], self._strides(address)[::-1]
        array: npt.NDArray[np.int32] = np.ndarray(shape, np.int32, self.raw(address), strides=strides)
        return array

    def _check_type(self, address: int, type_id: int) -> None:
        found = self.type_id(address)
        if found != type_id:
            raise _strange(f"keeps {self.name(address)} in type {found} instead of {type_id}")


def _examples(lib: ctypes.CDLL, context: int) -> Iterator[tuple[int, tuple[object, ...]]]:
    """Addresses of tensors, and the type, shape, strides and first three sources that each has.

    The numbers differ, so that no field can be taken for its neighbour.
    """
    none = (None, None, None)
    matrix = lib.ggml_new_tensor_2d(context, _F16, 24, 5)
    yield matrix, (_F16, (24, 5, 1, 1), (2, 48, 240, 240), none)
    vectors = lib.ggml_new_tensor_2d(context, _F32, 24, 9)
    yield vectors, (_F32, (24, 9, 1, 1), (4, 96, 864, 864), none)
    product = lib.ggml_mul_mat(context, matrix, vectors)
    yield product, (_F32, (5, 9, 1, 1), (4, 20, 180, 180), (matrix, vectors, None))
    experts = lib.ggml_new_tensor_3d(context, _F16, 24, 6, 11)
    yield experts, (_F16, (24, 6, 11, 1), (2, 48, 288, 3168), none)
    routes = lib.ggml_new_tensor_2d(context, _I32, 2, 7)
    yield routes, (_I32, (2, 7, 1, 1), (4, 8, 56, 56), none)
    inputs = lib.ggml_new_tensor_3d(context, _F32, 24, 2, 7)
    routed = lib.ggml_mul_mat_id(context, experts, inputs, routes)
    yield routed, (_F32, (6, 2, 7, 1), (4, 24, 48, 336), (experts, inputs, routes))
