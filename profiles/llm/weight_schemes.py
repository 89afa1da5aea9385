"""Bytes that a decoded token reads of weights that are no GGUF, and how long a device takes for a token.

What an engine calls "4-bit" leaves open how large the scales are and whether the output matrix is quantized; in a small
model with a large vocabulary that is a factor of two in speed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from edgeq.errors import ProfileError, UsageError
from edgeq.ggml_types import ggml_type, tensor_bytes
from edgeq.profiles.device import Backend, DeviceProfile
from edgeq.profiles.llm.model_shape import EMBEDDING, OUTPUT, ModelShape
from edgeq.registry import nearest

__all__ = [
    "SCHEMES",
    "Grid",
    "WeightScheme",
    "decode_ms",
    "find_scheme",
    "ggml_read_bytes",
    "kv_read_bytes",
    "scheme_read_bytes",
]


@dataclasses.dataclass(frozen=True)
class Grid:
    """How the weights of a matrix are stored.

    Attributes:
        bits: of one weight.
        scale_bits: of one scale; 0 where there are none.
        group: neighbours of a row that share a scale; None for the whole row.
    """

    bits: int
    scale_bits: int = 0
    group: int | None = None

    def matrix_bytes(self, shape: tuple[int, ...]) -> float:
        """Bytes of a matrix in ggml's order, row length first. A last group that is not full has a scale too."""
        row, rows = shape[0], math.prod(shape[1:])
        scales = 1 if self.group is None else -(-row // self.group)
        return rows * (row * self.bits + scales * self.scale_bits) / 8


@dataclasses.dataclass(frozen=True)
class WeightScheme:
    """A quantization of a whole model, as an engine names it.

    Attributes:
        name: lower case.
        matrices: grid of all matrices of the blocks.
        output: grid of the output matrix, which is the embedding in a tied model.
        source: where its layout is written down.
    """

    name: str
    matrices: Grid
    output: Grid
    source: str


_HALF = Grid(16)
_INT4_GROUP_32 = Grid(4, 16, 32)

_ALL = (
    WeightScheme("fp16", _HALF, _HALF, "two bytes a weight"),
    WeightScheme(
        "int4_awq",
        Grid(4, 16, 128),
        _HALF,
        "TensorRT Edge-LLM: user guide, Quantization (lm_head_quantization defaults to None); Int4GroupwiseGemmPlugin "
        "(an FP16 scale for each group, no zero points); group_size 128 of ModelOpt's W4A16_AWQ",
    ),
    WeightScheme(
        "w4a16",
        Grid(4, 16, 128),
        _HALF,
        "compressed-tensors as RedHatAI publishes it for vLLM: symmetric, group_size 128, lm_head among ignore",
    ),
    WeightScheme(
        "q4f16_1",
        _INT4_GROUP_32,
        _INT4_GROUP_32,
        "MLC-LLM, python/mlc_llm/quantization/quantization.py: group_size 32, embedding and final fc quantized too",
    ),
    WeightScheme(
        "q4f16_ft",
        Grid(4, 16),
        _INT4_GROUP_32,
        "MLC-LLM, python/mlc_llm/quantization/ft_quantization.py: a scale for each channel, final fc as in q4f16_1",
    ),
)

SCHEMES: dict[str, WeightScheme] = {scheme.name: scheme for scheme in _ALL}


def find_scheme(name: str) -> WeightScheme:
    """The scheme of that name, in any case. Raises UsageError with the nearest names."""
    found = SCHEMES.get(name.lower())
    if found is None:
        close = nearest(name, list(SCHEMES)) or list(SCHEMES)
        raise UsageError(f"{name!r} is no weight scheme", f"Choose one of {', '.join(close)}")
    return found


def _read_tensors(shape: ModelShape) -> Mapping[str, tuple[int, ...]]:
    """All that a token reads: the embedding only where it is the output matrix too, else one row of it."""
    return {name: dims for name, dims in shape.tensors.items() if name != EMBEDDING or shape.tied_embedding}


def scheme_read_bytes(shape: ModelShape, scheme: WeightScheme) -> float:
    """Bytes of weights that a decoded token reads; vectors are FP16."""
    total = 0.0
    for name, dims in _read_tensors(shape).items():
        grid = scheme.output if name in (EMBEDDING, OUTPUT) else scheme.matrices
        total += (_HALF if len(dims) == 1 else grid).matrix_bytes(dims)
    return total


def ggml_read_bytes(shape: ModelShape, types: Mapping[str, str]) -> int:
    """As `scheme_read_bytes`, for the tensor types of a GGUF."""
    return sum(tensor_bytes(types[name], dims) for name, dims in _read_tensors(shape).items())


def kv_read_bytes(shape: ModelShape, context_tokens: int, kv_type: str = "f16") -> int:
    """Bytes of keys and values that a token reads when so many tokens lie before it; windows are honoured."""
    kind = ggml_type(kv_type)
    return sum(
        min(context_tokens, layer.window or context_tokens)
        * (kind.row_bytes(layer.key_width) + kind.row_bytes(layer.value_width))
        for layer in shape.layers
    )


def decode_ms(
    shape: ModelShape, profile: DeviceProfile, backend: Backend, *, weight_bytes: float, kv_bytes: float = 0.0
) -> float:
    """Milliseconds of one decoded token: the slower of memory and arithmetic, and overheads by token and by layer.

    Args:
        shape: the model.
        profile: the device, in its power mode.
        backend: one of the profile's that runs language models.
        weight_bytes: read for each token.
        kv_bytes: of the KV cache, read for each token.

    Raises:
        ProfileError: the profile does not say how fast the backend reads or computes.
    """
    if backend.decode_efficiency is None:
        raise ProfileError(
            f"{profile.name} does not say how fast {backend.name} decodes", "Add decode_efficiency to that backend"
        )
    memory_s = (weight_bytes + kv_bytes) / (profile.bandwidth_bytes_per_s * backend.decode_efficiency)
    weights = sum(math.prod(dims) for dims in _read_tensors(shape).values() if len(dims) > 1)
    compute_s = 2 * weights / profile.flops_per_s(backend)
    return 1e3 * max(memory_s, compute_s) + backend.token_overhead_ms + len(shape.layers) * backend.layer_overhead_ms
