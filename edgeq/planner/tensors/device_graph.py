"""What a bundle holds for one device: its graph, where the error enters, and an engine where one can be shipped."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
from numpy.typing import NDArray

from edgeq.bundle import describe_file
from edgeq.converters.onnx.layers import compare_layers
from edgeq.errors import MissingPackageError
from edgeq.planner.tensors.candidates import Workbench
from edgeq.planner.tensors.decide import Decision
from edgeq.planner.tensors.plan import make_plan
from edgeq.planner.tensors.prepare import Prepared
from edgeq.planner.tensors.verify import verify_graph
from edgeq.planner.tensors.writing import MODEL_FILE
from edgeq.runtime.tensorrt.check import answered
from edgeq.runtime.tensorrt.samples import ANSWERS_FILE, ANSWERS_ROLE, KEPT_SAMPLES, write_samples
from edgeq.tensor_types import Coverage, TensorPlan, TensorQuality, TensorVariant
from edgeq.types import BundleFile, Target, to_json

__all__ = ["DeviceGraph", "variant_of", "write_device_graph"]

LAYERS_FILE = "layers.json"
_LAYER_INPUTS = 1  # all activations of a call are held at once
# The one backend whose engines depend on the kind of GPU alone, so that one can be built where there is none.
_SHIPS_ENGINES = "tensorrt-rtx"

Progress = Callable[[str, int, int, str], None]


@dataclasses.dataclass(frozen=True)
class DeviceGraph:
    """What was written.

    Attributes:
        plan: how it was made.
        files: by their paths in the bundle.
        coverage: what is truly quantized; None for a float model.
        quality: it against the float model; None if it is the float model.
    """

    plan: TensorPlan
    files: tuple[BundleFile, ...]
    coverage: Coverage | None
    quality: TensorQuality | None


def write_device_graph(
    prepared: Prepared, decision: Decision, bundle: Path, place: Path, progress: Progress
) -> DeviceGraph:
    """Write and check the files of one device.

    Args:
        prepared: the model and the device.
        decision: what is shipped.
        bundle: that is being made.
        place: the bundle itself, or a folder in it, which is made.
        progress: told stage, amount done, amount in all, and a detail.

    Raises:
        BudgetError: it takes more memory than the budget has.
        ConversionError: the outputs of a GPU's graph are not those of the float model.
        SessionError: that graph cannot be loaded.
        UnsupportedModelError: TensorRT does not take the graph.
    """
    chosen = decision.chosen
    place.mkdir(parents=True, exist_ok=True)
    files = [(path, role) for path, role in _copied(chosen.path, place)]
    if chosen.made_from is not None:
        _write_layers(prepared.bench, chosen.made_from, chosen.on_cpu, place / LAYERS_FILE, progress)
        files.append((place / LAYERS_FILE, "layers"))
    plan = make_plan(prepared, decision, place / MODEL_FILE)
    if prepared.backend.on_gpu:  # what a CPU runs is loaded once the bundle is complete
        on_cpu = chosen.stand_in or place / MODEL_FILE
        verify_graph(on_cpu, prepared.bench.reference, prepared.samples, progress)
    if chosen.stand_in is not None:
        write_samples(place / ANSWERS_FILE, (answer for _, answer in answered(chosen.stand_in, _kept(prepared))))
        files.append((place / ANSWERS_FILE, ANSWERS_ROLE))
    if plan.backend == _SHIPS_ENGINES:
        engine, notes = _ship_engine(prepared, plan, place, progress)
        files += engine
        plan = msgspec.structs.replace(plan, notes=(*plan.notes, *notes))
    described = tuple(describe_file(bundle, path.relative_to(bundle).as_posix(), role) for path, role in files)
    return DeviceGraph(plan, described, chosen.coverage, chosen.quality)


def _kept(prepared: Prepared) -> Iterator[Mapping[str, NDArray[Any]]]:
    """The samples that the bundle will bring."""
    yield from prepared.samples.judged[:KEPT_SAMPLES]


def variant_of(prepared: Prepared, made: DeviceGraph) -> TensorVariant:
    """The record of a device that is not the bundle's first."""
    return TensorVariant(
        built_for=prepared.profile.name,
        target=Target(arch=prepared.profile.arch, accelerator=prepared.profile.accelerator),
        plan=made.plan,
        files=made.files,
        coverage=made.coverage,
        quality=made.quality,
        budget=prepared.budget,
    )


def _copied(model: Path, place: Path) -> Iterator[tuple[Path, str]]:
    """The model and its external data, all files of its folder."""
    for path in sorted(model.parent.iterdir()):
        shutil.copyfile(path, place / path.name)
        yield place / path.name, "model" if path.name == MODEL_FILE else "data"


def _write_layers(bench: Workbench, made_from: Path, model: Path, out: Path, progress: Progress) -> None:
    """Where the error enters, layer by layer; a smoothed model has other values inside than the one it was made of."""
    found = compare_layers(
        made_from,
        model,
        bench.samples.judged[:_LAYER_INPUTS],
        threads=bench.threads,
        progress=lambda done, total, what: progress("compare layers", done, total, what),
    )
    out.write_bytes(to_json(found))


def _ship_engine(
    prepared: Prepared, plan: TensorPlan, place: Path, progress: Progress
) -> tuple[list[tuple[Path, str]], tuple[str, ...]]:
    """Build the engine for the profile's GPU; without TensorRT-RTX here a note says why there is none."""
    from edgeq.runtime.tensorrt.cache import ENGINE, ENGINE_ROLE, INFO, INFO_ROLE
    from edgeq.runtime.tensorrt.serving import ship_engine
    from edgeq.runtime.tensorrt.targets import settings_for, target_of
    from edgeq.runtime.tensorrt.versions import find_tensorrt

    try:
        trt = find_tensorrt("tensorrt_rtx")
    except MissingPackageError as error:
        return [], (f"no engine is shipped, the device builds its own at the first load: {error.cause}",)
    target = target_of(prepared.profile)
    progress("build engine", 0, 1, target.sm)
    folder = place / "engines" / target.sm
    folder.parent.mkdir(exist_ok=True)
    ship_engine(trt, place / MODEL_FILE, folder, settings_for(target, plan, prepared.budget), target)
    progress("build engine", 1, 1, target.sm)
    return [(folder / ENGINE, ENGINE_ROLE), (folder / INFO, INFO_ROLE)], ()
