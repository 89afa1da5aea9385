"""A model that is called with arrays as the subject of a benchmark: one call after the other, by one caller."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgeq.bundle import Bundle
from edgeq.errors import SessionError
from edgeq.report import Metric, TensorDetails, metric, tensor_floors, tensor_predictions
from edgeq.runtime.bench_inputs import BenchInputs, sizes_of
from edgeq.runtime.bench_messages import Call, Called, Fed, Feed, LoadTensor, TensorLoaded
from edgeq.runtime.bench_process import WorkerProcess
from edgeq.runtime.bench_run import Ask, Findings, Run, Subject
from edgeq.runtime.tensor.settings import TENSORRT_BACKENDS
from edgeq.runtime.tensorrt.driver import find_gpu

__all__ = ["TensorSubject"]

# So many seconds of calls are asked for at once: rarely enough that asking costs them nothing.
_BLOCK_S = 0.25
_FEWEST_LOADS = 5
_LANGUAGE_LINES: tuple[str, ...] = ("ttft_ms", "itl_ms", "tokens_per_s")


class TensorSubject(Subject[TensorLoaded, float]):
    """A bundle of a model that is called with arrays; see `Subject`. A sample is the time of a call in milliseconds.

    Args:
        bundle: that was verified, as it is for one device (`Bundle.made_for`).
        inputs: of the calls.
        folder: an empty one for what the measured process reads.
        threads: None for the bundle's own.

    Raises:
        BundleError: another kind of bundle.
        SessionError: the bundle was made for a GPU, and this machine has none.
    """

    ready = TensorLoaded
    fewest_repetitions = 100
    fewest_loads = _FEWEST_LOADS

    def __init__(self, bundle: Bundle, inputs: BenchInputs, folder: Path, threads: int | None) -> None:
        self._manifest, self._inputs = bundle.tensor, inputs
        self.per_repetition = {"latency_ms": 1}
        backend = self._manifest.plan.backend
        self.on_gpu = self._manifest.plan.on_gpu
        if self.on_gpu and find_gpu() is None:
            raise SessionError(
                f"{bundle.path} was made for {backend} on {self._manifest.built_for}, and this machine has no NVIDIA "
                "GPU",
                f"Copy it to the {self._manifest.built_for} and run there: edgeq bench {bundle.path.name}",
            )
        # The first load of an engine may be the one that builds it.
        self.uncounted_loads = 1 if backend in TENSORRT_BACKENDS else 0
        self.load = LoadTensor(bundle=str(bundle.path), device=self._manifest.built_for, threads=threads)
        self._feed = folder / "inputs.npz"
        arrays: dict[str, Any] = {
            f"{index}.{name}": array for index, call in enumerate(inputs.calls) for name, array in call.items()
        }
        with self._feed.open("wb") as file:
            np.savez(file, **arrays)

    def ask(self, worker: WorkerProcess, loaded: TensorLoaded) -> Ask[float]:
        """See `Subject.ask`; as many calls as a quarter of a second holds."""
        worker.request(Feed(inputs=str(self._feed)), Fed)

        def take(most: int, seconds: float) -> list[float]:
            return worker.request(Call(most=most, seconds=min(seconds, _BLOCK_S)), Called).latencies_ms

        return take

    def findings(self, run: Run[TensorLoaded, float], confidence: float) -> Findings:
        """See `Subject.findings`."""
        plan = self._manifest.plan
        unmeasured = dict.fromkeys(
            _LANGUAGE_LINES, "a model that is called with arrays has no tokens; constrain latency"
        )
        return Findings(
            metrics=_call_metrics(run.samples, confidence),
            warmup=_call_metrics(run.warmup, confidence),
            unmeasured=unmeasured,
            predicted=tensor_predictions(plan.predicted, usual=self._has("usual")),
            floors=tensor_floors(plan.predicted),
            details=TensorDetails(
                backend=plan.backend,
                scheme=plan.scheme,
                providers=run.loaded.providers,
                inputs=self._inputs.source,
                calls=len(self._inputs.calls),
                held_bytes=self._inputs.n_bytes,
                shapes=self._inputs.shapes,
                predicted=plan.predicted,
            ),
            notes=self._notes(),
        )

    def _has(self, which: str) -> bool:
        """Whether all calls have the plan's ``"usual"`` sizes, or its ``"most"``."""
        manifest = self._manifest
        wanted = {name: getattr(sizes, which) for name, sizes in manifest.plan.axes.items()}
        return all(
            wanted.get(name, size) == size
            for shapes in self._inputs.shapes
            for name, size in sizes_of(shapes, manifest.artifact.inputs).items()
        )

    def _notes(self) -> list[str]:
        notes = []
        if not self._has("most"):
            notes.append("Peak memory is predicted for the largest sizes, which were not measured; try --size largest")
        if not self._has("usual"):
            notes.append("Latency is planned for the usual sizes, which were not measured")
        if self._manifest.artifact.embedding is not None:
            notes.append("A call is one of the graph: turning texts into tokens, and pooling, are not in its time")
        return notes


def _call_metrics(latencies_ms: Sequence[float], confidence: float) -> dict[str, Metric]:
    if not latencies_ms:
        return {}
    rate = 1e3 * len(latencies_ms) / math.fsum(latencies_ms)
    return {
        "latency_ms": metric("ms", "of each call of session.run", latencies_ms, confidence=confidence),
        "calls_per_s": metric("calls/s", "by one caller, call after call", [rate], confidence=confidence),
    }
