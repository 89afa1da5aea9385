"""ggml's own functions, which llama-cpp-python does not bind: the library of llama.cpp links to them."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

from edgeq.errors import SessionError
from edgeq.llama_library import library

__all__ = ["InitParams", "TypeTraits", "ggml_call", "ggml_function"]


class InitParams(ctypes.Structure):
    """``struct ggml_init_params`` of ggml.h."""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class TypeTraits(ctypes.Structure):
    """The head of ``struct ggml_type_traits`` of ggml.h, as far as it is read."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.POINTER(ctypes.c_float), ctypes.c_int64)),
    )


# Pointers to what C alone looks into are plain addresses.
_P, _I, _L, _Z, _TEXT = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_size_t, ctypes.c_char_p
_F = ctypes.c_float
# Result and arguments of each function, from ggml.h and ggml-backend.h.
_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_init": (_P, (InitParams,)),
    "ggml_free": (None, (_P,)),
    "ggml_tensor_overhead": (_Z, ()),
    "ggml_graph_overhead_custom": (_Z, (_Z, ctypes.c_bool)),
    "ggml_get_type_traits": (ctypes.POINTER(TypeTraits), (_I,)),
    "ggml_quantize_chunk": (_Z, (_I, _P, _P, _L, _L, _L, _P)),
    "ggml_new_tensor_1d": (_P, (_P, _I, _L)),
    "ggml_new_tensor_2d": (_P, (_P, _I, _L, _L)),
    "ggml_new_tensor_3d": (_P, (_P, _I, _L, _L, _L)),
    "ggml_get_name": (_TEXT, (_P,)),
    "ggml_op_desc": (_TEXT, (_P,)),
    "ggml_nbytes": (_Z, (_P,)),
    "ggml_mul_mat": (_P, (_P, _P, _P)),
    "ggml_mul_mat_id": (_P, (_P, _P, _P, _P)),
    "ggml_mul_mat_set_hint": (None, (_P, _I)),
    "ggml_prec_set_acc": (ctypes.c_bool, (_P, _I)),
    "ggml_flash_attn_ext": (_P, (_P, _P, _P, _P, _P, _F, _F, _F)),
    "ggml_set_rows": (_P, (_P, _P, _P, _P)),
    "ggml_view_2d": (_P, (_P, _P, _L, _L, _Z, _Z)),
    "ggml_view_4d": (_P, (_P, _P, _L, _L, _L, _L, _Z, _Z, _Z, _Z)),
    "ggml_permute": (_P, (_P, _P, _I, _I, _I, _I)),
    "ggml_reshape_2d": (_P, (_P, _P, _L, _L)),
    "ggml_reshape_3d": (_P, (_P, _P, _L, _L, _L)),
    "ggml_new_graph_custom": (_P, (_P, _Z, ctypes.c_bool)),
    "ggml_build_forward_expand": (None, (_P, _P)),
    "ggml_backend_alloc_ctx_tensors_from_buft": (_P, (_P, _P)),
    "ggml_backend_buffer_free": (None, (_P,)),
    "ggml_backend_buft_name": (_TEXT, (_P,)),
    "ggml_backend_dev_backend_reg": (_P, (_P,)),
    "ggml_backend_dev_buffer_type": (_P, (_P,)),
    "ggml_backend_dev_by_type": (_P, (_I,)),
    "ggml_backend_dev_count": (_Z, ()),
    "ggml_backend_dev_get": (_P, (_Z,)),
    "ggml_backend_dev_init": (_P, (_P, _TEXT)),
    "ggml_backend_dev_supports_op": (ctypes.c_bool, (_P, _P)),
    "ggml_backend_dev_type": (_I, (_P,)),
    "ggml_backend_free": (None, (_P,)),
    "ggml_backend_graph_compute": (_I, (_P, _P)),
    "ggml_backend_reg_get_proc_address": (_P, (_P, _TEXT)),
    "ggml_backend_tensor_get": (None, (_P, _P, _Z, _Z)),
    "ggml_backend_tensor_set": (None, (_P, _P, _Z, _Z)),
}


@functools.cache
def ggml_function(name: str) -> Callable[..., Any]:
    """A function of ggml with its signature; it releases the GIL. Pointers are integers, None for NULL.

    Args:
        name: one that this module lists.

    Raises:
        SessionError: the installed llama.cpp lacks it.
        MissingPackageError: llama-cpp-python is not installed.
    """
    result, arguments = _SIGNATURES[name]
    lib: ctypes.CDLL = library()._lib  # noqa: SLF001 - the bindings have no public name for their handle
    try:
        function = lib[name]  # a new object, so that nobody else's argument types are changed
    except AttributeError as error:
        raise SessionError(
            f"this llama.cpp has no {name}",
            "Install a llama-cpp-python that edgeq was tested with: pip install 'llama-cpp-python==0.3.36'",
        ) from error
    function.restype, function.argtypes = result, arguments
    return function


def ggml_call(name: str, *arguments: Any) -> Any:  # noqa: ANN401 - ctypes
    """The result of `ggml_function`."""
    return ggml_function(name)(*arguments)
