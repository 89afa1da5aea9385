"""A PyTorch module in memory as a model to convert."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgeq.converters.onnx.export.embedding import class_count
from edgeq.converters.onnx.export.export import Exported, export_module
from edgeq.errors import UsageError, require_package
from edgeq.types import ModelSource

if TYPE_CHECKING:
    import torch

__all__ = ["ModuleSource", "describe_module", "export_source"]

_DTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


@dataclasses.dataclass(frozen=True, eq=False)
class ModuleSource:
    """A PyTorch module as a model; nothing is read from or written to its own files.

    ::

        example = {"image": torch.zeros(1, 3, 224, 224)}
        source = edgeq.ModuleSource(my_network, inputs=example, name="grasp", task="image-classification")
        edgeq.convert_tensor(edgeq.TensorJob(model=source, target="laptop-cpu"), "grasp.edgeq")

    Attributes:
        module: a ``torch.nn.Module`` on the CPU. It is exported as it is in evaluation mode, and left in its own.
        inputs: an example call by the names of ``forward``'s arguments, tensors or arrays. Their sizes are fixed, but
            for the axes in ``dynamic``.
        name: for people; None for the module's class.
        task: as transformers' pipelines call it; it says what agreement is measured beside cosine.
        dynamic: open axes, input to position to name. ``"batch"`` and ``"sequence"`` have usual sizes.
        output_names: of all outputs in order; None for the names that the module itself gives, or ``output_0`` ….
        labels: of classes, by index. A detector without them has as many classes as its configuration or else the last
            axis of its logits says; name them all where one more column stands for "nothing".
        preprocessing: folder with ``preprocessor_config.json`` or ``tokenizer.json`` for what comes before the model,
            which the bundle then holds; None if there is none.
    """

    module: torch.nn.Module
    inputs: Mapping[str, torch.Tensor | NDArray[Any]]
    name: str | None = None
    task: str = "tensor"
    dynamic: Mapping[str, Mapping[int, str]] = dataclasses.field(default_factory=dict)
    output_names: tuple[str, ...] | None = None
    labels: tuple[str, ...] = ()
    preprocessing: Path | None = None


def describe_module(source: ModuleSource) -> ModelSource:
    """Where a bundle says that it comes from.

    Its hash is over names, types, shapes and bytes of the module's state in the order of the names.

    Raises:
        UsageError: it is no module.
        MissingPackageError: the extra ``export`` is not installed.
    """
    require_package("torch", "export", "to export PyTorch modules")
    import torch

    if not isinstance(source.module, torch.nn.Module):
        raise UsageError(
            f"{type(source.module).__name__} is no torch.nn.Module", "Give a module, or TensorJob(model=PATH)"
        )
    counts: Counter[str] = Counter()
    for weight in source.module.parameters():
        counts[str(weight.dtype).removeprefix("torch.")] += weight.numel()
    usual = counts.most_common(1)[0][0] if counts else "float32"
    return ModelSource(
        id=source.name or type(source.module).__name__,
        path="",
        format="module",
        architecture=type(source.module).__name__,
        n_params=counts.total(),
        dtype=_DTYPES.get(usual, usual),
        weights_sha256=_state_sha256(source.module),
    )


def _state_sha256(module: torch.nn.Module) -> str:
    import torch

    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        if isinstance(value, torch.Tensor):  # modules may keep other things, too
            tensor = value.detach().cpu().contiguous()
            digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def export_source(source: ModuleSource, out: Path, progress: Callable[[int, int, str], None]) -> Exported:
    """Its float ONNX, checked against the module.

    Args:
        source: the module.
        out: the ``.onnx`` file to write.
        progress: called with steps done, steps in all and the step's name.

    Raises:
        EdgeqError: as `edgeq.converters.onnx.export.export.export_module`.
    """
    import torch

    inputs = {
        name: torch.from_numpy(np.ascontiguousarray(value)) if isinstance(value, np.ndarray) else value
        for name, value in source.inputs.items()
    }
    if not inputs or not all(isinstance(value, torch.Tensor) for value in inputs.values()):
        raise UsageError(
            "A module is exported with an example of each input, as tensors or arrays",
            'Write ModuleSource(module, inputs={"image": torch.zeros(1, 3, 224, 224)})',
        )
    found = export_module(
        source.module,
        inputs,
        out,
        dynamic=source.dynamic,
        output_names=source.output_names,
        progress=progress,
    )
    artifact = msgspec.structs.replace(found.artifact, task=source.task, labels=tuple(source.labels))
    n_classes = len(artifact.labels) or class_count(_config_of(source.module))
    return dataclasses.replace(found, artifact=artifact, n_classes=n_classes)


def _config_of(module: torch.nn.Module) -> Mapping[str, Any]:
    """What the configuration of a module of transformers says of classes; nothing for other modules."""
    config = getattr(module, "config", None)
    return {name: getattr(config, name, None) for name in ("id2label", "num_labels")}
