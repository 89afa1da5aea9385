"""What must be there before a tensor model can be decided about: its float ONNX, inputs, a place for candidates."""

from __future__ import annotations

import dataclasses
import functools
import platform
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from edgeq.converters.onnx.checks import refuse_for_backend
from edgeq.converters.onnx.export.adopt import adopt_onnx, check_adopted
from edgeq.converters.onnx.export.export import Exported, check_exported, export_model
from edgeq.converters.onnx.export.module_source import ModuleSource, describe_module, export_source
from edgeq.converters.onnx.quantize.clean import clean_for
from edgeq.converters.onnx.quantize.sites import quantizable
from edgeq.converters.source import resolve
from edgeq.errors import UsageError
from edgeq.inputs.arrays import refuse_constant
from edgeq.inputs.tokenizer_memory import tokenizer_bytes
from edgeq.planner.tensors.candidates import Workbench
from edgeq.planner.tensors.decide import Decision, decide
from edgeq.planner.tensors.job import TensorJob
from edgeq.planner.tensors.node_times import Clock, measured, probed
from edgeq.planner.tensors.refusals import refuse_contradictions, refuse_uncounted, refuse_unmeasured
from edgeq.planner.tensors.samples import Samples, gather_samples
from edgeq.planner.tensors.schemes import activations_of, choose_backend, possible_schemes, schemes_for
from edgeq.planner.tensors.timing import Call
from edgeq.planner.tensors.writing import DISABLED_OPTIMIZERS, MODEL_FILE, Dialect, write_floats
from edgeq.profiles.device import Backend, DeviceProfile, power_mode_of
from edgeq.profiles.loader import load_profile
from edgeq.profiles.onnx.opsets import newest_opset
from edgeq.queries import LOGITS
from edgeq.tensor_types import AxisRange, Scheme, TensorArtifact
from edgeq.types import Budget, ModelSource, merge_budgets

__all__ = ["Prepared", "decision_of", "kept_nodes", "needs_narrow_weights", "prepare", "prepare_other"]

Progress = Callable[[str, int, int, str], None]

# As /proc/cpuinfo has them.
_DOT_PRODUCTS = frozenset({"avx512_vnni", "avx_vnni", "amx_int8", "avx_vnni_int8"})
# Of axes that nobody fixed: what a call may have, and what it usually has.
_AXES = {"batch": AxisRange(least=1, usual=1, most=16), "sequence": AxisRange(least=1, usual=128, most=512)}
_CHECKED_INPUTS = 4  # real ones, that a graph is compared with its origin on
_OTHER_AXIS = AxisRange(least=1, usual=1, most=1024)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A model and a device, ready to be decided about.

    Attributes:
        source: of the model.
        profile: the device.
        backend: of it.
        budget: the profile's and the job's.
        schemes: to try, in the order of preference.
        exported: the float model.
        axes: sizes of dynamic axes.
        samples: to calibrate with and to judge on.
        bench: where candidates are made.
        beside: folder with what comes before and after the model; None if there is none.
    """

    source: ModelSource
    profile: DeviceProfile
    backend: Backend
    budget: Budget
    schemes: tuple[Scheme, ...]
    exported: Exported
    axes: Mapping[str, AxisRange]
    samples: Samples
    bench: Workbench
    beside: Path | None = None

    @functools.cached_property
    def tokenizer_bytes(self) -> int:
        """Memory of the tokenizer that a session of a text encoder holds; 0 for other models."""
        place = None if self.beside is None else self.beside / "tokenizer.json"
        embeds = self.exported.artifact.embedding is not None
        return tokenizer_bytes(place) if embeds and place is not None and place.is_file() else 0


def prepare(job: TensorJob, work: Path, progress: Progress) -> Prepared:
    """Find the model, export and clean it, and gather inputs.

    Args:
        job: what to convert, and for what.
        work: an empty folder.
        progress: told stage, amount done, amount in all, and a detail.

    Raises:
        EdgeqError: anything that `edgeq.errors` names.
    """
    refuse_contradictions(job)
    profile = load_profile(job.target)
    profile = profile if job.power_mode is None else power_mode_of(profile, job.power_mode)
    backend = choose_backend(profile, job.backend)
    schemes = schemes_for(profile, backend, job.precision)
    source = _source(job, progress)
    exported = _exported(job, source, work, progress)
    refuse_unmeasured(job.gate, exported.artifact.task)
    refuse_uncounted(exported.artifact, _n_classes(exported))
    axes = _axes(exported.artifact)
    beside = _beside(job.model, source)
    samples = gather_samples(exported.artifact, beside, axes, job.calibration)
    refuse_constant(samples.calibration, exported.artifact.inputs)
    if job.calibration.inputs is not None:
        exported = _checked(source, exported, samples.judged[:_CHECKED_INPUTS])
    exported = dataclasses.replace(exported, reference=None)  # torch's weights are no longer needed
    bench = _workbench(job, (profile, backend), exported, axes, samples, work, progress)
    budget = merge_budgets(profile.budgets.perception, job.budget)
    return Prepared(source, profile, backend, budget, schemes, exported, axes, samples, bench, beside)


def _checked(source: ModelSource, exported: Exported, inputs: Sequence[Call]) -> Exported:
    """Against what it was made from, on real inputs."""
    if source.format == "onnx":
        return check_adopted(Path(source.path), exported, inputs)
    return check_exported(exported, inputs)


def prepare_other(job: TensorJob, first: Prepared, device: str, work: Path, progress: Progress) -> Prepared:
    """The same model for another device, with the same float model and inputs.

    Args:
        job: what to convert.
        first: for the job's own target.
        device: a profile's name or file.
        work: an empty folder.
        progress: as `prepare`.

    Raises:
        EdgeqError: as `prepare`.
    """
    profile = load_profile(device)
    backend = choose_backend(profile, None)
    schemes = schemes_for(profile, backend, job.precision)
    bench = _workbench(job, (profile, backend), first.exported, first.axes, first.samples, work, progress)
    return dataclasses.replace(
        first,
        profile=profile,
        backend=backend,
        budget=merge_budgets(profile.budgets.perception, job.budget),
        schemes=schemes,
        bench=bench,
    )


def _source(job: TensorJob, progress: Progress) -> ModelSource:
    if isinstance(job.model, ModuleSource):
        return describe_module(job.model)
    return resolve(job.model, revision=job.revision, progress=lambda d, t, n: progress("download", d, t, n))


def decision_of(job: TensorJob, prepared: Prepared) -> Decision:
    """The fastest way that passes the job's gate.

    Only a limit of latency that the job itself gives is a goal: a profile's says what cameras usually need.
    """
    return decide(
        prepared.bench,
        prepared.schemes,
        job.gate,
        kept_nodes(job, prepared.bench),
        method=None if job.calibration.method == "auto" else job.calibration.method,
        clock=_clock(prepared),
        asked=job.precision != "auto",
        max_latency_ms=job.budget.latency_ms,
    )


def _clock(prepared: Prepared) -> Clock | None:
    """Times of single nodes: measured if this machine is like the target, else by a probe of it; None without one."""
    profile, bench = prepared.profile, prepared.bench
    if prepared.backend.on_gpu:
        return None
    if profile.arch in (platform.machine(), "any"):
        return measured(bench.samples.judged, threads=bench.threads, disabled_optimizers=DISABLED_OPTIMIZERS)
    figures = None if profile.measured is None else profile.measured.onnx
    return None if figures is None else probed(figures, bench.dims)


def _exported(job: TensorJob, source: ModelSource, work: Path, progress: Progress) -> Exported:
    folder = work / "float"
    folder.mkdir()
    if isinstance(job.model, ModuleSource):
        return export_source(
            job.model, folder / MODEL_FILE, lambda done, total, what: progress("export", done, total, what)
        )
    if source.format == "onnx":
        if job.shapes or job.task is not None:
            raise UsageError(
                "--shape and --task are for models that are exported, and this is an ONNX file",
                "Leave them out, or give the Hugging Face folder",
            )
        newest = [opset for opset in _newest_opsets(job) if opset is not None]
        return adopt_onnx(Path(source.path), folder / MODEL_FILE, newest_opset=min(newest, default=None))
    return export_model(
        Path(source.path),
        folder / MODEL_FILE,
        task=job.task,
        shapes=job.shapes or None,
        progress=lambda done, total, what: progress("export", done, total, what),
    )


def _newest_opsets(job: TensorJob) -> Iterator[int | None]:
    """That each device takes: they share one float model."""
    for device, backend in ((job.target, job.backend), *((device, None) for device in job.also_for)):
        profile = load_profile(device)
        yield newest_opset(profile, choose_backend(profile, backend).name)


def _beside(model: str | ModuleSource, source: ModelSource) -> Path | None:
    """Where the files lie that say what comes before and after the model."""
    if isinstance(model, ModuleSource):
        return model.preprocessing
    path = Path(source.path)
    return path.parent if source.format == "onnx" else path


def _axes(artifact: TensorArtifact) -> dict[str, AxisRange]:
    names = [size for spec in artifact.inputs for size in spec.shape if isinstance(size, str)]
    found = {name: _AXES.get(name, _OTHER_AXIS) for name in dict.fromkeys(names)}
    if artifact.embedding is not None and "sequence" in found:
        most = min(_AXES["sequence"].most, artifact.embedding.max_tokens)
        found["sequence"] = AxisRange(least=1, usual=min(128, most), most=most)
    return found


def _workbench(
    job: TensorJob,
    device: tuple[DeviceProfile, Backend],
    exported: Exported,
    axes: Mapping[str, AxisRange],
    samples: Samples,
    work: Path,
    progress: Progress,
) -> Workbench:
    from edgeq.llama import default_threads

    profile, backend = device
    clean = work / "clean"
    clean.mkdir()
    progress("clean", 0, 1, backend.name)
    clean_for(exported.path, clean / MODEL_FILE, backend.name)
    refuse_for_backend(clean / MODEL_FILE, backend.name)
    dialect = Dialect(
        backend.name,
        activations_of(profile, backend),
        needs_narrow_weights(profile, backend),
        newest_opset(profile, backend.name),
        has_bf16="bf16" in possible_schemes(backend),
    )
    return Workbench(
        reference=write_floats(clean / MODEL_FILE, work / "floats" / MODEL_FILE, dialect),
        model=clean / MODEL_FILE,
        folder=work / "candidates",
        dialect=dialect,
        samples=samples,
        task=exported.artifact.task,
        classes=_n_classes(exported),
        dims={name: sizes.usual for name, sizes in axes.items()},
        percentile=job.calibration.percentile,
        threads=job.threads or min(profile.threads or default_threads(), default_threads()),
        progress=progress,
        exported=exported.path,
        metric=job.gate.metric,
        embedding=exported.artifact.embedding,
    )


def _n_classes(exported: Exported) -> int | None:
    """As the configuration or the labels say, else as many as the logits have."""
    logits = next((spec.shape for spec in exported.artifact.outputs if spec.name == LOGITS), ())
    last = logits[-1] if logits else None
    return exported.n_classes or len(exported.artifact.labels) or (last if isinstance(last, int) else None)


def needs_narrow_weights(profile: DeviceProfile, backend: Backend) -> bool:
    """Whether the CPU adds products of bytes in 16 bits, which eight bits of weights overflow: x86 without VNNI."""
    return not backend.on_gpu and profile.arch == "x86_64" and not _DOT_PRODUCTS & set(profile.cpu.features)


def kept_nodes(job: TensorJob, bench: Workbench) -> dict[str, str]:
    """Nodes that the user wants in floats. A pattern that matches none is an error."""
    names = [site.name for site in quantizable(bench.model)]
    kept: dict[str, str] = {}
    for pattern in job.keep_float:
        matching = [name for name in names if re.search(pattern, name)]
        if not matching:
            raise UsageError(
                f"--keep-float {pattern!r} matches no node that could be quantized",
                f"Choose among {', '.join(names[:5])}, …",
            )
        kept |= dict.fromkeys(matching, f"asked for by {pattern!r}")
    return kept
