"""``struct ggml_tensor`` read from Python, after it was seen to be laid out as this module believes.

Nodes of a graph reach a callback as bare pointers. What ggml has functions for (name, operation, data) is asked of
ggml; only type, shape, strides and sources are read from memory, for which it has none.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from edgeq.errors import ConversionError
from edgeq.ggml_library import InitParams, ggml_call, ggml_function

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
        ConversionError: this library lays ``ggml_tensor`` out in another way.
        SessionError: it lacks a function.
    """

    def __init__(self, head: type[ctypes.Structure] = TensorHead) -> None:
        self._head = head
        # Taken here, since the callback that reads with them must not raise.
        self._get_name, self._op_desc = ggml_function("ggml_get_name"), ggml_function("ggml_op_desc")
        self._nbytes, self._get = ggml_function("ggml_nbytes"), ggml_function("ggml_backend_tensor_get")
        context = ggml_call("ggml_init", InitParams(_MEMORY_BYTES, None, False))
        if not context:
            raise _strange("gives no memory for a few tensors")
        try:
            for address, expected in _examples(context):
                read = (self.type_id(address), self.shape(address), self._strides(address), self.sources(address))
                if read != expected:
                    raise _strange(f"lays ggml_tensor out in another way ({read} instead of {expected})")
        finally:
            ggml_call("ggml_free", context)

    def name(self, address: int) -> str:
        """The tensor's name."""
        name: bytes = self._get_name(address)
        return name.decode("utf-8", errors="surrogateescape")

    def operation(self, address: int) -> bytes:
        """What a node of a graph computes, such as ``b"MUL_MAT"``."""
        operation: bytes = self._op_desc(address)
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
        spanned = int(self._nbytes(address))
        out = np.empty(spanned if n_bytes is None else min(n_bytes, spanned), np.uint8)
        self._get(address, out.ctypes.data, 0, out.nbytes)
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


def _examples(context: int) -> Iterator[tuple[int, tuple[object, ...]]]:
    """Addresses of tensors, and the type, shape, strides and first three sources that each has.

    The numbers differ, so that no field can be taken for its neighbour.
    """
    none = (None, None, None)
    matrix = ggml_call("ggml_new_tensor_2d", context, _F16, 24, 5)
    yield matrix, (_F16, (24, 5, 1, 1), (2, 48, 240, 240), none)
    vectors = ggml_call("ggml_new_tensor_2d", context, _F32, 24, 9)
    yield vectors, (_F32, (24, 9, 1, 1), (4, 96, 864, 864), none)
    product = ggml_call("ggml_mul_mat", context, matrix, vectors)
    yield product, (_F32, (5, 9, 1, 1), (4, 20, 180, 180), (matrix, vectors, None))
    experts = ggml_call("ggml_new_tensor_3d", context, _F16, 24, 6, 11)
    yield experts, (_F16, (24, 6, 11, 1), (2, 48, 288, 3168), none)
    routes = ggml_call("ggml_new_tensor_2d", context, _I32, 2, 7)
    yield routes, (_I32, (2, 7, 1, 1), (4, 8, 56, 56), none)
    inputs = ggml_call("ggml_new_tensor_3d", context, _F32, 24, 2, 7)
    routed = ggml_call("ggml_mul_mat_id", context, experts, inputs, routes)
    yield routed, (_F32, (6, 2, 7, 1), (4, 24, 48, 336), (experts, inputs, routes))
