"""What language models cost on this machine: ggml's kernels, and what a session adds to them.

A machine's speed changes while it is measured, and parts that were measured at different speeds do not add up to a
token's time. So two kernels are timed before and after every part, and what was measured between them is put at the
speed that the machine had most of the time. Each part is measured twice, in an order that reads the same from both
ends, with the sessions in the middle: what the two kernels do not see of a steady drift is then the same for all.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import TypeVar

import msgspec

from edgeq.ggml_types import TYPES
from edgeq.llama_context import KV_TYPES
from edgeq.probe.reference import Reading, SpeedReference, between
from edgeq.probe.session_costs import DEEP, SHALLOW, WIDE, SessionTimes, measure_session
from edgeq.probe_points import AttentionPoint, MatmulPoint
from edgeq.profiles.kernels.cost_measure import legal_matrices, measure_matrices
from edgeq.profiles.kernels.cost_table import CostEntry, DecodeCosts
from edgeq.profiles.kernels.probe_attention import SHAPES, measure_attention
from edgeq.profiles.kernels.probe_matmul import measure_matmul
from edgeq.profiles.llm.model_latency import decode_ms, measured_speeds, ttft_ms
from edgeq.profiles.llm.sample_model import sample_types
from edgeq.profiles.measured import LanguageCosts

__all__ = ["DECODE_SHAPES", "MATMUL_SHAPES", "PROBED_TYPES", "Progress", "measure_language", "stage"]

Progress = Callable[[str, int, int, str], None]
_T = TypeVar("_T")
_Timed = TypeVar("_Timed", CostEntry, AttentionPoint)

# Row lengths of powers of two, which every type can have, and rows from a key matrix to a vocabulary; what lies between
# is interpolated (`edgeq.profiles.kernels.cost_table`).
DECODE_SHAPES = tuple((columns, rows) for columns in (512, 2048) for rows in (256, 1024, 4096, 32768))
MATMUL_SHAPES = ((512, 256), (512, 2048), (2048, 512), (2048, 4096))
# One bit a weight is left out: no plan chooses it.
PROBED_TYPES = tuple(name for name in TYPES if not name.startswith("iq1"))
# Of the time, what each part gets in one of its two turns; sessions take some seconds more.
_DECODE, _MATMUL, _ATTENTION, _RARE = 0.15, 0.15, 0.13, 0.07
_USUAL_KV = ("f16", "q8_0", "q4_0")  # in all shapes; the other types in one, from which the rest is reckoned
_ROOM_BYTES = 1 << 20  # what processes of the same work were seen to differ by


def stage(progress: Progress, name: str) -> Callable[[int, int, str], None]:
    """The progress of one part of the probe."""
    return lambda done, total, what: progress(name, done, total, what)


def measure_language(threads: int, *, seconds: float, progress: Progress) -> tuple[LanguageCosts, tuple[Reading, ...]]:
    """Measure every part twice.

    Args:
        threads: of a session.
        seconds: about how long to measure; everything is timed a few times whatever it takes.
        progress: told the part, how much of it is done, how much there is, and what is in work.

    Returns:
        The costs, and how fast the machine was before, between and after the turns.

    Raises:
        SessionError: too little memory, or a process of the probe died.
        UsageError: a number of threads that cannot be.
        MissingPackageError: llama-cpp-python is not installed.
    """

    def decode() -> DecodeCosts:
        return measure_matrices(
            legal_matrices(DECODE_SHAPES, PROBED_TYPES),
            threads=threads,
            progress=stage(progress, "weights of a token"),
            budget_s=_DECODE * seconds,
        )

    def matmuls() -> tuple[MatmulPoint, ...]:
        return measure_matmul(
            MATMUL_SHAPES,
            threads=threads,
            types=PROBED_TYPES,
            progress=stage(progress, "weights of a prompt"),
            budget_s=_MATMUL * seconds,
        )

    def attend() -> tuple[AttentionPoint, ...]:
        return _attention(threads, seconds, progress)

    def serve() -> tuple[SessionTimes, ...]:
        return measure_session((SHALLOW, DEEP, WIDE), threads=threads, progress=stage(progress, "session"))

    with SpeedReference(threads) as reference:
        readings = [reference.read()]

        def watched(part: Callable[[], _T]) -> _T:
            found = part()
            readings.append(reference.read())
            return found

        tables = [watched(decode)]
        products = [watched(matmuls)]
        layers = [watched(attend)]
        sessions = watched(serve)
        layers.append(watched(attend))
        products.append(watched(matmuls))
        tables.append(watched(decode))
    speeds = [between(before, after) for before, after in itertools.pairwise(readings)]
    usual = _usual(speeds)
    first, second, third, fourth, fifth, sixth, seventh = (_factor(speed, usual) for speed in speeds)
    matmul_turns = zip(_at(products[0], second.prompt_ns), _at(products[1], sixth.prompt_ns), strict=True)
    attention_turns = zip(_attended(layers[0], third), _attended(layers[1], fifth), strict=True)
    sessions = tuple(_served(found, fourth) for found in sessions)
    bare = LanguageCosts(
        decode=_mean_table([_table_at(tables[0], first.decode_ns), _table_at(tables[1], seventh.decode_ns)]),
        matmuls=tuple(_mean_matmul(turns) for turns in matmul_turns),
        attention=tuple(_mean_times(turns) for turns in attention_turns),
        token_ns=0.0,
        layer_ns=0.0,
        layer_ns_per_value=0.0,
        runtime_bytes=max(found.beside_bytes for found in sessions) + _ROOM_BYTES,
        reference_decode_ns=usual.decode_ns,
        reference_prompt_ns=usual.prompt_ns,
    )
    return _with_fixed_costs(bare, sessions, threads), tuple(readings)


def _attention(threads: int, seconds: float, progress: Progress) -> tuple[AttentionPoint, ...]:
    usual = measure_attention(
        threads=threads,
        kv_types=_USUAL_KV,
        progress=stage(progress, "attention"),
        budget_s=_ATTENTION * seconds,
    )
    rare = measure_attention(
        SHAPES[:1],
        threads=threads,
        kv_types=[name for name in KV_TYPES if name not in ("f32", *_USUAL_KV)],
        progress=stage(progress, "attention over other caches"),
        budget_s=_RARE * seconds,
    )
    return usual + rare


def _usual(speeds: Sequence[Reading]) -> Reading:
    """The median of each kernel."""
    return Reading(
        statistics.median(speed.decode_ns for speed in speeds), statistics.median(speed.prompt_ns for speed in speeds)
    )


def _factor(speed: Reading, usual: Reading) -> Reading:
    """What times of a part are multiplied with, to be what they would be at the usual speed."""
    return Reading(usual.decode_ns / speed.decode_ns, usual.prompt_ns / speed.prompt_ns)


def _table_at(table: DecodeCosts, factor: float) -> DecodeCosts:
    entries = tuple(msgspec.structs.replace(entry, ns=entry.ns * factor) for entry in table.entries)
    return msgspec.structs.replace(table, entries=entries)


def _at(points: Sequence[MatmulPoint], factor: float) -> list[MatmulPoint]:
    return [msgspec.structs.replace(point, flops_per_s=point.flops_per_s / factor) for point in points]


def _attended(points: Sequence[AttentionPoint], factors: Reading) -> list[AttentionPoint]:
    """One token reads its cache, many tokens compute."""
    return [
        msgspec.structs.replace(point, ns=point.ns * (factors.decode_ns if point.n_tokens == 1 else factors.prompt_ns))
        for point in points
    ]


def _served(found: SessionTimes, factors: Reading) -> SessionTimes:
    """Sample models are so small that they compute from the caches."""
    return dataclasses.replace(
        found, decode_ns=found.decode_ns * factors.prompt_ns, prompt_ns=found.prompt_ns * factors.prompt_ns
    )


def _mean_table(turns: Sequence[DecodeCosts]) -> DecodeCosts:
    """One table of the mean times, and of the larger of the loads that others put on the machine."""
    entries = tuple(_mean_times(same) for same in zip(*(table.entries for table in turns), strict=True))
    return msgspec.structs.replace(turns[-1], entries=entries, busy_cpus=max(table.busy_cpus or 0.0 for table in turns))


def _mean_times(turns: Sequence[_Timed]) -> _Timed:
    return msgspec.structs.replace(
        turns[0],
        ns=statistics.fmean(entry.ns for entry in turns),
        spread=statistics.fmean(entry.spread for entry in turns),
        n=sum(entry.n for entry in turns),
    )


def _mean_matmul(turns: Sequence[MatmulPoint]) -> MatmulPoint:
    return msgspec.structs.replace(
        turns[0],
        flops_per_s=statistics.harmonic_mean([point.flops_per_s for point in turns]),
        spread=statistics.fmean(point.spread for point in turns),
        n=sum(point.n for point in turns),
    )


def _with_fixed_costs(bare: LanguageCosts, sessions: Sequence[SessionTimes], threads: int) -> LanguageCosts:
    """What is left of sessions' times when the tables have taken their share, as a line over the layers."""
    shallow, deep, wide = sessions
    tokens = [found.decode_ns - _known_token_ns(found, bare, threads) for found in (shallow, deep)]
    layer_ns = max(0.0, (tokens[1] - tokens[0]) / (deep.model.layers - shallow.model.layers))
    token_ns = max(0.0, tokens[0] - layer_ns * shallow.model.layers)
    costs = msgspec.structs.replace(bare, token_ns=token_ns, layer_ns=layer_ns)
    values = wide.model.layers * wide.prompt_tokens * wide.model.width
    left = wide.prompt_ns - _known_prompt_ns(wide, costs, threads)
    return msgspec.structs.replace(costs, layer_ns_per_value=max(0.0, left / values))


def _known_token_ns(found: SessionTimes, costs: LanguageCosts, threads: int) -> float:
    shape, types = found.model.shape(), sample_types(found.model)
    speeds = measured_speeds(costs, threads)
    return 1e6 * decode_ms(shape, types, speeds, kv_types=("f16", "f16"), cached_tokens=found.cached_tokens)


def _known_prompt_ns(found: SessionTimes, costs: LanguageCosts, threads: int) -> float:
    size = found.prompt_tokens
    shape, types = found.model.shape(), sample_types(found.model)
    speeds = measured_speeds(costs, threads)
    return 1e6 * ttft_ms(shape, types, speeds, kv_types=("f16", "f16"), prompt_tokens=size, ubatch_tokens=size)
