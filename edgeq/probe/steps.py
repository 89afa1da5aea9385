"""Everything that the probe measures, one part after another, and whether the machine let it."""

from __future__ import annotations

import datetime as dt
import importlib.util
import os
from collections.abc import Callable, Sequence

import msgspec

from edgeq._version import __version__
from edgeq.ggml_types import TYPES
from edgeq.llama_context import KV_TYPES
from edgeq.probe.reference import Reading, SpeedReference, spread_of
from edgeq.probe.session_costs import DEEP, SHALLOW, WIDE, SessionTimes, measure_session
from edgeq.probe_points import AttentionPoint, BandwidthPoint
from edgeq.profiles.facts.system_facts import read_facts
from edgeq.profiles.kernels.cost_measure import legal_matrices, measure_matrices
from edgeq.profiles.kernels.probe_attention import SHAPES, measure_attention
from edgeq.profiles.kernels.probe_bandwidth import default_buffer_bytes, measure_bandwidth
from edgeq.profiles.kernels.probe_matmul import measure_matmul
from edgeq.profiles.llm.model_latency import decode_ms, measured_speeds, ttft_ms
from edgeq.profiles.llm.sample_model import sample_types
from edgeq.profiles.measured import LanguageCosts, Measured
from edgeq.profiles.onnx.measure import measure_onnx
from edgeq.runtime import measure
from edgeq.units import format_bytes

__all__ = ["DECODE_SHAPES", "DEFAULT_SECONDS", "MATMUL_SHAPES", "PROBED_TYPES", "probe_machine"]

Progress = Callable[[str, int, int, str], None]

# Row lengths of powers of two, which every type can have, and rows from a key matrix to a vocabulary; what lies between
# is interpolated (`edgeq.profiles.kernels.cost_table`).
DECODE_SHAPES = tuple((columns, rows) for columns in (512, 2048) for rows in (256, 1024, 4096, 32768))
MATMUL_SHAPES = ((512, 256), (512, 2048), (2048, 512), (2048, 4096))
# One bit a weight is left out: no plan chooses it.
PROBED_TYPES = tuple(name for name in TYPES if not name.startswith("iq1"))
DEFAULT_SECONDS = 90.0
# Of the time, what each part gets; sessions and the machine's own files take some seconds more.
_BANDWIDTH, _DECODE, _MATMUL, _ATTENTION, _RARE, _ONNX = 0.1, 0.25, 0.25, 0.2, 0.1, 0.1
_USUAL_KV = ("f16", "q8_0", "q4_0")  # in all shapes; the other types in one, from which the rest is reckoned
_LISTEN_S = 1.0
_MAX_HOST_LOAD = 0.05
_MAX_DRIFT = 0.2
_ROOM_BYTES = 1 << 20  # what processes of the same work were seen to differ by


def probe_machine(*, threads: int, progress: Progress, seconds: float = DEFAULT_SECONDS) -> Measured:
    """Measure the machine that this runs on; what is not installed is left out.

    Args:
        threads: of a session.
        progress: told the part, how much of it is done, how much there is, and what is in work.
        seconds: about how long to measure; everything is timed a few times whatever it takes.

    Raises:
        SessionError: too little memory, or a process of the probe died.
        UsageError: a number of threads that cannot be.
    """
    progress("look at the machine", 0, 1, "")
    busy_before = measure.busy_share(_LISTEN_S)
    before, own_before = measure.take_snapshot(), _own_cpu_s()
    facts = read_facts()
    counts = sorted({1 << power for power in range(threads.bit_length()) if 1 << power < threads} | {threads})
    bandwidth = measure_bandwidth(counts, budget_s=_BANDWIDTH * seconds, progress=_stage(progress, "memory bandwidth"))
    language: LanguageCosts | None = None
    readings: tuple[Reading, ...] = ()
    if importlib.util.find_spec("llama_cpp") is not None:
        language, readings = _language(threads, seconds, progress)
    onnx = None
    if importlib.util.find_spec("onnxruntime") is not None:
        tell = _stage(progress, "ONNX Runtime")
        onnx = measure_onnx(threads, seconds=_ONNX * seconds, progress=lambda what: tell(0, 0, what))
    after = measure.take_snapshot()
    load = measure.host_load(
        before.cpu,
        after.cpu,
        own_s=_own_cpu_s() - own_before,
        busy_before=busy_before,
        allowed=_MAX_HOST_LOAD,
    )
    return Measured(
        taken_utc=dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
        edgeq=__version__,
        threads=threads,
        host_load=load.during,
        doubts=(*measure.disturbances(before, after, load), *_small_buffers(bandwidth), *_unsteady(readings)),
        facts=facts,
        bandwidth=bandwidth,
        language=language,
        onnx=onnx,
    )


def _small_buffers(points: Sequence[BandwidthPoint]) -> tuple[str, ...]:
    """Why the bandwidth may be that of caches."""
    wanted, smallest = default_buffer_bytes(), min(p.buffer_bytes for p in points)
    if smallest >= wanted:
        return ()
    return (
        f"bandwidth was measured on {format_bytes(smallest)}, for want of memory; {format_bytes(wanted)} are needed",
    )


def _own_cpu_s() -> float:
    """Processor seconds of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _stage(progress: Progress, name: str) -> Callable[[int, int, str], None]:
    return lambda done, total, what: progress(name, done, total, what)


def _language(threads: int, seconds: float, progress: Progress) -> tuple[LanguageCosts, tuple[Reading, ...]]:
    """The tables, and how fast the machine was before, between and after them."""
    with SpeedReference(threads) as reference:
        readings = [reference.read()]
        decode = measure_matrices(
            legal_matrices(DECODE_SHAPES, PROBED_TYPES),
            threads=threads,
            progress=_stage(progress, "weights of a token"),
            budget_s=_DECODE * seconds,
        )
        readings.append(reference.read())
        matmuls = measure_matmul(
            MATMUL_SHAPES,
            threads=threads,
            types=PROBED_TYPES,
            progress=_stage(progress, "weights of a prompt"),
            budget_s=_MATMUL * seconds,
        )
        readings.append(reference.read())
        attention = _attention(threads, seconds, progress)
        readings.append(reference.read())
        sessions = measure_session((SHALLOW, DEEP, WIDE), threads=threads, progress=_stage(progress, "session"))
        readings.append(reference.read())
    bare = LanguageCosts(
        decode=decode,
        matmuls=matmuls,
        attention=attention,
        token_ns=0.0,
        layer_ns=0.0,
        layer_ns_per_value=0.0,
        runtime_bytes=max(found.beside_bytes for found in sessions) + _ROOM_BYTES,
        reference_decode_ns=(readings[0].decode_ns + readings[1].decode_ns) / 2,
        reference_prompt_ns=(readings[1].prompt_ns + readings[2].prompt_ns) / 2,
    )
    return _with_fixed_costs(bare, sessions, threads), tuple(readings)


def _attention(threads: int, seconds: float, progress: Progress) -> tuple[AttentionPoint, ...]:
    usual = measure_attention(
        threads=threads,
        kv_types=_USUAL_KV,
        progress=_stage(progress, "attention"),
        budget_s=_ATTENTION * seconds,
    )
    rare = measure_attention(
        SHAPES[:1],
        threads=threads,
        kv_types=[name for name in KV_TYPES if name not in ("f32", *_USUAL_KV)],
        progress=_stage(progress, "attention over other caches"),
        budget_s=_RARE * seconds,
    )
    return usual + rare


def _unsteady(readings: Sequence[Reading]) -> tuple[str, ...]:
    """Why the parts of the probe cannot be compared."""
    if not readings:
        return ()
    whats = ("memory", "computing")
    return tuple(
        f"the speed of {what} changed by {spread:.0%} between the parts of the probe, {_MAX_DRIFT:.0%} is allowed"
        for what, spread in zip(whats, spread_of(readings), strict=True)
        if spread > _MAX_DRIFT
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
