"""The one handle to ggml: signatures of edgeq's own, and one line where a function is missing."""

from __future__ import annotations

import ctypes

import pytest

from edgeq import ggml_library
from edgeq.errors import SessionError
from edgeq.ggml_library import ggml_call, ggml_function
from edgeq.llama_library import library


def test_every_function_is_there() -> None:
    for name in ggml_library._SIGNATURES:
        assert ggml_function(name) is ggml_function(name)


def test_strings_and_sizes_come_back_as_they_are() -> None:
    traits = ggml_call("ggml_get_type_traits", 2).contents
    assert traits.type_name == b"q4_0"
    assert ggml_call("ggml_tensor_overhead") > ctypes.sizeof(ctypes.c_void_p)


def test_signatures_of_others_stay_as_they_are() -> None:
    shared = library()._lib.ggml_free
    before = shared.argtypes
    assert ggml_function("ggml_free") is not shared
    assert shared.argtypes is before


def test_a_missing_function_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ggml_library._SIGNATURES, "ggml_of_tomorrow", (None, ()))
    with pytest.raises(SessionError, match=r"no ggml_of_tomorrow\. Install .*llama-cpp-python==") as error:
        ggml_call("ggml_of_tomorrow")
    assert "\n" not in str(error.value)
