"""The way of a tensor model through the house: source, float ONNX, inputs, candidates, decision, checks, bundle.

As in `edgeq.planner.convert`, everything happens in a staging folder and is published by one rename.
"""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import shutil
from collections.abc import Callable, Iterator
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
from edgeq.converters.source import weights_sha256
from edgeq.planner.output import settled_output
from edgeq.planner.tensors.device_graph import DeviceGraph, variant_of, write_device_graph
from edgeq.planner.tensors.job import TensorJob
from edgeq.planner.tensors.prepare import Prepared, decision_of, prepare, prepare_other
from edgeq.planner.tensors.verify import verify_bundle
from edgeq.profiles.loader import load_profile
from edgeq.runtime.tensorrt.samples import SAMPLES_FILE, SAMPLES_ROLE, write_samples
from edgeq.staging import publish, staging_folder
from edgeq.tensor_types import TensorManifest, TensorVariant
from edgeq.types import BundleFile, Target

__all__ = ["convert_tensor"]

Progress = Callable[[str, int, int, str], None]

DEVICES = "devices"


def _silent(stage: str, done: int, total: int, detail: str) -> None:
    """A progress callback for those who want none."""


def convert_tensor(job: TensorJob, out: str | Path, *, force: bool = False, progress: Progress = _silent) -> Bundle:
    """Make a bundle of a model that is called with arrays.

    ::

        job = edgeq.TensorJob(
            model="./resnet-50",
            target="jetson-orin",
            shapes={"pixel_values": (1, 3, 224, 224)},
            calibration=edgeq.Calibration(inputs=Path("photos")),
        )
        bundle = edgeq.convert_tensor(job, "camera.edgeq")
        print(bundle.tensor.plan.scheme, bundle.tensor.quality)

    Args:
        job: what to convert, and for what.
        out: the bundle's folder; made, or replaced with ``force`` if it holds a bundle and nothing else.
        force: replace an existing bundle.
        progress: told stage, amount done, amount in all, and a detail.

    Raises:
        EdgeqError: anything that `edgeq.errors` names; nothing is left behind.
    """
    out = Path(out)
    target = settled_output(out, force=force)
    with staging_folder(target) as work:
        prepared = prepare(job, work, progress)
        folder = work / "bundle"
        made = write_device_graph(prepared, decision_of(job, prepared), folder, folder, progress)
        others = _others(job, prepared, folder, work, progress)
        variants = tuple(variant_of(one, graph) for one, graph in others)
        manifest = _manifest(prepared, made, variants, folder, target.name, progress)
        write_manifest(folder, manifest)
        open_bundle(folder, verify=True)
        for one in (prepared, *(other for other, _ in others)):
            if not one.backend.on_gpu:
                verify_bundle(folder, one.profile.name, one.bench.reference, one.samples, progress)
        publish(folder, target, force=force, marker=MANIFEST, check=refuse_strangers)
    return Bundle(out, manifest)


def _others(
    job: TensorJob, first: Prepared, folder: Path, work: Path, progress: Progress
) -> list[tuple[Prepared, DeviceGraph]]:
    """The same model for the other devices, each in a folder of its own."""
    found: list[tuple[Prepared, DeviceGraph]] = []
    for device in job.also_for:
        name = load_profile(device).name
        place = work / f"for-{name}"
        place.mkdir()
        prepared = prepare_other(job, first, device, place, progress)
        made = write_device_graph(prepared, decision_of(job, prepared), folder, folder / DEVICES / name, progress)
        found.append((prepared, made))
    return found


def _manifest(
    prepared: Prepared,
    made: DeviceGraph,
    others: tuple[TensorVariant, ...],
    folder: Path,
    name: str,
    progress: Progress,
) -> TensorManifest:
    """Copy what comes before and after the model, and describe everything."""
    files = [*made.files, *_settings(prepared, folder)]
    # What a GPU computes is compared with the CPU before it first serves.
    if any(plan.on_gpu for plan in (made.plan, *(other.plan for other in others))):
        write_samples(folder / SAMPLES_FILE, prepared.samples.judged)
        files.append(describe_file(folder, SAMPLES_FILE, SAMPLES_ROLE))
    source = prepared.source
    if source.weights_sha256 is None:
        sha256 = weights_sha256(source, lambda d, t, n: progress("hash source", d, t, n))
        source = msgspec.structs.replace(source, weights_sha256=sha256)
    return TensorManifest(
        schema_version=SCHEMA_VERSION,
        name=name,
        source=source,
        artifact=prepared.exported.artifact,
        plan=made.plan,
        files=tuple(files),
        coverage=made.coverage,
        quality=made.quality,
        budget=prepared.budget,
        built_for=prepared.profile.name,
        target=Target(arch=prepared.profile.arch, accelerator=prepared.profile.accelerator),
        others=others,
        tools=_tools(),
        created_utc=dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
    )


def _settings(prepared: Prepared, folder: Path) -> Iterator[BundleFile]:
    """Files of what comes before and after the model; an ONNX file has none of its own."""
    if prepared.beside is None or prepared.source.format == "onnx":
        return
    for role, path in bundle_files(prepared.beside, prepared.exported.artifact.task).items():
        place = path.relative_to(prepared.beside)  # sentence-transformers has config.json twice
        (folder / place).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, folder / place)
        yield describe_file(folder, place.as_posix(), role)


def _tools() -> dict[str, str]:
    wanted = {"onnx", "onnx-ir", "onnxruntime", "torch", "transformers"}
    there = {d.metadata["Name"].lower().replace("_", "-"): d.version for d in importlib.metadata.distributions()}
    return {"edgeq": __version__, **{name: there[name] for name in sorted(wanted & there.keys())}}
