"""How the inputs of matrices are correlated: sums of outer products, kept once for all matrices of the same input."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeq.errors import require_package

__all__ = ["MAX_CORRELATED", "Grams", "correlation", "correlation_bytes"]

Floats = npt.NDArray[np.float32]
Halves = npt.NDArray[np.float16]

# Inputs wider than this keep the diagonal only: correlations take n^2, and 4096 is 32 MB for each input.
MAX_CORRELATED = 4096


def correlation_bytes(row_lengths: Iterable[int]) -> int:
    """Memory for the correlations of these matrices' inputs, at most: twice in float32, and in half precision."""
    return sum(10 * n**2 for n in row_lengths if n <= MAX_CORRELATED)


def correlation(gram: Floats) -> Halves:
    """A sum of outer products scaled to ones on its diagonal, float16 of (n_columns, n_columns)."""
    scale = 1 / np.sqrt(np.maximum(np.diag(gram), np.finfo(np.float32).tiny))
    result: Halves = (gram * np.outer(scale, scale)).astype(np.float16)
    np.fill_diagonal(result, 1.0)
    return result


class Grams:
    """Sums of x^T x by matrix, while a text runs.

    Query, key and value multiply the same input, as do gate and up. In one pass through the model an input is known by
    the address of its node; which matrices share one is the same in every pass, so the first decides.

    Raises:
        MissingPackageError: scipy is not installed.
    """

    def __init__(self) -> None:
        blas: Any = require_package("scipy.linalg.blas", "convert", "to measure correlations")
        self._syrk = blas.ssyrk
        self._sums: dict[str, Floats] = {}
        self._leader: dict[str, str] = {}
        self._this_pass: dict[int, str] = {}

    def begin_pass(self) -> None:
        """Forget the addresses of the pass before."""
        self._this_pass.clear()

    def add(self, name: str, address: int, inputs: Floats) -> None:
        """Take in what a matrix is multiplied with; of matrices that share an input only the first adds.

        Args:
            name: of the matrix.
            address: of the input's node.
            inputs: float32 of (n_tokens, n_columns).
        """
        n_columns = inputs.shape[1]
        if n_columns > MAX_CORRELATED:
            return
        leader = self._leader.setdefault(name, self._this_pass.setdefault(address, name))
        if leader == name:
            if name not in self._sums:
                self._sums[name] = np.zeros((n_columns, n_columns), np.float32, order="F")
            # Half the products of a general multiplication, added in place: four times as fast for short passes.
            self._sums[name] = self._syrk(1.0, inputs.T, beta=1.0, c=self._sums[name], overwrite_c=True)

    def take_in(self, other: Grams) -> None:
        """Add the sums of other passes through the same model, which the other loses."""
        for name, leader in other._leader.items():
            self._leader.setdefault(name, leader)
        for name in list(other._sums):
            if name in self._sums:
                self._sums[name] += other._sums.pop(name)
            else:
                self._sums[name] = other._sums.pop(name)

    def correlations(self) -> dict[str, Halves]:
        """By matrix, one array for all that share an input; those that are too wide are absent. Ends the sums."""
        made = {leader: correlation(_mirrored(self._sums.pop(leader))) for leader in list(self._sums)}
        return {name: made[leader] for name, leader in self._leader.items()}


def _mirrored(upper: Floats) -> Floats:
    """The symmetric matrix of which BLAS computes one triangle."""
    whole: Floats = upper + np.triu(upper, 1).T
    return whole
