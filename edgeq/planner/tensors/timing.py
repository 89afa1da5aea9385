"""How long ONNX models take here, compared so that a noisy machine cannot decide: in turns, by medians of ratios.

A single figure of a noisy machine means little. Models that take turns meet the same disturbances, so the ratio of two
neighbouring calls stands where both times move.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeq.profiles.onnx.session import onnx_session_options, open_onnx_session, start_session
from edgeq.stats import upper_bound

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["MOST_SECONDS", "Call", "Kernel", "Timing", "kernel_times", "time_in_turns", "timing_of"]

Call = Mapping[str, NDArray[np.generic]]

_WARM_UP = 2
MOST_SECONDS = 20.0
_FEWEST_ROUNDS = 5
_CONFIDENCE = 0.95  # of a bound of the median ratio


@dataclasses.dataclass(frozen=True)
class Timing:
    """One model among others that took turns with it.

    Attributes:
        ms: median of its calls.
        cpu_ms: median of the processor time of its calls, over all threads.
        ratio: median over the rounds of its time over the first model's.
        cpu_ratio: likewise of the processor time, which other programs disturb less.
        rounds: calls.
        slowness_bound: with 95 % confidence neither median ratio is above it; infinite after fewer than five rounds.
    """

    ms: float
    cpu_ms: float
    ratio: float
    cpu_ratio: float
    rounds: int
    slowness_bound: float = math.inf

    @property
    def slowness(self) -> float:
        """The larger ratio: on a busy machine threads that wait for each other flatter whoever uses fewer of them."""
        return max(self.ratio, self.cpu_ratio)


def time_in_turns(
    models: Sequence[Path],
    calls: Sequence[Call],
    *,
    threads: int,
    disabled_optimizers: Sequence[Sequence[str]] | None = None,
    rounds: int = 15,
    most_seconds: float = MOST_SECONDS,
) -> tuple[Timing, ...]:
    """Time models with the same inputs, one call each in turn.

    Args:
        models: ONNX files; the first is what the others are compared with.
        calls: inputs, which follow each other; all models get the same one in a round.
        threads: of a call.
        disabled_optimizers: of ONNX Runtime, for each model; None for none at all.
        rounds: at most; at least five whatever they take.
        most_seconds: to stop after.

    Raises:
        SessionError: a model cannot be loaded.
        MissingPackageError: onnxruntime is not installed.
    """
    disabled = disabled_optimizers or [()] * len(models)
    sessions = [
        open_onnx_session(model, threads, disabled_optimizers=off) for model, off in zip(models, disabled, strict=True)
    ]
    for session in sessions:
        for _ in range(_WARM_UP):
            session.run(None, dict(calls[0]))
    walls: list[list[float]] = [[] for _ in sessions]
    busy: list[list[float]] = [[] for _ in sessions]
    start = time.monotonic()
    for turn in range(rounds):
        feeds = dict(calls[turn % len(calls)])
        # Whoever comes first in a round finds other caches: every second round goes backwards.
        order = range(len(sessions)) if turn % 2 == 0 else range(len(sessions) - 1, -1, -1)
        for index in order:
            wall, cpu = time.perf_counter(), time.process_time()
            sessions[index].run(None, feeds)
            walls[index].append(1e3 * (time.perf_counter() - wall))
            busy[index].append(1e3 * (time.process_time() - cpu))
        if turn + 1 >= _FEWEST_ROUNDS and time.monotonic() - start > most_seconds:
            break
    return tuple(
        timing_of(wall, cpu, first_ms=walls[0], first_cpu_ms=busy[0]) for wall, cpu in zip(walls, busy, strict=True)
    )


def timing_of(
    ms: Sequence[float], cpu_ms: Sequence[float], *, first_ms: Sequence[float], first_cpu_ms: Sequence[float]
) -> Timing:
    """One model's calls, compared with the first model's in the same rounds.

    The bound is an order statistic of the ratios, as `edgeq.stats` describes: it takes ties and outliers as they are.

    Args:
        ms: of its calls.
        cpu_ms: processor time of them.
        first_ms: of the first model's calls, in the same rounds.
        first_cpu_ms: likewise.
    """
    ratios = [a / b for a, b in zip(ms, first_ms, strict=True)]
    cpu_ratios = [a / b for a, b in zip(cpu_ms, first_cpu_ms, strict=True)]
    bounds = [upper_bound(found, 50, _CONFIDENCE) for found in (ratios, cpu_ratios)]
    return Timing(
        ms=statistics.median(ms),
        cpu_ms=statistics.median(cpu_ms),
        ratio=statistics.median(ratios),
        cpu_ratio=statistics.median(cpu_ratios),
        rounds=len(ms),
        slowness_bound=max(math.inf if bound is None else bound for bound in bounds),
    )


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One node of the graph that ONNX Runtime executes.

    Attributes:
        name: of the executed node.
        op_type: of it.
        inputs: names of the tensors that it reads.
        outputs: names of the tensors that it makes.
        weights: those of the inputs that are constants of two axes or more.
        us: median time.
    """

    name: str
    op_type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: tuple[str, ...]
    us: float


def kernel_times(
    model: Path, calls: Sequence[Call], *, threads: int, disabled_optimizers: Sequence[str] = (), runs: int = 12
) -> tuple[Kernel, ...]:
    """Time every node of the graph that ONNX Runtime makes of a model, by its own profiler.

    Args:
        model: an ONNX file.
        calls: inputs, in turn.
        threads: of a call.
        disabled_optimizers: of ONNX Runtime.
        runs: calls, after one that is not counted.

    Raises:
        SessionError: the model cannot be loaded.
        MissingPackageError: onnx or onnxruntime is not installed.
    """
    with _profiled(model, threads, disabled_optimizers) as (session, executed, trace):
        for turn in range(runs + 1):
            session.run(None, dict(calls[turn % len(calls)]))
        events: list[dict[str, Any]] = json.loads(trace().read_text(encoding="utf-8"))
        nodes, weights = _executed(executed)
    times: dict[str, list[float]] = {}
    types: dict[str, str] = {}
    for event in events:
        name = str(event.get("name", ""))
        if event.get("cat") == "Node" and name.endswith("_kernel_time"):
            node = name.removesuffix("_kernel_time")
            times.setdefault(node, []).append(float(event["dur"]))
            types[node] = str(event["args"]["op_name"])
    kernels = []
    for name, found in times.items():
        inputs, outputs = nodes.get(name, ((), ()))
        read = tuple(value for value in inputs if value in weights)
        kernels.append(Kernel(name, types[name], inputs, outputs, read, statistics.median(found[1:] or found)))
    return tuple(kernels)


@contextlib.contextmanager
def _profiled(
    model: Path, threads: int, disabled: Sequence[str]
) -> Iterator[tuple[onnxruntime.InferenceSession, Path, Any]]:
    """A session that records its kernels, the graph that it executes, and how to get the record."""
    with tempfile.TemporaryDirectory(prefix="edgeq-kernels-") as name:
        folder = Path(name)
        executed = folder / "executed.onnx"
        options = onnx_session_options(threads)
        options.enable_profiling = True
        options.profile_file_prefix = str(folder / "trace")
        options.optimized_model_filepath = str(executed)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "executed.data")
        session = start_session(model, options, disabled_optimizers=disabled)
        yield session, executed, lambda: Path(session.end_profiling())


def _executed(path: Path) -> tuple[dict[str, tuple[tuple[str, ...], tuple[str, ...]]], set[str]]:
    """What each node of a graph reads and makes, and the names of its weights."""
    from edgeq.converters.onnx.skeleton import read_skeleton

    skeleton = read_skeleton(path)
    nodes = {node.name: (tuple(node.input), tuple(node.output)) for node in skeleton.model.graph.node}
    return nodes, {weight.name for weight in skeleton.weights if len(weight.dims) > 1}
