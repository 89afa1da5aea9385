"""Random weights on which ggml's kernels take the time that they take on a trained model's."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edgeq.ggml_blocks import quantize_rows
from edgeq.ggml_types import GgmlType

__all__ = ["sample_blocks", "sample_vector"]

Floats = npt.NDArray[np.float32]

_SAMPLE_WEIGHTS = 1 << 16
_VECTOR_BLOCK = 32  # ggml quantizes the vector in such blocks, most types
_SLOW_TO_QUANTIZE = ("iq1", "iq2", "iq3")  # by their first letters: ggml builds and searches large tables


def sample_blocks(kind: GgmlType, columns: int) -> npt.NDArray[np.uint8]:
    """Rows of random weights whose blocks differ in scale as a trained model's do, always the same.

    ggml looks float16 scales up in a table of 256 KiB: with a few scales only, whose entries stay in the nearest cache,
    Q4_1 and its like would seem up to a third faster than they are.

    Args:
        kind: of the weights.
        columns: a multiple of its block.

    Returns:
        uint8 of (rows, bytes of a row), about 65,536 weights.
    """
    random = np.random.default_rng(0)
    n_rows = -(-_SAMPLE_WEIGHTS // columns)
    scales = _spread_scales(random, n_rows * columns // kind.block_weights)
    if not kind.name.startswith(_SLOW_TO_QUANTIZE):
        weights = random.standard_normal((len(scales), kind.block_weights), np.float32) * scales[:, None]
        return quantize_rows(weights.reshape(n_rows, columns), kind.name, np.ones(columns, np.float32))
    # Any bits are valid but the scale's, a float16: first in the block, in iq1_m the high nibbles of its last words.
    blocks = random.integers(0, 256, (len(scales), kind.block_bytes), np.uint8)
    halves = scales.astype("<f2").view("<u2")
    if kind.name == "iq1_m":
        words = blocks[:, -8:].copy().view("<u2") & 0x0FFF
        for index in range(4):
            words[:, index] |= (halves >> 4 * index & 0xF) << 12
        blocks[:, -8:] = words.view(np.uint8)
    else:
        blocks[:, :2] = halves[:, None].view(np.uint8)
    return blocks.reshape(n_rows, -1)


def sample_vector(columns: int) -> Floats:
    """A vector whose blocks differ in scale too, float32 of (columns,)."""
    random = np.random.default_rng(1)
    scales = np.repeat(_spread_scales(random, -(-columns // _VECTOR_BLOCK)), _VECTOR_BLOCK)
    return random.standard_normal(columns, np.float32) * scales[:columns]


def _spread_scales(random: np.random.Generator, count: int) -> Floats:
    """Scales about 0.04; with the largest of a block they spread as in SmolLM2's matrices (0.26 to 0.6 octaves)."""
    return (0.04 * np.exp(0.2 * random.standard_normal(count))).astype(np.float32)
