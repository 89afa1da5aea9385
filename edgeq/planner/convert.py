"""The way of one model through the house: source, plan, weights, checks, bundle.

Everything happens in a staging folder beside the output, which is published by one rename after the last check; a run
that is killed leaves no bundle, and its staging folder is removed by the next run.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import importlib.metadata
import os
from collections.abc import Callable
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
from edgeq.converters.gguf.export import export_gguf, export_skeleton
from edgeq.converters.gguf.external import export_with_llama_cpp
from edgeq.converters.gguf.finite import check_weights
from edgeq.converters.gguf.header import read_header
from edgeq.converters.gguf.imatrix import ImportanceMatrix
from edgeq.converters.gguf.quantize import assert_types, quantize
from edgeq.converters.gguf.recipe import recipe_yaml
from edgeq.converters.gguf.sensitivity.evidence import Workshop
from edgeq.converters.gguf.shape import describe_artifact
from edgeq.converters.gguf.smoke import smoke_check
from edgeq.converters.gguf.tokenizer import check_tokenizer
from edgeq.converters.source import resolve, weight_files, weights_sha256
from edgeq.errors import ConversionError, OutputExistsError, SourceError, UsageError
from edgeq.llama_library import versions
from edgeq.planner.decide import (
    Found,
    demand_of,
    export_reference,
    given_imatrix,
    searched_plan,
    wants_search,
    workshop,
)
from edgeq.planner.early_checks import check_texts
from edgeq.planner.inspection import Inspector, judged_plan
from edgeq.planner.job import Job, idle_notes, is_float, is_judged, power_note, profile_of
from edgeq.planner.output import settled_output
from edgeq.planner.plan import make_plan
from edgeq.planner.problem import Problem, pose
from edgeq.planner.search import Demand
from edgeq.profiles.device import DeviceProfile
from edgeq.staging import publish, staging_folder
from edgeq.types import Budget, Manifest, ModelSource, Plan, Quality, SmokeCheck, Target, merge_budgets

__all__ = ["Job", "convert", "plan_only"]

Progress = Callable[[str, int, int, str], None]
Look = Callable[[Problem, Demand, Plan], None]

MODEL_FILE = "model.gguf"
RECIPE_FILE = "recipe.yaml"


def _silent(stage: str, done: int, total: int, detail: str) -> None:
    """A progress callback for those who want none."""


@dataclasses.dataclass(frozen=True)
class _Posed:
    """A model and a device as a problem, and where it is solved."""

    source: ModelSource
    reference: Path
    problem: Problem
    demand: Demand
    shop: Workshop


@dataclasses.dataclass(frozen=True)
class _Decided:
    """What is known once the plan stands."""

    source: ModelSource
    profile: DeviceProfile
    budget: Budget
    plan: Plan
    reference: Path | None  # a complete float GGUF, if one had to be there for planning
    imatrix: ImportanceMatrix | None = None  # the user's, for a preset or a recipe
    posed: tuple[Problem, Demand] | None = None  # what a plan without a file is about
    found: Found | None = None  # of a search
    quality: Quality | None = None


def convert(job: Job, out: Path, *, force: bool = False, progress: Progress = _silent) -> Bundle:
    """Make a bundle.

    Args:
        job: what to convert, and for what.
        out: the bundle's folder; made, or replaced with ``force`` if it holds a bundle and nothing else.
        force: replace an existing bundle; its reports, which are of the old bundle, go with it.
        progress: told stage, amount done, amount in all, and a detail.

    Raises:
        EdgeqError: anything that `edgeq.errors` names; nothing is left behind.
    """
    target = settled_output(out, force=force)
    source = _resolve(job, progress)
    stamps = _stamp_weights(source)
    _refuse_own_source(source, list(stamps), target)
    with staging_folder(target) as work:
        folder = work / "bundle"
        folder.mkdir()
        decided = _decide(job, source, work, progress, artifact=folder / MODEL_FILE)
        decided, smoke = _write_artifact(job, decided, work, folder / MODEL_FILE, progress)
        manifest = _describe(decided, smoke, folder, target.name, progress)
        _refuse_changed(stamps, _stamp_weights(source))
        write_manifest(folder, manifest)
        open_bundle(folder, verify=True)
        publish(folder, target, force=force, marker=MANIFEST, check=refuse_strangers)
    return Bundle(out, manifest)


def plan_only(
    job: Job, work_beside: Path, *, look: Look | None = None, progress: Progress = _silent
) -> tuple[ModelSource, DeviceProfile, Plan]:
    """Decide as `convert` does, and write nothing that stays.

    Args:
        job: as for `convert`.
        work_beside: a path in the folder where a skeleton or a float GGUF may lie meanwhile.
        look: called after planning with what a search is about, while its float GGUF is still there, even where
            nothing had to be searched for; not called where the types are given, or not to be searched for.
        progress: as for `convert`.
    """
    source = _resolve(job, progress)
    with staging_folder(work_beside) as work:
        decided = _decide(job, source, work, progress, pose_anyway=look is not None)
        if look is not None and decided.posed is not None:
            look(*decided.posed, decided.plan)
    return decided.source, decided.profile, decided.plan


def _resolve(job: Job, progress: Progress) -> ModelSource:
    def download(done: int, total: int, name: str) -> None:
        progress("download", done, total, name)

    profile_of(job)  # before gigabytes are downloaded for a device that is not there
    return resolve(job.model, revision=job.revision, progress=download)


_Stamps = dict[Path, tuple[int, int, int]]


def _stamp_weights(source: ModelSource) -> _Stamps:
    """Size, time of the last change (ns) and inode of every weight file."""
    stamps: _Stamps = {}
    try:
        for file in weight_files(source):
            status = file.stat()
            stamps[file] = status.st_size, status.st_mtime_ns, status.st_ino
    except OSError as error:
        raise SourceError(f"{error.filename or source.path} cannot be read: {error.strerror}", "Check it") from error
    return stamps


def _refuse_changed(before: _Stamps, now: _Stamps) -> None:
    """Refuse to name a hash in the manifest that is not of the weights that were converted."""
    for file in sorted({*before, *now}):
        if before.get(file) != now.get(file):
            raise SourceError(f"{file} changed while it was converted", "Convert again when nothing writes to it")


def _refuse_own_source(source: ModelSource, weights: list[Path], target: Path) -> None:
    """Refuse an output that holds the model: replacing it would delete what it is made from."""
    for path in (Path(source.path), *weights):
        if Path(os.path.realpath(path)).is_relative_to(target):
            raise OutputExistsError(
                f"{target} holds the model that is to be converted ({path.name})", "Choose another output with -o"
            )


def _decide(
    job: Job,
    source: ModelSource,
    work: Path,
    progress: Progress,
    *,
    artifact: Path | None = None,
    pose_anyway: bool = False,
) -> _Decided:
    """Plan; with ``artifact``, a search also makes, measures and moves the model there.

    With ``pose_anyway`` the problem is posed even where nothing has to be searched for. The plan stays the same.
    """
    profile = profile_of(job)
    budget = merge_budgets(profile.budget, job.budget)
    progress("plan", 0, 1, profile.name)
    gguf, reference, notes = _planning_file(job, source, work, progress)
    imatrix, rounding = given_imatrix(job.search.evidence.imatrix, gguf)
    searched = wants_search(gguf, profile, budget, job.request, job.goal, job.search, imatrix)
    notes = (*power_note(profile), *notes, *check_texts(gguf, job.search, job.quality, searched=searched))
    if searched:
        return _search(job, source, work, progress, (profile, budget, reference, notes), artifact)
    plan = make_plan(gguf, profile, budget, job.request, notes=(*notes, *rounding), imatrix=imatrix)
    plan = msgspec.structs.replace(plan, notes=(*plan.notes, *idle_notes(job, plan)))
    progress("plan", 1, 1, plan.preset or "recipe")
    decided = _Decided(source, profile, budget, plan, reference, imatrix)
    if not (pose_anyway and job.leaves_search):
        return decided
    posed = _pose(job, source, work, progress, (profile, budget, reference))
    return dataclasses.replace(decided, posed=(posed.problem, posed.demand))


def _search(
    job: Job,
    source: ModelSource,
    work: Path,
    progress: Progress,
    known: tuple[DeviceProfile, Budget, Path | None, tuple[str, ...]],
    artifact: Path | None,
) -> _Decided:
    """Search for types, judge the mix on held-out text, and search again for less where a quality limit is missed."""
    profile, budget, reference, notes = known
    posed = _pose(job, source, work, progress, (profile, budget, reference))
    source, reference, problem, demand = posed.source, posed.reference, posed.problem, posed.demand
    if artifact is None:
        options = dataclasses.replace(job.search, trials=0)
        found = searched_plan(problem, demand, job.request, options, posed.shop, notes)
        return _Decided(source, profile, budget, found.plan, reference, posed=(problem, demand))
    inspector = Inspector(reference, job.quality, job.goal, job.threads, progress)
    found, quality = judged_plan(problem, demand, job.request, job.search, posed.shop, notes, inspector, artifact)
    return _Decided(source, profile, budget, found.plan, reference, found=found, quality=quality)


def _pose(
    job: Job,
    source: ModelSource,
    work: Path,
    progress: Progress,
    known: tuple[DeviceProfile, Budget, Path | None],
) -> _Posed:
    """Gather what a search stands on."""
    profile, budget, reference = known
    reference = reference or _reference(source, work, progress)
    check_weights(read_header(reference), {}, finite=source.format == "hf")
    sha256 = weights_sha256(source, lambda d, t, n: progress("hash source", d, t, n))
    shop = workshop(work, sha256, job.threads, progress)
    folder = Path(source.path) if source.format == "hf" else None
    problem = pose(reference, folder, profile, job.request.overrides, job.search, shop)
    demand = demand_of(reference, profile, budget, job.budget, job.request, job.goal)
    source = msgspec.structs.replace(source, weights_sha256=sha256)
    return _Posed(source, reference, _naming(problem, source), demand, shop)


def _naming(problem: Problem, source: ModelSource) -> Problem:
    """With the model's name for who wrote the text, which may have been kept under the name of another copy."""
    evidence = problem.evidence
    if evidence.text.source != "self":
        return problem
    text = dataclasses.replace(evidence.text, name=f"written by {source.id}")
    return dataclasses.replace(problem, evidence=dataclasses.replace(evidence, text=text))


def _reference(source: ModelSource, work: Path, progress: Progress) -> Path:
    reference = _work_file(work, "reference", source)
    export_reference(Path(source.path), reference, progress)
    return reference


def _work_file(work: Path, kind: str, source: ModelSource) -> Path:
    """A file that messages name as the user does."""
    folder = work / kind
    folder.mkdir(exist_ok=True)
    return folder / (Path(source.id).name or "model")


def _planning_file(
    job: Job, source: ModelSource, work: Path, progress: Progress
) -> tuple[Path, Path | None, tuple[str, ...]]:
    """A GGUF whose header is complete, the same again if its data is too, and what its maker had to say."""
    path = Path(source.path)
    if source.format == "gguf":
        if job.llama_cpp is not None:
            raise UsageError("--llama-cpp converts Hugging Face folders, and this is a GGUF", "Leave it out")
        return path, path, ()
    if job.llama_cpp is not None:
        out = _work_file(work, "reference", source)
        plain = work / "reference.gguf"  # the script puts values into names with braces
        progress("convert with llama.cpp", 0, 0, "")
        export_with_llama_cpp(
            path,
            plain,
            job.llama_cpp,
            float_type=source.dtype,
            progress=lambda line: progress("convert with llama.cpp", 0, 0, line),
        )
        plain.rename(out)
        return out, out, (f"converted by the convert_hf_to_gguf.py of {job.llama_cpp.name}",)
    result = export_skeleton(path, _work_file(work, "skeleton", source))
    return result.path, None, result.notes


def _write_artifact(
    job: Job, decided: _Decided, work: Path, artifact: Path, progress: Progress
) -> tuple[_Decided, SmokeCheck]:
    """Write the model file and prove it: types, size, tokenizer, and behaviour against the reference."""
    folder = Path(decided.source.path)
    reference = decided.reference
    if reference is None:
        reference = _work_file(work, "reference", decided.source)
        export_gguf(folder, reference, progress=lambda d, t, n: progress("read weights", d, t, n))
    if decided.found is None:
        # An export has counted NaN and infinity already; a GGUF that came from elsewhere has not.
        check_weights(read_header(reference), decided.plan.tensor_types, finite=decided.reference is None)
        quantize(
            reference,
            artifact,
            decided.plan.tensor_types,
            imatrix=decided.imatrix,
            threads=job.threads,
            progress=lambda d, t, n: progress("quantize", d, t, n),
        )
    assert_types(artifact, decided.plan.tensor_types)
    expected, found = decided.plan.predicted.file_bytes, artifact.stat().st_size
    if found != expected:
        raise ConversionError(
            f"The model file has {found} bytes, {expected} were predicted", "Report this with the model's name"
        )
    if decided.source.format == "hf":
        progress("check tokenizer", 0, 1, "")
        check_tokenizer(artifact, folder)
    progress("check model", 0, 1, "")
    smoke = smoke_check(reference, artifact, is_float=is_float(decided.plan), threads=job.threads or None)
    progress("check model", 1, 1, "")
    if decided.quality is None and is_judged(job, decided.plan):
        inspector = Inspector(reference, job.quality, job.goal, job.threads, progress)
        quality = inspector.judge(artifact, None, kv_type=decided.plan.kv_type_k)
        inspector.refuse_missed(quality, None)
        decided = dataclasses.replace(decided, quality=quality)
    return decided, smoke


def _describe(decided: _Decided, smoke: SmokeCheck, folder: Path, name: str, progress: Progress) -> Manifest:
    """The manifest of a finished artifact; writes the recipe beside it."""
    plan = decided.plan
    (folder / RECIPE_FILE).write_text(recipe_yaml(plan.tensor_types, plan.preset), encoding="utf-8")
    sha256 = decided.source.weights_sha256
    if sha256 is None:
        sha256 = weights_sha256(decided.source, lambda d, t, n: progress("hash source", d, t, n))
    return Manifest(
        schema_version=SCHEMA_VERSION,
        name=name,
        source=msgspec.structs.replace(decided.source, weights_sha256=sha256),
        artifact=describe_artifact(read_header(folder / MODEL_FILE)),
        plan=plan,
        files=(describe_file(folder, MODEL_FILE, "model"), describe_file(folder, RECIPE_FILE, "recipe")),
        smoke=smoke,
        quality=decided.quality,
        budget=decided.budget,
        built_for=decided.profile.name,
        target=Target(arch=decided.profile.arch, accelerator=decided.profile.accelerator),
        tools={"edgeq": __version__, **versions(), "gguf": importlib.metadata.version("gguf")},
        created_utc=dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
    )
