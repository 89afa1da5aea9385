"""Blocks of many mixes: mixes that are compared differ in few tensors, so each (tensor, type) is made once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from edgeq.converters.gguf.assemble import read_tensor
from edgeq.converters.gguf.sensitivity.evidence import Evidence
from edgeq.converters.gguf.sensitivity.matrix import Matrix
from edgeq.converters.gguf.sensitivity.workers import matrix_workers
from edgeq.ggml_types import tensor_bytes

__all__ = ["BlockStore"]

Bytes = npt.NDArray[np.uint8]

_LIMIT_BYTES = 1 << 29


class BlockStore:
    """Quantized tensors of one model, the most recently used ones kept in memory.

    Args:
        evidence: the weights, their importance and curvature.
        limit_bytes: of what is kept.
    """

    def __init__(self, evidence: Evidence, limit_bytes: int = _LIMIT_BYTES) -> None:
        self._evidence = evidence
        self._limit = limit_bytes
        self._kept: OrderedDict[tuple[str, str], Bytes] = OrderedDict()
        self._bytes = 0

    def prepare(self, types: Mapping[str, str], threads: int) -> None:
        """Make what `blocks` will be asked for, several tensors at once, as far as it can be kept."""
        tensors, room, missing = self._evidence.header.tensors, self._limit, []
        for key in ((name, kind) for name, kind in types.items() if kind != tensors[name].type):
            room -= tensor_bytes(key[1], tensors[key[0]].shape)
            if room < 0:
                break
            if key in self._kept:
                self._kept.move_to_end(key)
            else:
                missing.append(key)
        with matrix_workers(threads) as pool:
            for key, made in zip(missing, pool.map(lambda key: self._make(*key), missing), strict=True):
                self._keep(key, made)

    def blocks(self, name: str, kind: str) -> Bytes:
        """A tensor in a type, uint8 of (rows, row bytes); not to be written to."""
        header = self._evidence.header
        if kind == header.tensors[name].type:
            return read_tensor(header, name)
        key = name, kind
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        made = self._make(name, kind)
        self._keep(key, made)
        return made

    def _make(self, name: str, kind: str) -> Bytes:
        evidence = self._evidence
        curvature = evidence.curvatures.by_tensor[name]
        return Matrix.of(evidence.header, name, curvature, evidence.importance.get(name)).blocks(kind)

    def _keep(self, key: tuple[str, str], made: Bytes) -> None:
        self._kept[key] = made
        self._bytes += made.nbytes
        while self._bytes > self._limit and len(self._kept) > 1:
            _, dropped = self._kept.popitem(last=False)
            self._bytes -= dropped.nbytes
