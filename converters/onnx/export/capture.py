"""A module traced into an ONNX graph by torch's own exporter, with inputs and outputs in a fixed order and by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgeq.converters.onnx.export.problems import explain
from edgeq.converters.onnx.export.quiet import quiet
from edgeq.errors import ConversionError, EdgeqError, UnsupportedModelError, UsageError, require_package

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

__all__ = ["capture", "flatten_outputs", "pick_outputs", "rename_outputs", "run_module"]


def flatten_outputs(result: object) -> dict[str, torch.Tensor]:
    """Tensors in what a module returned, by name: keys and fields where it has them, ``output_0`` … otherwise."""
    found: dict[str, torch.Tensor] = {}
    _collect(result, "", found)
    return found


def _collect(value: object, name: str, found: dict[str, torch.Tensor]) -> None:
    import torch

    if isinstance(value, torch.Tensor):
        found[name or "output"] = value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _collect(item, f"{name}_{key}" if name else str(key), found)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            _collect(getattr(value, field.name), f"{name}_{field.name}" if name else field.name, found)
    elif isinstance(value, (tuple, list)):
        names = getattr(value, "_fields", range(len(value)))
        for key, item in zip(names, value, strict=True):
            _collect(item, f"{name or 'output'}_{key}" if isinstance(key, int) else key, found)


def run_module(
    module: torch.nn.Module, inputs: Mapping[str, torch.Tensor], constants: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """Outputs of one call by name, without gradients.

    Raises:
        ConversionError: the module itself refuses the call.
    """
    import torch

    try:
        with torch.no_grad(), quiet():
            result = module(**inputs, **constants)
    except EdgeqError:
        raise
    except Exception as error:  # whatever a module raises
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in inputs.items())
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ConversionError(
            f"{type(module).__name__} itself fails when it is called with {shapes}: {reason}",
            "Choose shapes that it takes, with --shape (shapes=)",
        ) from error
    return flatten_outputs(result)


def capture(
    module: torch.nn.Module,
    inputs: Mapping[str, torch.Tensor],
    outputs: Sequence[str],
    *,
    dynamic: Mapping[str, Mapping[int, str]],
    constants: Mapping[str, Any],
    opset: int,
) -> ir.Model:
    """Trace a module.

    Args:
        module: in evaluation mode.
        inputs: an example call.
        outputs: names, as by `flatten_outputs`, in the order of the graph's outputs.
        dynamic: open axes, input to position to name.
        constants: further arguments of every call.
        opset: of the graph.

    Raises:
        UnsupportedModelError: an operator that ONNX has not, or shapes that depend on data.
        ConversionError: torch cannot trace the module, or the opset is too old or too new.
    """
    require_package("onnxscript", "export", "to export models to ONNX")
    import torch

    names = tuple(inputs)
    shapes = {"tensors": tuple(dict(dynamic.get(name, {})) or None for name in names)}
    wrapper = _wrapped(module, names, tuple(outputs), dict(constants)).eval()
    try:
        with torch.no_grad(), quiet():
            program = torch.onnx.export(
                wrapper,
                tuple(inputs.values()),
                dynamo=True,
                verbose=False,
                opset_version=opset,
                input_names=list(names),
                output_names=list(outputs),
                dynamic_shapes=shapes if any(dynamic.values()) else None,
                external_data=False,
            )
    except Exception as error:  # torch's errors have no common base
        raise explain(error, module, names) from error
    assert program is not None
    model = program.model
    found = model.graph.opset_imports.get("")
    if found != opset:
        raise ConversionError(
            f"The graph cannot be written in opset {opset}: its operators need {found}", f"Choose opset {found}"
        )
    return model


def _wrapped(
    module: torch.nn.Module, names: tuple[str, ...], outputs: tuple[str, ...], constants: dict[str, Any]
) -> torch.nn.Module:
    import torch

    class Wrapped(torch.nn.Module):
        """Tensors in, tensors out; the module itself takes and gives them by name."""

        def __init__(self) -> None:
            super().__init__()
            self.model = module

        def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            found = flatten_outputs(self.model(**dict(zip(names, tensors, strict=True)), **constants))
            return tuple(found[name] for name in outputs)

    return Wrapped()


def pick_outputs(found: Sequence[str], wanted: Sequence[str]) -> dict[str, str]:
    """The wanted outputs that a model has, under their own names.

    Raises:
        UnsupportedModelError: it has none of them.
    """
    picked = {name: name for name in wanted if name in found}
    if not picked:
        raise UnsupportedModelError(
            f"The model answers with {', '.join(found) or 'no tensor'}, and with none of {', '.join(wanted)}",
            "Choose another task, or export it yourself and give the ONNX file",
        )
    return picked


def rename_outputs(found: Sequence[str], names: Sequence[str] | None) -> dict[str, str]:
    """The graph's names of a module's outputs.

    Args:
        found: names by `flatten_outputs`.
        names: by the user: for all outputs in order, or a choice of `found`; None keeps them.

    Raises:
        UsageError: they are neither.
    """
    if names is None:
        return {name: name for name in found}
    if set(names) <= set(found):
        return {name: name for name in names}
    if len(names) == len(found) and len(set(names)) == len(names):
        return dict(zip(found, names, strict=True))
    raise UsageError(
        f"{len(names)} output names were given, and the module has {len(found)} outputs: {', '.join(found)}",
        "Name each of them once, or leave the names out",
    )
