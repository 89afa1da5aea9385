"""Curvatures made up for a tiny model, where only the arithmetic on them is tested."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgeq.converters.gguf.header import GgufHeader, read_header
from edgeq.converters.gguf.quantize import quantizable_tensors
from edgeq.converters.gguf.sensitivity.curvature import Curvature, Curvatures

KINDS = ("f16", "q4_0", "q8_0", "q4_k", "iq3_s")


@pytest.fixture(scope="session")
def wide(tiny_hf: Callable[..., Path]) -> GgufHeader:
    """A tied llama whose rows of 256 and 512 weights take every type."""
    return read_header(tiny_hf("llama-tied", width=256).with_suffix(".gguf"))


@pytest.fixture(scope="session")
def menu(wide: GgufHeader) -> dict[str, tuple[str, ...]]:
    """Some types for every matrix."""
    free = quantizable_tensors(wide.path)
    return {name: KINDS for name in wide.tensors if name in free}


@pytest.fixture(scope="session")
def made_up(wide: GgufHeader, menu: dict[str, tuple[str, ...]]) -> Curvatures:
    """Curvatures with correlations, but for the embedding, as the estimator fisher gives them."""
    rng = np.random.default_rng(11)

    def curvature(name: str) -> Curvature:
        n_columns, n_rows = wide.tensors[name].shape
        inputs = rng.standard_normal((300, n_columns)) + rng.standard_normal((300, 1))
        correlation = np.corrcoef(inputs.T).astype(np.float16)
        np.fill_diagonal(correlation, 1.0)
        rows, columns = (rng.gamma(0.3, size=n).astype(np.float32) for n in (n_rows, n_columns))
        correlated = name != "token_embd.weight"
        return Curvature(rows, columns, {32: 1e-4, 256: 3e-4}, correlation if correlated else None)

    return Curvatures({name: curvature(name) for name in menu}, "fisher", 1000, "made up")
