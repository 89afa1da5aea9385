from __future__ import annotations

import numpy as np
import pytest

from edgeq.converters.gguf.assemble import read_tensor
from edgeq.converters.gguf.header import GgufHeader
from edgeq.converters.gguf.sensitivity import matrix as matrix_module
from edgeq.converters.gguf.sensitivity.curvature import Curvature, Curvatures
from edgeq.converters.gguf.sensitivity.matrix import Matrix
from edgeq.ggml_blocks import dequantize, quantize_rows

NAME = "blk.0.ffn_down.weight"


@pytest.fixture
def correlated(wide: GgufHeader, made_up: Curvatures) -> Matrix:
    curvature = made_up.by_tensor[NAME]
    return Matrix.of(wide, NAME, curvature, curvature.columns + np.float32(0.01))


def test_parts_are_all_rows_in_order(wide: GgufHeader, correlated: Matrix, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix_module, "CHUNK_WEIGHTS", 50 * 512)
    parts = list(correlated.parts())
    assert [start for start, _ in parts] == [0, 50, 100, 150, 200, 250]
    whole = np.concatenate([weights for _, weights in parts])
    assert np.array_equal(whole, dequantize(read_tensor(wide, NAME), "f16", 512))
    picked = np.array([255, 3, 3])
    assert np.array_equal(correlated.rows(picked), whole[picked])
    assert correlated.n_weights == whole.size == 256 * 512


@pytest.mark.parametrize("kind", ["q4_0", "q4_k", "iq3_s", "bf16"])
def test_blocks_are_the_parts_that_were_priced(kind: str, correlated: Matrix, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix_module, "CHUNK_WEIGHTS", 50 * 512)
    blocks, refined = (correlated.blocks(kind, refined=refined) for refined in (False, True))
    costs = [0.0, 0.0]
    for start, weights in correlated.parts():
        part = blocks[start : start + len(weights)]
        assert np.array_equal(part, correlated.quantize(weights, kind))
        errors = dequantize(part, kind, 512) - weights
        assert np.array_equal(errors, correlated.errors(weights, kind))
        fewer = dequantize(refined[start : start + len(weights)], kind, 512) - weights
        for index, found in enumerate((errors, fewer)):
            costs[index] += correlated.curvature.weight_kld(found, start, correlated.column_matrix)
    assert costs[1] == costs[0] if kind == "bf16" else costs[1] < costs[0], "what is written is a little better"


def test_the_stored_type_is_a_copy_of_the_file(wide: GgufHeader, correlated: Matrix) -> None:
    assert np.array_equal(correlated.blocks("f16"), read_tensor(wide, NAME))
    assert not correlated.errors(correlated.rows(np.arange(4)), "f16").any()


def test_without_correlations_rows_are_rounded_as_ggml_rounds_them(wide: GgufHeader, made_up: Curvatures) -> None:
    c = made_up.by_tensor[NAME]
    diagonal = Matrix.of(wide, NAME, Curvature(c.rows, c.columns, {}), c.columns)
    assert (diagonal.compensations, diagonal.column_matrix) == ({}, None)
    weights = diagonal.rows(np.arange(20))
    assert np.array_equal(diagonal.quantize(weights, "q4_k"), quantize_rows(weights, "q4_k", c.columns))


@pytest.mark.parametrize("kind", ["q4_0", "q4_k", "iq4_nl"])
def test_compensation_pays_by_its_own_measure(kind: str, wide: GgufHeader, correlated: Matrix) -> None:
    c = correlated.curvature
    plain = Matrix.of(wide, NAME, Curvature(c.rows, c.columns, {}), correlated.importance)
    weights = correlated.rows(np.arange(256))
    costs = [c.weight_kld(m.errors(weights, kind), 0, correlated.column_matrix) for m in (correlated, plain)]
    assert costs[0] < 0.9 * costs[1]
