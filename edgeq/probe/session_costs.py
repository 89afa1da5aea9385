"""What a session costs beside its model's matrices, attention and buffers: per token, per layer, and in memory.

Models of random weights are served by the process that ``edgeq bench`` measures, as bundles like any other. Two of them
are so small that their matrices hardly count, and differ in their layers alone: what a token takes there less what the
tables know of it is the fixed part, and what the deeper one takes more is its layers'. The third one is as wide as a
robot's model, for what a layer does to every value of a prompt.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from edgeq._version import __version__
from edgeq.bundle import SCHEMA_VERSION, describe_file, write_manifest
from edgeq.errors import SessionError
from edgeq.llama import Context, Model
from edgeq.profiles.kernels.cost_measure import undisturbed
from edgeq.profiles.llm.model_memory import vocabulary_bytes
from edgeq.profiles.llm.sample_model import SampleModel, sample_types, write_sample_model
from edgeq.runtime.bench_messages import Finished, Generate, Load, Loaded, Sample, Usage
from edgeq.runtime.bench_process import WorkerProcess
from edgeq.types import Artifact, Budget, Manifest, ModelSource, Plan, Prediction

__all__ = ["DEEP", "MODEL_FILE", "SHALLOW", "WIDE", "SessionTimes", "describe_bundle", "measure_session"]

Progress = Callable[[int, int, str], None]

MODEL_FILE = "model.gguf"
# One head of 64: matrices of 4 KiB, which stay in the nearest caches and take next to no time.
SHALLOW, DEEP = (SampleModel(layers=n, width=64, feed_forward=64, heads=1, kv_heads=1) for n in (4, 28))
WIDE = SampleModel(layers=6, width=512, feed_forward=1536, heads=8, kv_heads=4)
_CONTEXT = 1024
_UBATCH = 128
_OUTPUT = 33
_REPETITIONS = 8


@dataclasses.dataclass(frozen=True)
class SessionTimes:
    """One model as it was served.

    Attributes:
        model: its hyperparameters.
        decode_ns: of a token with about ``cached_tokens`` in the cache: the lower quartile.
        cached_tokens: see there.
        prompt_ns: time to first token of a prompt of ``prompt_tokens``: the lower quartile.
        prompt_tokens: see there.
        spread: half the distance between the quartiles of tokens, as a share.
        beside_bytes: peak memory less weights, KV cache, compute buffer and vocabulary.
        threads: of the session.
    """

    model: SampleModel
    decode_ns: float
    cached_tokens: int
    prompt_ns: float
    prompt_tokens: int
    spread: float
    beside_bytes: int
    threads: int


def measure_session(
    models: Sequence[SampleModel], *, threads: int, progress: Progress | None = None
) -> tuple[SessionTimes, ...]:
    """Serve sample models and time them.

    Args:
        models: each in a process of its own, taking turns.
        threads: of each session.
        progress: told repetitions done, repetitions in all, and what is in work.

    Raises:
        SessionError: a process died or the model could not be loaded.
        MissingPackageError: llama-cpp-python is not installed.
    """
    tell = progress or (lambda done, total, what: None)
    with tempfile.TemporaryDirectory(prefix="edgeq-probe-") as folder:
        bundles = [_write_bundle(Path(folder) / str(index), model, threads) for index, model in enumerate(models)]
        held = [_held_bytes(bundle / MODEL_FILE, threads) for bundle in bundles]
        samples, usages = _serve(bundles, threads, tell)
    return tuple(_times(*found, threads=threads) for found in zip(models, samples, usages, held, strict=True))


def _held_bytes(gguf: Path, threads: int) -> int:
    """Weights, KV cache and buffers, as llama.cpp tells them."""
    with (
        Model.load(gguf) as model,
        Context(
            model, context_tokens=_CONTEXT, batch_tokens=_UBATCH, ubatch_tokens=_UBATCH, threads=threads
        ) as context,
    ):
        return model.buffer_bytes + sum(context.buffer_bytes.values())


def _serve(bundles: Sequence[Path], threads: int, tell: Progress) -> tuple[list[list[Sample]], list[Finished]]:
    workers: list[WorkerProcess] = []
    taken: list[list[Sample]] = [[] for _ in bundles]
    try:
        for bundle in bundles:
            workers.append(WorkerProcess())
            load = Load(bundle=str(bundle), threads=threads, context_tokens=None, text="")
            workers[-1].request(load, Loaded)
        for turn in range(_REPETITIONS + 1):
            for index, worker in enumerate(workers):
                tell(turn, _REPETITIONS + 1, "serving a sample model")
                # Another first token each time: a cache of prefixes helps none of them.
                prompt = [(turn + position) % 256 for position in range(_UBATCH)]
                sample = worker.request(Generate(prompt=prompt, max_tokens=_OUTPUT), Sample)
                if turn:
                    taken[index].append(sample)
        # A full context at the end, so that every page of cache and buffers was touched.
        filling = [(7 * position + 3) % 251 for position in range(_CONTEXT - 1)]
        usages = []
        for worker in workers:
            worker.request(Generate(prompt=filling, max_tokens=1), Sample)
            usages.append(worker.request(Usage(), Finished))
    finally:
        for worker in workers:
            worker.close()
    return taken, usages


def _times(
    model: SampleModel, samples: Sequence[Sample], usage: Finished, held_bytes: int, *, threads: int
) -> SessionTimes:
    gaps_ns, spread = undisturbed([1e6 * gap for sample in samples for gap in sample.gaps_ms])
    prompt_ns, _ = undisturbed([1e6 * sample.ttft_ms for sample in samples])
    if usage.peak_bytes is None:
        raise SessionError("this system does not tell a process's peak memory", "Probe on Linux")
    return SessionTimes(
        model=model,
        decode_ns=gaps_ns,
        cached_tokens=_UBATCH + _OUTPUT // 2,
        prompt_ns=prompt_ns,
        prompt_tokens=_UBATCH,
        spread=spread,
        beside_bytes=max(0, usage.peak_bytes - held_bytes - vocabulary_bytes(model.shape())),
        threads=threads,
    )


def _write_bundle(folder: Path, model: SampleModel, threads: int) -> Path:
    folder.mkdir()
    write_sample_model(model, folder / MODEL_FILE)
    nothing = Prediction(
        file_bytes=0,
        weights_bytes=0,
        kv_cache_bytes=0,
        compute_bytes=0,
        runtime_bytes=0,
        peak_memory_bytes=0,
        itl_ms=0.0,
        tokens_per_s=0.0,
        ttft_ms=0.0,
        prompt_tokens=_UBATCH,
    )
    plan = Plan(
        tensor_types=sample_types(model),
        context_tokens=_CONTEXT,
        ubatch_tokens=_UBATCH,
        threads=threads,
        predicted=nothing,
    )
    artifact = Artifact(
        architecture="llama",
        n_layers=model.layers,
        n_vocab=model.vocabulary,
        trained_context_tokens=model.context_tokens,
        has_chat_template=False,
    )
    describe_bundle(folder, plan, artifact)
    return folder


def describe_bundle(folder: Path, plan: Plan, artifact: Artifact) -> None:
    """Make a folder with a model file a bundle that sessions load, of a model that is nobody's.

    Args:
        folder: holds `MODEL_FILE`.
        plan: how it is served.
        artifact: what a session must know of the model.
    """
    source = ModelSource(
        id="probe", path=".", format="gguf", architecture=artifact.architecture, n_params=0, dtype="f32"
    )
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        name="probe",
        source=source,
        artifact=artifact,
        plan=plan,
        files=(describe_file(folder, MODEL_FILE, "model"),),
        smoke=None,
        budget=Budget(),
        built_for="probe",
        tools={"edgeq": __version__},
        created_utc=dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
    )
    write_manifest(folder, manifest)
