"""Models with random weights whose signals live: no layer's outputs die out or grow, and answers depend on inputs.

What `transformers` draws fits models that are trained later. After tens of convolutions nothing of a signal is left,
and ranges of activations, accuracy and engines say nothing then. So one call is watched layer by layer, each seeing
what the layers before it give already: convolutions are scaled to outputs of variance 1 (Mishkin and Matas, "All you
need is a good init", 2015), and batch normalizations take mean and variance of what they read, as training gives them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["Shapes", "enliven", "save_random", "variation"]

Shapes = Mapping[str, tuple[int, ...]]

_CALLS = 4  # in one batch
_LARGEST_ID = 100
_LEAST_VARIATION = 1e-4


def save_random(make: Callable[[], Any], shapes: Shapes, folder: Path, part: str = "") -> Path:
    """A Hugging Face folder of a model with random, live weights; the same each time.

    Args:
        make: gives the model.
        shapes: of the inputs of one call.
        folder: is written.
        part: attribute of the model that takes the inputs; empty for all of it.

    Raises:
        ValueError: some output of the model hardly depends on its inputs.
    """
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    model = make().eval()
    called = model.get_submodule(part)
    enliven(called, drawn(shapes))
    found = variation(called, drawn(shapes))
    dead = sorted(name for name, share in found.items() if share < _LEAST_VARIATION)
    if dead:
        raise ValueError(f"the output {dead[0]} of {type(model).__name__} hardly depends on its inputs: {found}")
    model.save_pretrained(folder)
    return folder


def drawn(shapes: Shapes, calls: int = _CALLS) -> dict[str, torch.Tensor]:
    """So many calls in one batch: ids below 100, masks of ones, and normally distributed numbers."""
    import torch

    made: dict[str, torch.Tensor] = {}
    for name, (_, *sizes) in shapes.items():
        if "mask" in name:
            made[name] = torch.ones((calls, *sizes), dtype=torch.int64)
        elif "ids" in name:
            made[name] = torch.randint(0, _LARGEST_ID, (calls, *sizes))
        else:
            made[name] = torch.randn((calls, *sizes))
    return made


def enliven(model: torch.nn.Module, inputs: Mapping[str, torch.Tensor]) -> None:
    """Scale convolutions, and give batch normalizations their statistics, in one call."""
    import torch

    convolutions = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    seen: set[torch.nn.Module] = set()

    def scaled(module: torch.nn.Module, _: Any, output: torch.Tensor) -> torch.Tensor:  # noqa: ANN401
        if module in seen:  # shared by several places
            return output
        seen.add(module)
        scale = output.std()
        for parameter in module.parameters(recurse=False):
            parameter.div_(scale)
        return output / scale

    def settled(module: torch.nn.Module, given: tuple[torch.Tensor]) -> None:
        if module in seen:
            return
        seen.add(module)
        axes = [0, *range(2, given[0].ndim)]
        variance, mean = torch.var_mean(given[0], axes, correction=0)
        for name, found in (("running_mean", mean), ("running_var", variance)):
            module.get_buffer(name).copy_(found)
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and module.affine:  # noqa: SLF001
            torch.nn.init.ones_(module.weight)  # some of transformers' initial values let signals die

    hooks = []
    for module in model.modules():
        if isinstance(module, convolutions) and not torch.nn.utils.parametrize.is_parametrized(module):
            hooks.append(module.register_forward_hook(scaled))
        elif "running_var" in dict(
            module.named_buffers(recurse=False)
        ):  # frozen ones too, which are classes of their own
            hooks.append(module.register_forward_pre_hook(settled))
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()


def variation(model: torch.nn.Module, inputs: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Of each output of floats: the root mean square of what differs between calls over that of the whole."""
    import torch

    with torch.no_grad():
        outputs = model(**inputs)
    found: dict[str, float] = {}
    for name, value in outputs.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim > 1:
            differs = (value - value.mean(0, keepdim=True)).square().mean().sqrt()
            found[name] = float(differs / value.square().mean().sqrt().clamp_min(1e-30))
    return found
