from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeq.converters.gguf.sensitivity.curvature import Curvature, activation_block
from edgeq.ggml_types import TYPES


def _curvature(seed: int, n_rows: int = 5, n_columns: int = 8, *, correlated: bool = True) -> Curvature:
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((40, n_columns)) @ rng.standard_normal((n_columns, n_columns))
    gram = inputs.T @ inputs
    scale = np.sqrt(np.diag(gram))
    correlation = (gram / scale / scale[:, None]).astype(np.float16)
    np.fill_diagonal(correlation, 1.0)
    rows, columns = (rng.gamma(1.0, size=n).astype(np.float32) for n in (n_rows, n_columns))
    return Curvature(rows, columns, {}, correlation if correlated else None)


@given(st.integers(0, 1000), st.booleans())
def test_nats_are_half_the_quadratic_form_of_the_kronecker_product(seed: int, correlated: bool) -> None:
    curvature = _curvature(seed, correlated=correlated)
    errors = np.random.default_rng(seed + 1).standard_normal((5, 8)).astype(np.float32)
    columns = curvature.column_matrix().astype(np.float64)
    whole = np.kron(np.diag(curvature.rows), columns)
    expected = 0.5 * errors.ravel().astype(np.float64) @ whole @ errors.ravel()
    assert curvature.weight_kld(errors, 0, curvature.column_matrix()) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    diagonal = 0.5 * float(np.diag(whole) @ np.square(errors.ravel()))
    assert curvature.weight_kld(errors) == pytest.approx(diagonal, rel=1e-4)
    parts = [curvature.weight_kld(errors[a:b], a, columns.astype(np.float32)) for a, b in ((0, 2), (2, 3), (3, 5))]
    assert sum(parts) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_the_column_matrix_has_the_columns_on_its_diagonal() -> None:
    for curvature in (_curvature(1, correlated=False), _curvature(1)):
        matrix = curvature.column_matrix()
        assert np.diag(matrix) == pytest.approx(curvature.columns, rel=1e-6)
        assert matrix == pytest.approx(matrix.T, rel=1e-5)
        assert matrix.dtype == np.float32
    assert np.count_nonzero(_curvature(1, correlated=False).column_matrix()) == 8
    assert np.array_equal(curvature.column_matrix(), curvature.column_matrix()), "the correlations are not written to"


@pytest.mark.parametrize("name", TYPES)
def test_activations_are_rounded_in_the_blocks_of_the_kernels(name: str) -> None:
    kind = TYPES[name]
    expected = 0 if kind.is_float else kind.block_weights
    assert activation_block(name, "cpu") == expected
    assert activation_block(name, "cuda:sm_87") == min(expected, 32)
