"""Blocks made and read by ggml through ctypes, against the gguf package's own arithmetic."""

from __future__ import annotations

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGMLQuantizationType, quants
from hypothesis import given
from hypothesis import strategies as st

from edgeq.errors import ConversionError
from edgeq.ggml_blocks import dequantize, quantize_rows
from edgeq.ggml_library import ggml_call
from edgeq.ggml_types import TYPES

# iq1_s and iq1_m are on no menu, and ggml takes five seconds to make their tables.
KINDS = {name: kind for name, kind in TYPES.items() if not name.startswith("iq1")}
# What the gguf package rounds as ggml does, to the byte.
SAME_BYTES = ["q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "bf16"]


def _rows(n_rows: int = 6, n_columns: int = 512, seed: int = 0, scale: float = 0.1) -> npt.NDArray[np.float32]:
    return (scale * np.random.default_rng(seed).standard_normal((n_rows, n_columns))).astype(np.float32)


def _ones(n_columns: int = 512) -> npt.NDArray[np.float32]:
    return np.ones(n_columns, np.float32)


@pytest.mark.parametrize("name", KINDS)
def test_blocks_are_read_as_the_gguf_package_reads_them(name: str) -> None:
    blocks = quantize_rows(_rows(), name, _ones())
    assert blocks.shape == (6, TYPES[name].row_bytes(512))
    expected = quants.dequantize(blocks, GGMLQuantizationType[name.upper()]).reshape(6, 512)
    found = dequantize(blocks, name, 512)
    assert found.dtype == np.float32
    # The package computes in another order; half an ulp of the largest weight is all that may differ.
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", SAME_BYTES)
def test_blocks_are_those_of_the_gguf_package(name: str) -> None:
    rows = _rows(n_columns=64)
    expected = quants.quantize(rows, GGMLQuantizationType[name.upper()])
    assert np.array_equal(quantize_rows(rows, name), np.ascontiguousarray(expected).view(np.uint8).reshape(6, -1))


@pytest.mark.parametrize("name", KINDS)
def test_every_type_comes_back_about_as_it_was(name: str) -> None:
    rows = _rows(seed=1)
    error = dequantize(quantize_rows(rows, name, _ones()), name, 512) - rows
    relative = float(np.square(error).mean() / np.square(rows).mean())
    # A bit more halves the error: a quarter of its square. Of floats only the significand counts.
    bits = {"f32": 24, "f16": 11, "bf16": 8}.get(name, TYPES[name].bits_per_weight)
    assert relative < 6.0 * 4.0**-bits
    assert (relative == 0.0) == (name == "f32")


@pytest.mark.parametrize("name", ["f16", "bf16", "f32"])
def test_floats_on_their_own_grid_stay_exact(name: str) -> None:
    rows = dequantize(quantize_rows(_rows(), name), name, 512)
    assert np.array_equal(dequantize(quantize_rows(rows, name), name, 512), rows)


@given(st.integers(0, 10_000), st.sampled_from(["q4_0", "q4_k", "iq4_nl", "q3_k", "iq3_s"]))
def test_importance_moves_the_error_to_columns_that_matter_less(seed: int, name: str) -> None:
    rows = _rows(32, seed=seed)
    weights = np.where(np.arange(512) % 2 == 0, 100.0, 1.0).astype(np.float32)
    plain, weighted = (
        np.square(dequantize(quantize_rows(rows, name, w), name, 512) - rows) @ weights for w in (_ones(), weights)
    )
    assert weighted.sum() < plain.sum()


def test_rows_are_independent_and_may_be_strided() -> None:
    rows = _rows(8)
    whole = quantize_rows(rows, "q4_k", _ones())
    assert np.array_equal(whole[3:5], quantize_rows(rows[3:5], "q4_k", _ones()))
    spread = np.zeros((8, 1024), np.float32)
    spread[:, ::2] = rows
    assert np.array_equal(quantize_rows(spread[:, ::2], "q4_k", _ones()), whole)


def test_what_ggml_would_end_the_process_for_is_refused() -> None:
    needing = [name for name, kind in TYPES.items() if kind.needs_imatrix]
    assert len(needing) == 6
    for name in needing:
        with pytest.raises(ConversionError, match=f"{name} needs an importance matrix"):
            quantize_rows(_rows(), name)
    for name, width in (("q4_0", 48), ("q4_k", 128)):
        with pytest.raises(ValueError, match=f"rows of {width} weights"):
            quantize_rows(_rows(n_columns=width), name)
    with pytest.raises(ValueError, match="importance of"):
        quantize_rows(_rows(), "q4_0", _ones(256))


def test_the_bindings_head_of_the_type_traits_is_ggmls() -> None:
    """`dequantize` takes a function's address from the structure: its other fields say whether that is the place."""
    for name, kind in TYPES.items():
        traits = ggml_call("ggml_get_type_traits", kind.id).contents
        assert traits.type_name.decode().lower() == name
        assert (traits.blck_size, traits.type_size) == (kind.block_weights, kind.block_bytes)
        assert traits.is_quantized == (not kind.is_float)
    assert gguf.GGML_QUANT_SIZES[GGMLQuantizationType.Q4_K] == (256, 144)
