"""Times of a language model on a device: a decoded token, and a prompt.

A matrix takes the longer of reading its weights and of computing with them, once for a decoded token and once for every
chunk of a prompt; attention reads the cached keys and values; every layer and every token has a cost of its own. What
each of them takes comes from the probe where there is one (`edgeq.profiles.measured`), else from the profile's
bandwidth and throughput.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

from msgspec.structs import replace

from edgeq.ggml_types import ggml_type
from edgeq.probe_points import AttentionPoint, MatmulPoint
from edgeq.profiles.device import DeviceProfile
from edgeq.profiles.kernels.attention_costs import AttentionShape, attention_ns
from edgeq.profiles.kernels.cost_table import DecodeCosts
from edgeq.profiles.kernels.matmul_costs import matmul_ns
from edgeq.profiles.llm.model_shape import EMBEDDING, LayerShape, ModelShape
from edgeq.profiles.measured import LanguageCosts

__all__ = [
    "Kernels",
    "Rates",
    "Speeds",
    "decode_ms",
    "measured_speeds",
    "prompt_chunks",
    "speeds_of",
    "tensor_decode_ns",
    "tensor_prompt_ns",
    "ttft_ms",
]


@dataclasses.dataclass(frozen=True)
class Rates:
    """What a datasheet knows of a device.

    Attributes:
        bytes_per_s: that decoding reads.
        flops_per_s: that prompts are computed at, two for a multiply-add.
    """

    bytes_per_s: float
    flops_per_s: float


@dataclasses.dataclass(frozen=True)
class Kernels:
    """What the probe found for matrices and attention.

    Attributes:
        matmuls: matrices with many vectors at once.
        attention: layers.
        threads: of a session.
    """

    matmuls: tuple[MatmulPoint, ...]
    attention: tuple[AttentionPoint, ...]
    threads: int


@dataclasses.dataclass(frozen=True)
class Speeds:
    """What times are predicted from.

    Attributes:
        decode: nanoseconds of a matrix for one token.
        prompts: what prompts and attention are predicted from.
        token_ns: of every computed batch, whatever the model: its graph, the choice of a token.
        layer_ns: of every layer in every computed batch: norms, rotations, launches.
        layer_ns_per_value: of every layer, for each token of a batch and value of the embedding.
    """

    decode: DecodeCosts
    prompts: Rates | Kernels
    token_ns: float
    layer_ns: float
    layer_ns_per_value: float


def speeds_of(profile: DeviceProfile) -> Speeds:
    """What a profile says of its preferred backend for language models, in its power mode.

    A table that the probe measured on a CPU is used where the model runs there; it knows kernels, the datasheet's rule
    knows bytes and operations only, so types of equal bytes take the same time.
    """
    backend, measured = profile.backend, profile.measured
    if measured is not None and measured.language is not None and not backend.on_gpu:
        return measured_speeds(measured.language, measured.threads)
    rates = Rates(
        bytes_per_s=profile.bandwidth_bytes_per_s * (backend.decode_efficiency or 1.0),
        flops_per_s=profile.flops_per_s(backend),
    )
    decode = DecodeCosts(
        measured=False,
        machine=profile.name,
        arch=profile.arch,
        threads=profile.threads,
        llama_cpp="",
        bytes_per_s=rates.bytes_per_s,
        flops_per_s=rates.flops_per_s,
    )
    return Speeds(decode, rates, 1e6 * backend.token_overhead_ms, 1e6 * backend.layer_overhead_ms, 0.0)


def measured_speeds(costs: LanguageCosts, threads: int) -> Speeds:
    """What the probe found with so many threads, at the median.

    The tables hold lower quartiles, which compare types well on a machine that is disturbed; a session sees the middle.
    That is half the distance between the quartiles above them, taken from all points together.
    """
    decode = _slowness(entry.spread for entry in costs.decode.entries)
    matmul = _slowness(point.spread for point in costs.matmuls)
    attention = _slowness(point.spread for point in costs.attention)
    entries = tuple(replace(entry, ns=entry.ns * decode) for entry in costs.decode.entries)
    kernels = Kernels(
        tuple(replace(point, flops_per_s=point.flops_per_s / matmul) for point in costs.matmuls),
        tuple(replace(point, ns=point.ns * attention) for point in costs.attention),
        threads,
    )
    table = replace(costs.decode, entries=entries)
    return Speeds(table, kernels, costs.token_ns, costs.layer_ns, costs.layer_ns_per_value)


def _slowness(spreads: Iterable[float]) -> float:
    return 1 + statistics.median([*spreads] or [0.0])


def _multiplied(shape: ModelShape, tensor: str) -> bool:
    """Whether tokens are multiplied with a tensor; an embedding that is not tied is only looked up."""
    return len(shape.tensors[tensor]) > 1 and (tensor != EMBEDDING or shape.tied_embedding)


def tensor_decode_ns(shape: ModelShape, tensor: str, type_name: str, speeds: Speeds) -> float:
    """Time of one tensor in one decoded token; of a stack of experts, those that the token goes through."""
    if not _multiplied(shape, tensor):
        return 0.0
    columns, rows, *stacked = shape.tensors[tensor]
    return _experts(shape, stacked)[0] * speeds.decode.ns(type_name, (columns, rows))


def _experts(shape: ModelShape, stacked: Sequence[int]) -> tuple[int, int]:
    """Matrices of a tensor that one token goes through, and those that there are."""
    count = math.prod(stacked)
    return min(count, shape.experts_used or count), count


def tensor_prompt_ns(
    shape: ModelShape, tensor: str, type_name: str, speeds: Speeds, chunks: Mapping[int, int]
) -> float:
    """Time of one tensor in a whole prompt; the output matrix is used for its last token alone.

    Args:
        shape: the model.
        tensor: its name.
        type_name: its type.
        speeds: of the device.
        chunks: from `prompt_chunks`.
    """
    if not _multiplied(shape, tensor):
        return 0.0
    if shape.is_output(tensor):
        return tensor_decode_ns(shape, tensor, type_name, speeds)
    columns, rows, *stacked = shape.tensors[tensor]
    once = speeds.decode.ns(type_name, (columns, rows))
    used, there = _experts(shape, stacked)
    total = 0.0
    for tokens, count in chunks.items():
        # Experts that no token chooses are not read; a router is taken to choose without preference.
        touched = there * (1 - (1 - used / there) ** tokens)
        share = max(1, round(tokens * used / touched))
        # Many tokens at once are never faster than one: the weights are read all the same.
        total += count * touched * max(once, _batch_matrix_ns(type_name, (columns, rows), speeds, share))
    return total


def _batch_matrix_ns(type_name: str, shape: tuple[int, int], speeds: Speeds, tokens: int) -> float:
    if tokens == 1:
        return 0.0
    if isinstance(speeds.prompts, Rates):
        return 2e9 * math.prod(shape) * tokens / speeds.prompts.flops_per_s
    return matmul_ns(speeds.prompts.matmuls, type_name, shape, batch=tokens, threads=speeds.prompts.threads)


def prompt_chunks(prompt_tokens: int, ubatch_tokens: int) -> dict[int, int]:
    """Sizes of the chunks that a prompt is computed in, with how many there are of each."""
    whole, rest = divmod(prompt_tokens, ubatch_tokens)
    return {size: count for size, count in ((ubatch_tokens, whole), (rest, 1)) if size and count}


def decode_ms(
    shape: ModelShape, types: Mapping[str, str], speeds: Speeds, *, kv_types: tuple[str, str], cached_tokens: int
) -> float:
    """Time of one decoded token, the choice of the next one included.

    Args:
        shape: the model.
        types: of every tensor in ``shape.tensors``.
        speeds: of the device.
        kv_types: of keys and values.
        cached_tokens: in the KV cache.
    """
    matrices = sum(tensor_decode_ns(shape, name, types[name], speeds) for name in shape.tensors)
    return (matrices + _decode_rest_ns(shape, speeds, kv_types, cached_tokens)) / 1e6


def _decode_rest_ns(shape: ModelShape, speeds: Speeds, kv_types: tuple[str, str], cached_tokens: int) -> float:
    """Nanoseconds of a decoded token beside its matrices."""
    return _batch_ns(shape, speeds, 1) + sum(
        count * _attention_ns(shape, layer, speeds, kv_types, 1, cached_tokens) for layer, count in _equal_layers(shape)
    )


def ttft_ms(
    shape: ModelShape,
    types: Mapping[str, str],
    speeds: Speeds,
    *,
    kv_types: tuple[str, str],
    prompt_tokens: int,
    ubatch_tokens: int,
) -> float:
    """Time to first token of a prompt whose beginning is not cached.

    Args:
        shape: the model.
        types: of every tensor in ``shape.tensors``.
        speeds: of the device.
        kv_types: of keys and values.
        prompt_tokens: of the prompt.
        ubatch_tokens: computed at once.
    """
    chunks = prompt_chunks(prompt_tokens, ubatch_tokens)
    matrices = sum(tensor_prompt_ns(shape, name, types[name], speeds, chunks) for name in shape.tensors)
    return (matrices + _prompt_rest_ns(shape, speeds, kv_types, prompt_tokens, ubatch_tokens)) / 1e6


def _prompt_rest_ns(
    shape: ModelShape, speeds: Speeds, kv_types: tuple[str, str], prompt_tokens: int, ubatch_tokens: int
) -> float:
    """Nanoseconds of a prompt beside its matrices."""
    total, layers = 0.0, _equal_layers(shape)
    for start in range(0, prompt_tokens, ubatch_tokens):
        end = min(start + ubatch_tokens, prompt_tokens)
        total += _batch_ns(shape, speeds, end - start) + sum(
            count * _attention_ns(shape, layer, speeds, kv_types, end - start, end) for layer, count in layers
        )
    return total


def _batch_ns(shape: ModelShape, speeds: Speeds, tokens: int) -> float:
    per_layer = speeds.layer_ns + speeds.layer_ns_per_value * tokens * shape.embedding_width
    return speeds.token_ns + len(shape.layers) * per_layer


def _equal_layers(shape: ModelShape) -> list[tuple[LayerShape, int]]:
    counts: dict[LayerShape, int] = {}
    for layer in shape.layers:
        counts[layer] = counts.get(layer, 0) + 1
    return list(counts.items())


def _attention_ns(
    shape: ModelShape, layer: LayerShape, speeds: Speeds, kv_types: tuple[str, str], tokens: int, cached: int
) -> float:
    seen = cached if layer.window is None else min(cached, layer.window + tokens)
    if isinstance(speeds.prompts, Rates):
        cell_bytes = ggml_type(kv_types[0]).row_bytes(layer.key_width)
        cell_bytes += ggml_type(kv_types[1]).row_bytes(layer.value_width)
        operations = 4 * layer.heads * shape.key_head_width * tokens * seen
        return max(1e9 * seen * cell_bytes / speeds.prompts.bytes_per_s, 1e9 * operations / speeds.prompts.flops_per_s)
    heads = AttentionShape(shape.key_head_width, layer.heads, max(1, layer.key_width // shape.key_head_width))
    known = speeds.prompts
    found = [
        attention_ns(
            known.attention, kind, heads, n_tokens=tokens, n_cached=max(0, seen - tokens), threads=known.threads
        )
        for kind in set(kv_types)
    ]
    return sum(found) / len(found)
