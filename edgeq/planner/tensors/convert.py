"""The way of a tensor model through the house: source, float ONNX, inputs, candidates, decision, checks, bundle.

As in `edgeq.planner.convert`, everything happens in a staging folder and is published by one rename.
"""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import shutil
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
from edgeq.converters.onnx.export.embedding import bundle_files
from edgeq.converters.onnx.layers import compare_layers
from edgeq.converters.source import weights_sha256
from edgeq.planner.output import settled_output
from edgeq.planner.tensors.candidates import MODEL_FILE, Candidate, Workbench
from edgeq.planner.tensors.decide import Decision
from edgeq.planner.tensors.job import TensorJob
from edgeq.planner.tensors.plan import make_plan
from edgeq.planner.tensors.prepare import Prepared, decision_of, prepare
from edgeq.planner.tensors.verify import verify_bundle
from edgeq.staging import publish, staging_folder
from edgeq.tensor_types import TensorManifest
from edgeq.types import BundleFile, Target, to_json

__all__ = ["convert_tensor"]

Progress = Callable[[str, int, int, str], None]

LAYERS_FILE = "layers.json"
_LAYER_INPUTS = 1  # all activations of a call are held at once


def _silent(stage: str, done: int, total: int, detail: str) -> None:
    """A progress callback for those who want none."""


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
    with staging_folder(target) as work:
        prepared = prepare(job, work, progress)
        decision = decision_of(job, prepared)
        folder = work / "bundle"
        folder.mkdir()
        _write_layers(prepared.bench, decision.chosen, folder, progress)
        manifest = _write(prepared, decision, folder, target.name, progress)
        write_manifest(folder, manifest)
        open_bundle(folder, verify=True)
        verify_bundle(folder, prepared.bench.reference, prepared.samples, progress)
        publish(folder, target, force=force, marker=MANIFEST, check=refuse_strangers)
    return Bundle(out, manifest)


def _write(prepared: Prepared, decision: Decision, folder: Path, name: str, progress: Progress) -> TensorManifest:
    """Copy the artifact and what comes before and after it; describe them."""
    chosen = decision.chosen
    files = _copy(chosen.path, folder)
    if prepared.source.format == "hf":
        source = Path(prepared.source.path)
        for role, path in bundle_files(source, prepared.exported.artifact.task).items():
            place = path.relative_to(source)  # sentence-transformers has config.json twice
            (folder / place).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, folder / place)
            files.append(describe_file(folder, place.as_posix(), role))
    if (folder / LAYERS_FILE).exists():
        files.append(describe_file(folder, LAYERS_FILE, "layers"))
    sha256 = weights_sha256(prepared.source, lambda d, t, n: progress("hash source", d, t, n))
    artifact = prepared.exported.artifact
    return TensorManifest(
        schema_version=SCHEMA_VERSION,
        name=name,
        source=msgspec.structs.replace(prepared.source, weights_sha256=sha256),
        artifact=artifact,
        plan=make_plan(prepared, decision, folder / MODEL_FILE),
        files=tuple(files),
        coverage=chosen.coverage,
        quality=chosen.quality,
        budget=prepared.budget,
        built_for=prepared.profile.name,
        target=Target(arch=prepared.profile.arch, accelerator=prepared.profile.accelerator),
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


def _tools() -> dict[str, str]:
    wanted = {"onnx", "onnx-ir", "onnxruntime", "torch", "transformers"}
    there = {d.metadata["Name"].lower().replace("_", "-"): d.version for d in importlib.metadata.distributions()}
    return {"edgeq": __version__, **{name: there[name] for name in sorted(wanted & there.keys())}}
