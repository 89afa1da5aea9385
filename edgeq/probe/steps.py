"""Everything that the probe measures, one part after another, and whether the machine let it."""

from __future__ import annotations

import datetime as dt
import importlib.util
import os
from collections.abc import Sequence

from edgeq._version import __version__
from edgeq.probe.language import Progress, measure_language, stage
from edgeq.probe.reference import Reading, spread_of
from edgeq.probe_points import BandwidthPoint
from edgeq.profiles.facts.system_facts import read_facts
from edgeq.profiles.kernels.probe_bandwidth import default_buffer_bytes, measure_bandwidth
from edgeq.profiles.measured import LanguageCosts, Measured
from edgeq.profiles.onnx.measure import measure_onnx
from edgeq.runtime import measure
from edgeq.units import format_bytes

__all__ = ["DEFAULT_SECONDS", "probe_machine"]

DEFAULT_SECONDS = 90.0
# Of the time, what each part gets; the machine's own files take some seconds more.
_BANDWIDTH, _LANGUAGE, _ONNX = 0.1, 0.8, 0.1
_LISTEN_S = 1.0
_MAX_HOST_LOAD = 0.05
_MAX_DRIFT = 0.2


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
    bandwidth = measure_bandwidth(counts, budget_s=_BANDWIDTH * seconds, progress=stage(progress, "memory bandwidth"))
    language: LanguageCosts | None = None
    readings: tuple[Reading, ...] = ()
    if importlib.util.find_spec("llama_cpp") is not None:
        language, readings = measure_language(threads, seconds=_LANGUAGE * seconds, progress=progress)
    onnx = None
    if importlib.util.find_spec("onnxruntime") is not None:
        tell = stage(progress, "ONNX Runtime")
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
