"""The way of a tensor model through the house: source, float ONNX, inputs, candidates, decision, checks, bundle.

As in `edgeq.planner.convert`, everything happens in a staging folder and is published by one rename.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import importlib.metadata
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from edgeq._version import __version__
from edgeq.bundle import (
    MANIFEST,
    SCHEMA_VERSION,
    Bundle,
    describe_file,
    open_bundle,
    refuse_strangers,
    write_manifest,
)
from edgeq.converters.onnx.export.adopt import adopt_onnx
from edgeq.converters.onnx.export.embedding import bundle_files
from edgeq.converters.onnx.export.export import Exported, export_model
from edgeq.converters.onnx.layers import compare_layers
from edgeq.converters.onnx.quantize.clean import clean_for
from edgeq.converters.onnx.quantize.sites import quantizable
from edgeq.converters.source import resolve, weights_sha256
from edgeq.errors import BudgetError, UsageError
from edgeq.planner.output import settled_output
from edgeq.planner.tensors.candidates import DISABLED_OPTIMIZERS, MODEL_FILE, Candidate, Workbench
from edgeq.planner.tensors.decide import Decision, decide, is_like_this_machine
from edgeq.planner.tensors.job import TensorJob
from edgeq.planner.tensors.predict import predict
from edgeq.planner.tensors.samples import Samples, gather_samples
from edgeq.planner.tensors.schemes import activations_of, choose_backend, schemes_for
from edgeq.planner.tensors.verify import verify_bundle
from edgeq.profiles.device import Backend, DeviceProfile, power_mode_of
from edgeq.profiles.loader import load_profile
from edgeq.staging import publish, staging_folder
from edgeq.tensor_types import AxisRange, TensorArtifact, TensorManifest, TensorPlan
from edgeq.types import Budget, BundleFile, ModelSource, Target, merge_budgets, to_json
from edgeq.units import format_bytes

__all__ = ["convert_tensor"]

Progress = Callable[[str, int, int, str], None]

LAYERS_FILE = "layers.json"
# As /proc/cpuinfo has them.
_DOT_PRODUCTS = frozenset({"avx512_vnni", "avx_vnni", "amx_int8", "avx_vnni_int8"})
_LAYER_INPUTS = 1  # all activations of a call are held at once
# Of axes that nobody fixed: what a call may have, and what it usually has.
_AXES = {"batch": AxisRange(least=1, usual=1, most=16), "sequence": AxisRange(least=1, usual=128, most=512)}
_OTHER_AXIS = AxisRange(least=1, usual=1, most=1024)


def _silent(stage: str, done: int, total: int, detail: str) -> None:
    """A progress callback for those who want none."""


@dataclasses.dataclass(frozen=True)
class _Made:
    """What the manifest is written from."""

    source: ModelSource
    profile: DeviceProfile
    backend: Backend
    budget: Budget
    exported: Exported
    axes: Mapping[str, AxisRange]
    decision: Decision
    threads: int


def convert_tensor(job: TensorJob, out: Path, *, force: bool = False, progress: Progress = _silent) -> Bundle:
    """Make a bundle of a model that is called with arrays.

    Args:
        job: what to convert, and for what.
        out: the bundle's folder; made, or replaced with ``force`` if it holds a bundle and nothing else.
        force: replace an existing bundle.
        progress: told stage, amount done, amount in all, and a detail.

    Raises:
        EdgeqError: anything that `edgeq.errors` names; nothing is left behind.
    """
    target = settled_output(out, force=force)
    profile = load_profile(job.target)
    profile = profile if job.power_mode is None else power_mode_of(profile, job.power_mode)
    backend = choose_backend(profile, job.backend)
    schemes = schemes_for(profile, backend, job.precision)
    source = resolve(job.model, revision=job.revision, progress=lambda d, t, n: progress("download", d, t, n))
    with staging_folder(target) as work:
        exported = _exported(job, source, work, progress)
        axes = _axes(exported.artifact)
        samples = gather_samples(exported.artifact, _folder(source), axes, job.calibration)
        bench = _workbench(job, profile, backend, exported, samples, work, progress)
        decision = decide(
            bench,
            schemes,
            job.gate,
            _kept(job, bench),
            method=None if job.calibration.method == "auto" else job.calibration.method,
            timed=is_like_this_machine(profile, backend),
            asked=job.precision != "auto",
        )
        folder = work / "bundle"
        folder.mkdir()
        budget = merge_budgets(profile.budgets.perception, job.budget)
        made = _Made(source, profile, backend, budget, exported, axes, decision, bench.threads)
        _write_layers(bench, decision.chosen, folder, progress)
        manifest = _write(made, samples, folder, target.name, progress)
        write_manifest(folder, manifest)
        open_bundle(folder, verify=True)
        verify_bundle(folder, bench.reference, samples, progress)
        publish(folder, target, force=force, marker=MANIFEST, check=refuse_strangers)
    return Bundle(out, manifest)


def _exported(job: TensorJob, source: ModelSource, work: Path, progress: Progress) -> Exported:
    folder = work / "float"
    folder.mkdir()
    if source.format == "onnx":
        if job.shapes or job.task is not None:
            raise UsageError(
                "--shape and --task are for models that are exported, and this is an ONNX file",
                "Leave them out, or give the Hugging Face folder",
            )
        return adopt_onnx(Path(source.path), folder / MODEL_FILE)
    return export_model(
        Path(source.path),
        folder / MODEL_FILE,
        task=job.task,
        shapes=job.shapes or None,
        progress=lambda done, total, what: progress("export", done, total, what),
    )


def _folder(source: ModelSource) -> Path:
    """Where the files lie that say what comes before and after the model."""
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
    profile: DeviceProfile,
    backend: Backend,
    exported: Exported,
    samples: Samples,
    work: Path,
    progress: Progress,
) -> Workbench:
    from edgeq.llama import default_threads

    clean = work / "clean"
    clean.mkdir()
    progress("clean", 0, 1, backend.name)
    clean_for(exported.path, clean / MODEL_FILE, backend.name)
    return Workbench(
        reference=clean / MODEL_FILE,
        model=clean / MODEL_FILE,
        folder=work / "candidates",
        backend=backend.name,
        activations=activations_of(profile, backend),
        samples=samples,
        task=exported.artifact.task,
        classes=len(exported.artifact.labels) or None,
        dims={name: sizes.usual for name, sizes in _axes(exported.artifact).items()},
        percentile=job.calibration.percentile,
        threads=job.threads or min(profile.threads or default_threads(), default_threads()),
        progress=progress,
        narrow_weights=_needs_narrow_weights(profile, backend),
    )


def _needs_narrow_weights(profile: DeviceProfile, backend: Backend) -> bool:
    """Whether the CPU adds products of bytes in 16 bits, which eight bits of weights overflow: x86 without VNNI."""
    return not backend.on_gpu and profile.arch == "x86_64" and not _DOT_PRODUCTS & set(profile.cpu.features)


def _kept(job: TensorJob, bench: Workbench) -> dict[str, str]:
    """Nodes that the user wants in floats. A pattern that matches none is an error."""
    names = [site.name for site in quantizable(bench.model)]
    kept: dict[str, str] = {}
    for pattern in job.keep_float:
        try:
            matching = [name for name in names if re.search(pattern, name)]
        except re.error as error:
            raise UsageError(f"--keep-float {pattern!r} is no regular expression: {error}", "Correct it") from error
        if not matching:
            raise UsageError(
                f"--keep-float {pattern!r} matches no node that could be quantized",
                f"Choose among {', '.join(names[:5])}, …",
            )
        kept |= dict.fromkeys(matching, f"asked for by {pattern!r}")
    return kept


def _write(made: _Made, samples: Samples, folder: Path, name: str, progress: Progress) -> TensorManifest:
    """Copy the artifact and what comes before and after it; describe them."""
    chosen = made.decision.chosen
    files = _copy(chosen.path, folder)
    if made.source.format == "hf":
        source = Path(made.source.path)
        for role, path in bundle_files(source, made.exported.artifact.task).items():
            place = path.relative_to(source)  # sentence-transformers has config.json twice
            (folder / place).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, folder / place)
            files.append(describe_file(folder, place.as_posix(), role))
    if (folder / LAYERS_FILE).exists():
        files.append(describe_file(folder, LAYERS_FILE, "layers"))
    sha256 = weights_sha256(made.source, lambda d, t, n: progress("hash source", d, t, n))
    artifact = made.exported.artifact
    return TensorManifest(
        schema_version=SCHEMA_VERSION,
        name=name,
        source=msgspec.structs.replace(made.source, weights_sha256=sha256),
        artifact=artifact,
        plan=_plan(made, samples, folder),
        files=tuple(files),
        coverage=chosen.coverage,
        quality=chosen.quality,
        budget=made.budget,
        built_for=made.profile.name,
        target=Target(arch=made.profile.arch, accelerator=made.profile.accelerator),
        tools=_tools(),
        created_utc=dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
    )


def _write_layers(bench: Workbench, chosen: Candidate, folder: Path, progress: Progress) -> None:
    """Where the error enters, layer by layer; nothing where there is none."""
    if chosen.quality is None:
        return
    found = compare_layers(
        bench.reference,
        chosen.path,
        bench.samples.judged[:_LAYER_INPUTS],
        threads=bench.threads,
        progress=lambda done, total, what: progress("compare layers", done, total, what),
    )
    (folder / LAYERS_FILE).write_bytes(to_json(found))


def _copy(model: Path, folder: Path) -> list[BundleFile]:
    """The model and its external data, all files of its folder."""
    files = []
    for path in sorted(model.parent.iterdir()):
        shutil.copyfile(path, folder / path.name)
        files.append(describe_file(folder, path.name, "model" if path.name == MODEL_FILE else "data"))
    return files


def _plan(made: _Made, samples: Samples, folder: Path) -> TensorPlan:
    decision, chosen = made.decision, made.decision.chosen
    on_cpu = made.backend.name == "onnxruntime-cpu"
    speedup = None
    if decision.timing is not None and decision.float_timing is not None:
        speedup = 1 / decision.timing.slowness
    predicted, unknown = predict(folder / MODEL_FILE, made.profile, made.backend, made.axes)
    limit = made.budget.peak_memory_bytes
    if limit is not None and predicted.peak_memory_bytes > limit:
        raise BudgetError(
            f"{chosen.label} takes {format_bytes(predicted.peak_memory_bytes)} at its peak, the limit is "
            f"{format_bytes(limit)}",
            "Raise --max-memory, choose a smaller --precision, or fix smaller sizes with --shape",
        )
    return TensorPlan(
        backend=made.backend.name,
        scheme=chosen.scheme,
        activations=chosen.activations,
        float_nodes=dict(chosen.float_nodes),
        axes=dict(made.axes),
        threads=made.threads,
        disabled_optimizers=DISABLED_OPTIMIZERS if on_cpu else (),
        predicted=predicted,
        speedup=speedup,
        rejected=decision.rejected,
        notes=(*made.exported.notes, *samples.notes, *_narrow_note(made), *unknown, *decision.notes),
    )


def _narrow_note(made: _Made) -> tuple[str, ...]:
    if made.decision.chosen.activations is None or not _needs_narrow_weights(made.profile, made.backend):
        return ()
    return (f"weights have 7 bits: {made.profile.name} names no VNNI, without which sums of bytes overflow",)


def _tools() -> dict[str, str]:
    wanted = {"onnx", "onnx-ir", "onnxruntime", "torch", "transformers"}
    there = {d.metadata["Name"].lower().replace("_", "-"): d.version for d in importlib.metadata.distributions()}
    return {"edgeq": __version__, **{name: there[name] for name in sorted(wanted & there.keys())}}
