"""Random weights that are valid in every type, with kernels that agree about them."""

from __future__ import annotations

import gguf
import gguf.quants
import numpy as np
import pytest

from edgeq.ggml_backend import CpuBackend
from edgeq.ggml_kernels import Matrices, MatrixSet
from edgeq.ggml_types import TYPES, GgmlType
from edgeq.profiles.kernels.sample_weights import sample_blocks, sample_vector

COLUMNS = 512


@pytest.mark.parametrize("kind", list(TYPES.values()), ids=list(TYPES))
def test_samples_are_finite_weights_of_about_the_same_size(kind: GgmlType) -> None:
    blocks = sample_blocks(kind, COLUMNS)
    assert blocks.shape == (128, kind.row_bytes(COLUMNS))
    data = blocks.view({"f32": np.float32, "f16": np.float16}.get(kind.name, np.uint8))
    weights = np.asarray(gguf.quants.dequantize(data, gguf.GGMLQuantizationType(kind.id)), np.float32)
    assert weights.shape == (128, COLUMNS)
    assert np.isfinite(weights).all()
    assert 1e-3 < weights.std() < 10
    assert len(np.unique(weights.std(axis=1))) > 100
    vector = sample_vector(COLUMNS)
    with (
        CpuBackend(1) as backend,
        MatrixSet(backend, [Matrices(kind.name, (COLUMNS, 64), blocks[:64])]) as matrices,
    ):
        matrices.set_vector(0, vector)
        matrices.compute(0)
        error = matrices.product(0, 0) - weights[:64] @ vector
    assert np.abs(error).max() < 0.02 * np.linalg.norm(vector) * np.abs(weights).max()


def test_scales_vary_as_in_a_model() -> None:
    scales = sample_blocks(TYPES["q8_0"], COLUMNS).reshape(-1, 34)[:, :2].copy().view(np.float16)
    assert 0.26 < np.log2(scales.astype(np.float64)).std() < 0.6
