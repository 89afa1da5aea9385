from __future__ import annotations

import ctypes

import pytest

from edgeq.errors import UsageError
from edgeq.ggml_types import TYPES, GgmlType, ggml_type, ggml_type_by_id, tensor_bytes


@pytest.fixture(scope="module")
def ggml() -> ctypes.CDLL:
    llama_cpp = pytest.importorskip("llama_cpp.llama_cpp")
    library: ctypes.CDLL = llama_cpp._lib
    library.ggml_type_name.restype = ctypes.c_char_p
    library.ggml_blck_size.restype = ctypes.c_int64
    library.ggml_type_size.restype = ctypes.c_size_t
    return library


@pytest.mark.parametrize("kind", TYPES.values(), ids=lambda kind: kind.name)
def test_every_row_is_what_ggml_says(ggml: ctypes.CDLL, kind: GgmlType) -> None:
    assert ggml.ggml_type_name(kind.id).decode().lower() == kind.name
    assert ggml.ggml_blck_size(kind.id) == kind.block_weights
    assert ggml.ggml_type_size(kind.id) == kind.block_bytes


def test_lookup() -> None:
    assert ggml_type("Q4_K").name == "q4_k"
    assert ggml_type_by_id(8) is TYPES["q8_0"]
    assert ggml_type_by_id(999) is None
    with pytest.raises(UsageError, match="q4_k"):
        ggml_type("q4k")


def test_sizes() -> None:
    assert tensor_bytes("q8_0", (576, 49152)) == 576 // 32 * 34 * 49152
    assert not TYPES["q4_k"].fits(576)
    assert TYPES["q4_0"].fits(576)
    assert TYPES["q4_k"].bits_per_weight == 4.5
