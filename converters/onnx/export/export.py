"""Hugging Face folders and PyTorch modules to float ONNX, each checked against torch before it is handed out."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.onnx.export.capture import capture, pick_outputs, rename_outputs, run_module
from edgeq.converters.onnx.export.embedding import class_count, class_labels, read_config, read_embedding
from edgeq.converters.onnx.export.inputs import InputPlan, plan_inputs
from edgeq.converters.onnx.export.load import forward_parameters, load_model
from edgeq.converters.onnx.export.problems import is_unsupported_operator
from edgeq.converters.onnx.export.tasks import Task, architecture_of, model_task
from edgeq.converters.onnx.export.tidy import tidy
from edgeq.converters.onnx.export.verify import OutputCheck, Reference, check_outputs, session_caller
from edgeq.converters.onnx.export.write import describe_graph, fresh_output, shape_notes, write_graph
from edgeq.errors import ConversionError, EdgeqError, UnsupportedModelError, UsageError, require_package
from edgeq.inputs.arrays import check_arrays
from edgeq.tensor_types import TensorArtifact

if TYPE_CHECKING:
    import torch

__all__ = ["Exported", "Progress", "check_exported", "export_model", "export_module"]

Progress = Callable[[int, int, str], None]
Arrays = Mapping[str, NDArray[Any]]

_STEPS = ("loading the model", "tracing the graph", "writing the graph", "checking it against torch")
_SEED = 20
_LONGEST = 200  # of a cause within a note
_DETECTOR_CALLS = 2  # of each size, where candidates of equal scores may spoil one


@dataclasses.dataclass(frozen=True)
class Exported:
    """A float model in ONNX.

    Attributes:
        path: of the ``.onnx`` file; its weights may lie beside it.
        artifact: what a session must know.
        checks: against what it was made from, one for each output.
        notes: what a user must know, one line each.
        n_classes: that the model knows, with names or without; None where nothing says it.
        reference: torch's model, for `check_exported`; None once it was let go.
    """

    path: Path
    artifact: TensorArtifact
    checks: tuple[OutputCheck, ...]
    notes: tuple[str, ...] = ()
    n_classes: int | None = None
    reference: Reference | None = None


def check_exported(exported: Exported, inputs: Iterable[Arrays]) -> Exported:
    """Compare with torch again, on real inputs.

    Args:
        exported: with its reference.
        inputs: calls that it takes.

    Returns:
        It, with what was found on these inputs too, and without its reference, which holds all weights.

    Raises:
        ConversionError: the graph answers differently.
    """
    reference = exported.reference
    if reference is None:
        return exported
    found = check_outputs(reference.call, session_caller(exported.path), inputs, as_sets=reference.unordered)
    more = {check.name: check for check in found}
    checks = tuple(_together(check, more.get(check.name)) for check in exported.checks)
    return dataclasses.replace(exported, checks=checks, reference=None)


def _together(drawn: OutputCheck, real: OutputCheck | None) -> OutputCheck:
    """The one that is nearer to its tolerance, of all calls."""
    if real is None:
        return drawn
    worse = max(drawn, real, key=lambda check: check.max_error / check.tolerance if check.tolerance else 0.0)
    return dataclasses.replace(worse, calls=drawn.calls + real.calls)


@dataclasses.dataclass(frozen=True)
class _Job:
    """One module on its way."""

    module: torch.nn.Module
    names: Callable[[Sequence[str]], Mapping[str, str]]  # the graph's names of the module's outputs
    constants: Mapping[str, Any]
    opset: int
    out: Path
    progress: Progress | None
    unordered: bool = False

    def step(self, index: int) -> None:
        if self.progress is not None:
            self.progress(index, len(_STEPS), _STEPS[index] if index < len(_STEPS) else "done")


def export_model(
    folder: Path,
    out: Path,
    *,
    task: str | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    opset: int = 20,
    inputs: Iterable[Arrays] = (),
    progress: Progress | None = None,
) -> Exported:
    """Export a Hugging Face model.

    Axes stay open as the task has it: the batch, and the number of tokens or samples; height and width only where the
    model's preprocessing leaves them open. An axis that torch cannot keep open is fixed, and `Exported.notes` says so.

    Args:
        folder: with config.json and safetensors.
        out: the ``.onnx`` file to write; it must not exist. Weights beyond 64 MiB go to ``<name>.data`` beside it.
        task: as transformers' pipelines call it; None takes what the model was made for.
        shapes: of inputs, such as ``{"pixel_values": (1, 3, 224, 224)}``: then every axis is fixed.
        opset: of the graph; `edgeq.profiles.onnx.opsets` knows what targets take.
        inputs: real calls to check with, beside random ones.
        progress: called with steps done, steps in all and the step's name.

    Raises:
        UsageError: a task, shapes or inputs that make no sense.
        SourceError: the folder's files are missing, damaged, pickled, or lack weights.
        UnsupportedModelError: an architecture, task or operator that cannot be exported.
        ConversionError: torch cannot trace the model, or the graph answers differently.
        MissingPackageError: the extra ``export`` is not installed.
    """
    require_package("torch", "export", "to export Hugging Face models")
    _report(progress, 0)
    config = read_config(folder)
    if task is None and (folder / "modules.json").is_file():
        task = "feature-extraction"  # sentence-transformers' models name the class that they were pretrained as
    chosen = model_task(config, task)
    module = load_model(folder, chosen, config)
    settings = _settings(module, config)
    plan = plan_inputs(chosen, folder, settings, forward_parameters(module), shapes)
    job = _Job(
        module,
        lambda found: pick_outputs(found, chosen.outputs),
        plan.constants,
        opset,
        out,
        progress,
        chosen.unordered,
    )
    with fresh_output(out):
        checks, reference, notes = _attempts(job, plan, inputs)
        specs, answers, found_opset = describe_graph(out)
    embedding, remarks = read_embedding(folder, settings) if _embeds(chosen) else (None, ())
    artifact = TensorArtifact(
        architecture=architecture_of(config),
        task=chosen.name,
        opset=found_opset,
        inputs=specs,
        outputs=answers,
        embedding=embedding,
        labels=class_labels(settings) if chosen.name not in _UNLABELLED else (),
    )
    own = (chosen.note,) if chosen.note else ()
    about = (*notes, *_size_notes(artifact), *shape_notes(out))
    notes = (*own, *plan.notes, *about, *remarks, *_file_notes(folder, chosen))
    return Exported(out, artifact, checks, notes, class_count(settings), reference)


_UNLABELLED = frozenset({"feature-extraction", "image-feature-extraction", "fill-mask", "question-answering"})
_UNLABELLED |= {"depth-estimation", "automatic-speech-recognition"}


def _embeds(task: Task) -> bool:
    return task.name == "feature-extraction" and task.modality == "text"


def _settings(module: torch.nn.Module, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration with transformers' defaults for what config.json leaves out."""
    own = getattr(module, "config", None)
    return {**config, **own.to_dict()} if own is not None else config


def _size_notes(artifact: TensorArtifact) -> tuple[str, ...]:
    if any("height" in spec.shape for spec in artifact.inputs):
        return ("Height and width stay open, as the preprocessing has it; a fixed shape, as of a camera, is faster",)
    return ()


def _file_notes(folder: Path, task: Task) -> tuple[str, ...]:
    if task.modality == "text" and not (folder / "tokenizer.json").is_file():
        return (f"{folder.name} has no tokenizer.json: texts must be made into tokens elsewhere",)
    if task.modality != "text" and not (folder / "preprocessor_config.json").is_file():
        what = "images must be scaled and normalized" if task.modality == "image" else "sound must be made into inputs"
        return (f"{folder.name} has no preprocessor_config.json: {what} elsewhere",)
    return ()


def export_module(
    module: torch.nn.Module,
    inputs: Mapping[str, torch.Tensor],
    out: Path,
    *,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
    output_names: Sequence[str] | None = None,
    opset: int = 20,
    progress: Progress | None = None,
) -> Exported:
    """Export any module.

    It is checked with the given inputs, and with the same inputs doubled along each dynamic axis.

    Args:
        module: on the CPU; it is exported as it is in evaluation mode, and left in the mode that it had.
        inputs: an example call by the names of its arguments, which become the graph's.
        out: the ``.onnx`` file to write; it must not exist. Weights beyond 64 MiB go to ``<name>.data`` beside it.
        dynamic: open axes, input to position to name; axes of one name have one size.
        output_names: of the graph, for all outputs in order, or a choice of the names that the module gives them;
            None keeps those names, or takes ``output``, ``output_0`` … where it gives none.
        opset: of the graph.
        progress: called with steps done, steps in all and the step's name.

    Raises:
        UsageError: dynamic axes or output names that are not there.
        UnsupportedModelError: an operator that cannot be exported.
        ConversionError: torch cannot trace the module, or the graph answers differently.
        MissingPackageError: the extra ``export`` is not installed.
    """
    require_package("torch", "export", "to export PyTorch modules")
    axes = {name: dict(axes) for name, axes in (dynamic or {}).items()}
    _check_dynamic(axes, inputs)
    job = _Job(module, lambda found: rename_outputs(found, output_names), {}, opset, out, progress)
    calls = [inputs, *_doubled(inputs, axes)]
    with fresh_output(out), _evaluating(module):
        checks, reference = _export_once(job, inputs, axes, [_as_arrays(call) for call in calls])
        specs, answers, found_opset = describe_graph(out)
    artifact = TensorArtifact(
        architecture=type(module).__name__, task="tensor", opset=found_opset, inputs=specs, outputs=answers
    )
    return Exported(out, artifact, checks, shape_notes(out), reference=reference)


@contextlib.contextmanager
def _evaluating(module: torch.nn.Module) -> Iterator[None]:
    """In evaluation mode, and then as it was."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def _attempts(
    job: _Job, plan: InputPlan, real: Iterable[Arrays]
) -> tuple[tuple[OutputCheck, ...], Reference, tuple[str, ...]]:
    """Export with all open axes, and if that fails with fewer, which a note then says."""
    first: EdgeqError | None = None
    given = tuple(real)
    for fixed in _stages(plan):
        attempt = plan.fixed(fixed)
        try:
            return (*_attempt(job, attempt, given), _fixed_note(plan, fixed, first))
        except (ConversionError, UnsupportedModelError) as error:
            first = first or error
            if error.__cause__ is None and isinstance(error, UnsupportedModelError):
                raise  # the model itself is to blame, and not how torch traces it
            if error.__cause__ is not None and is_unsupported_operator(error.__cause__):
                raise
    assert first is not None
    raise first


def _stages(plan: InputPlan) -> list[frozenset[str]]:
    """Sets of axes to fix, from none to all: an open batch is worth most, and texts of all lengths next."""
    names = frozenset(plan.sizes)
    return list(dict.fromkeys([frozenset(), names & {"height", "width", "samples"}, names - {"sequence"}, names]))


def _fixed_note(plan: InputPlan, fixed: frozenset[str], error: EdgeqError | None) -> tuple[str, ...]:
    if not fixed or error is None:
        return ()
    sizes = ", ".join(f"{name}={plan.usual_sizes[name]}" for name in plan.sizes if name in fixed)
    cause = error.cause if len(error.cause) <= _LONGEST else f"{error.cause[:_LONGEST]}…"
    return (f"Fixed at {sizes}, since the model cannot be exported with these axes open ({cause})",)


def _attempt(job: _Job, plan: InputPlan, real: Sequence[Arrays]) -> tuple[tuple[OutputCheck, ...], Reference]:
    import torch

    example = {name: torch.from_numpy(array) for name, array in plan.draw(plan.sizes, _SEED).items()}
    for inputs in real:
        check_arrays(inputs, plan.specs, finite=True, source="an input to check with")
    repeats = _DETECTOR_CALLS if job.unordered else 1
    drawn = [plan.draw(plan.sizes, _SEED + 1 + i) for i in range(repeats)]
    if plan.sizes:
        drawn += [plan.draw(plan.other_sizes, _SEED + 101 + i) for i in range(repeats)]
    return _export_once(job, example, plan.dynamic, [*drawn, *real])


def _export_once(
    job: _Job,
    example: Mapping[str, torch.Tensor],
    dynamic: Mapping[str, Mapping[int, str]],
    calls: Iterable[Arrays],
) -> tuple[tuple[OutputCheck, ...], Reference]:
    """Trace, clean, write and check."""
    import torch

    job.step(1)
    found = run_module(job.module, example, job.constants)
    if not found:
        raise UnsupportedModelError("The module gives no tensors", "Let it return the tensors that are wanted")
    names = job.names(tuple(found))
    model = capture(job.module, example, tuple(names), dynamic=dynamic, constants=job.constants, opset=job.opset)
    for value, name in zip(model.graph.outputs, names.values(), strict=True):
        value.name = name
    tidy(model)
    job.step(2)
    write_graph(model, job.out)
    job.step(3)

    def reference(inputs: Arrays) -> dict[str, NDArray[Any]]:
        tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in inputs.items()}
        with _evaluating(job.module):  # a module in memory may be in training, when it is asked again
            outputs = run_module(job.module, tensors, job.constants)
        return {new: outputs[old].detach().cpu().numpy() for old, new in names.items()}

    checks = check_outputs(reference, session_caller(job.out), calls, as_sets=job.unordered)
    job.step(len(_STEPS))
    return checks, Reference(reference, job.unordered)


def _check_dynamic(dynamic: Mapping[str, Mapping[int, str]], inputs: Mapping[str, torch.Tensor]) -> None:
    for name, axes in dynamic.items():
        if name not in inputs:
            raise UsageError(f"There is no input {name!r} to have dynamic axes", f"Name one of {', '.join(inputs)}")
        for axis in axes:
            if not 0 <= axis < inputs[name].ndim:
                raise UsageError(f"The input {name!r} has no axis {axis}", f"It has {inputs[name].ndim}, from 0 on")


def _doubled(
    inputs: Mapping[str, torch.Tensor], dynamic: Mapping[str, Mapping[int, str]]
) -> Iterable[Mapping[str, torch.Tensor]]:
    """The same call with twice as much along each open axis: values that the module takes for certain."""
    names = dict.fromkeys(itertools.chain.from_iterable(axes.values() for axes in dynamic.values()))
    for wanted in names:
        longer = {}
        for name, tensor in inputs.items():
            axes = [axis for axis, named in dynamic.get(name, {}).items() if named == wanted]
            longer[name] = tensor.repeat([2 if axis in axes else 1 for axis in range(tensor.ndim)])
        yield longer


def _as_arrays(call: Mapping[str, torch.Tensor]) -> dict[str, NDArray[Any]]:
    return {name: tensor.detach().cpu().numpy() for name, tensor in call.items()}


def _report(progress: Progress | None, index: int) -> None:
    if progress is not None:
        progress(index, len(_STEPS), _STEPS[index])
