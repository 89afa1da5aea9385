"""The kernels' products against numpy on weights that the gguf package dequantized."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import gguf
import gguf.quants
import numpy as np
import pytest

from edgeq.errors import SessionClosedError, UsageError
from edgeq.ggml_backend import CpuBackend
from edgeq.ggml_blocks import quantize_rows
from edgeq.ggml_kernels import Matrices, MatrixSet
from edgeq.ggml_types import TYPES, ggml_type

COLUMNS, ROWS = 512, 64
# Half a unit in the last place of the 8-bit vector, over random signs; bf16 keeps 8 bits of the vector too.
TOLERANCE = 0.02


@pytest.fixture(scope="module")
def backend() -> Iterator[CpuBackend]:
    with CpuBackend(1) as made:
        yield made


def random_rows(n_rows: int = ROWS, columns: int = COLUMNS) -> np.ndarray:
    return np.random.default_rng(7).standard_normal((n_rows, columns), np.float32)


def vector(columns: int = COLUMNS) -> np.ndarray:
    return np.random.default_rng(8).standard_normal(columns, np.float32)


def dequantized(blocks: np.ndarray, name: str) -> np.ndarray:
    kind = gguf.GGMLQuantizationType(ggml_type(name).id)
    data = blocks.view({"f32": np.float32, "f16": np.float16}.get(name, np.uint8))
    return np.asarray(gguf.quants.dequantize(data, kind), np.float32)


# iq1 and iq2 take ggml seconds of table building to quantize to; test_sample_weights covers their kernels.
@pytest.mark.parametrize("name", [name for name in TYPES if not name.startswith(("iq1", "iq2"))])
@pytest.mark.parametrize("use_extra_bufts", [True, False])
def test_product_is_that_of_the_dequantized_weights(backend: CpuBackend, name: str, use_extra_bufts: bool) -> None:
    blocks = quantize_rows(random_rows(), name, np.ones(COLUMNS, np.float32))
    kinds = [Matrices(name, (COLUMNS, ROWS), blocks, copies=2)]
    with MatrixSet(backend, kinds, use_extra_bufts=use_extra_bufts) as matrices:
        matrices.set_vector(0, vector())
        matrices.compute(0)
        expected = dequantized(blocks, name) @ vector()
        for copy in range(2):
            error = np.abs(matrices.product(0, copy) - expected)
            assert error.max() < TOLERANCE * np.linalg.norm(vector())
        assert use_extra_bufts or matrices.buffers == ("CPU",)


def test_extra_buffers_are_those_that_llama_cpp_loads_weights_into(backend: CpuBackend) -> None:
    # On every x86-64 with AVX2 and every ARM with dot products, llama.cpp repacks Q4_0 if its rows come in eights.
    if not {"avx2", "asimddp"} & set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split()):
        pytest.skip("a CPU that llama.cpp may have no other layout for")
    rows = random_rows(63)
    kinds = [Matrices("q4_0", (COLUMNS, n), quantize_rows(rows, "q4_0")) for n in (64, 63)]
    with MatrixSet(backend, [*kinds, Matrices("f32", (COLUMNS, 64), quantize_rows(rows, "f32"))]) as matrices:
        assert matrices.buffers[0] != "CPU"
        assert matrices.buffers[1:] == ("CPU", "CPU")
        for kind in range(3):
            matrices.set_vector(kind, vector())
            matrices.compute(kind)
        assert np.allclose(matrices.product(0, 0)[:63], matrices.product(1, 0), atol=1e-4)
        assert np.corrcoef(matrices.product(2, 0), matrices.product(0, 0))[0, 1] > 0.98


def test_short_blocks_are_repeated(backend: CpuBackend) -> None:
    with MatrixSet(backend, [Matrices("f32", (COLUMNS, 5), quantize_rows(random_rows(2), "f32"))]) as matrices:
        matrices.set_vector(0, vector())
        matrices.compute(0)
        product = matrices.product(0, 0)
    assert product[0] == product[2] == product[4] != product[1]
    assert product[1] == product[3]


def test_threads_give_the_same_product() -> None:
    kinds = [Matrices("q8_0", (COLUMNS, ROWS), quantize_rows(random_rows(), "q8_0"))]
    products: list[np.ndarray] = []
    for threads in (1, 2):
        with CpuBackend(threads) as backend, MatrixSet(backend, kinds) as matrices:
            matrices.set_vector(0, vector())
            matrices.compute(0)
            products.append(matrices.product(0, 0))
    assert np.array_equal(products[0], products[1])


def test_blocks_that_do_not_fit_are_refused(backend: CpuBackend) -> None:
    good = quantize_rows(random_rows(4), "q4_0")
    with pytest.raises(UsageError, match="multiple of 256"):
        MatrixSet(backend, [Matrices("q6_k", (576, 4), good)])
    for wrong in (Matrices("q4_0", (COLUMNS, 3), good), Matrices("q4_1", (COLUMNS, 4), good)):
        with pytest.raises(ValueError, match="blocks of"):
            MatrixSet(backend, [wrong])
    with pytest.raises(UsageError, match="not a tensor type"):
        MatrixSet(backend, [Matrices("q4_9", (COLUMNS, 4), good)])
    with pytest.raises(UsageError, match="threads"):
        CpuBackend(0)


def test_vectors_of_another_length_are_refused(backend: CpuBackend) -> None:
    matrices = MatrixSet(backend, [Matrices("q4_0", (COLUMNS, 8), quantize_rows(random_rows(8), "q4_0"))])
    with pytest.raises(ValueError, match="vectors of"):
        matrices.set_vector(0, vector(COLUMNS - 1))
    matrices.close()
    with pytest.raises(SessionClosedError):
        matrices.compute(0)
    with pytest.raises(SessionClosedError):
        matrices.product(0, 0)


def test_closing_the_backend_closes_its_matrices() -> None:
    backend = CpuBackend(1)
    matrices = MatrixSet(backend, [Matrices("q4_0", (COLUMNS, 8), quantize_rows(random_rows(8), "q4_0"))])
    backend.close()
    assert matrices.closed


@pytest.mark.parametrize(
    "name", ["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_1", "q6_k", "q4_k", "iq4_nl", "iq3_s"]
)
@pytest.mark.parametrize("batch", [2, 16, 33])
def test_products_of_a_batch_are_those_of_the_dequantized_weights(backend: CpuBackend, name: str, batch: int) -> None:
    blocks = quantize_rows(random_rows(), name, np.ones(COLUMNS, np.float32))
    vectors = np.random.default_rng(9).standard_normal((batch, COLUMNS), np.float32)
    with MatrixSet(backend, [Matrices(name, (COLUMNS, ROWS), blocks, copies=2, batch=batch)]) as matrices:
        matrices.set_vectors(0, vectors)
        matrices.compute(0)
        expected = vectors @ dequantized(blocks, name).T
        for copy in range(2):
            error = matrices.products(0, copy) - expected
            assert np.linalg.norm(error) < TOLERANCE * np.linalg.norm(expected)
        assert np.array_equal(matrices.product(0, 1), matrices.products(0, 1)[0])
        with pytest.raises(ValueError, match="vectors of"):
            matrices.set_vectors(0, vectors[1:])


def test_a_batch_holds_a_vector() -> None:
    blocks = quantize_rows(random_rows(4), "q4_0")
    with CpuBackend(1) as backend, pytest.raises(ValueError, match="0 vectors"):
        MatrixSet(backend, [Matrices("q4_0", (COLUMNS, 4), blocks, batch=0)])
