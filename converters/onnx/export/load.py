"""A Hugging Face folder as a PyTorch module in float32: safetensors only, none of its code, all weights present."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeq.converters.checkpoint import Checkpoint
from edgeq.converters.onnx.export.quiet import quiet
from edgeq.converters.onnx.export.tasks import Task, architecture_of
from edgeq.errors import EdgeqError, MissingPackageError, SourceError, UnsupportedModelError, require_package

if TYPE_CHECKING:
    import torch

__all__ = ["forward_parameters", "load_model"]

_PURPOSE = "to export Hugging Face models"
_LONGEST = 240
_POOLER = "pooler."


def load_model(folder: Path, task: Task, config: Mapping[str, Any]) -> torch.nn.Module:
    """The model in evaluation mode with eager attention, whose graphs are the plainest.

    Args:
        folder: with config.json and safetensors.
        task: that it is loaded for.
        config: contents of config.json.

    Raises:
        MissingPackageError: torch, transformers, or what the model itself needs is not installed.
        SourceError: files are missing, damaged, pickled, or lack weights that the task needs.
        UnsupportedModelError: the model is quantized, or its code is not part of transformers.
    """
    require_package("torch", "export", _PURPOSE)
    require_package("transformers", "export", _PURPOSE)
    _refuse_quantized(config)
    Checkpoint.open(folder)  # refuses pickles and damaged files in one line
    kind = _model_class(task, config)
    model, missing = _from_pretrained(kind, folder)
    if missing and all(_POOLER in name for name in missing) and "add_pooling_layer" in _parameters(kind):
        model, missing = _from_pretrained(kind, folder, add_pooling_layer=False)
    if missing:
        raise SourceError(
            f"{folder} lacks {len(missing)} weights that {task.name} needs, such as {missing[0]}",
            "Choose the task that the model was trained for, or leave it out",
        )
    if task.part:
        model = model.get_submodule(task.part)
    model.eval().requires_grad_(False)
    _answer_plainly(model)
    return model


def forward_parameters(model: torch.nn.Module) -> frozenset[str]:
    """Names of the arguments of a model's ``forward``."""
    return frozenset(inspect.signature(model.forward).parameters)


def _refuse_quantized(config: Mapping[str, Any]) -> None:
    settings = config.get("quantization_config")
    if settings:
        method = settings.get("quant_method", "quantized") if isinstance(settings, Mapping) else "quantized"
        raise UnsupportedModelError(
            f"The checkpoint is quantized already ({method})", "Give the original in F32, F16 or BF16"
        )


def _model_class(task: Task, config: Mapping[str, Any]) -> type[Any]:
    """The class by name where the task is the architecture's own, transformers' choice for the task otherwise."""
    import transformers

    architecture = architecture_of(config)
    if task.model_class is not None:
        found: type[Any] | None = getattr(transformers, task.model_class, None)
        if found is None:
            raise UnsupportedModelError(
                f"transformers {transformers.__version__} has no {task.model_class}", "Install a newer transformers"
            )
        return found
    if config.get("model_type") not in transformers.CONFIG_MAPPING:
        raise UnsupportedModelError(
            f"{architecture} ({config.get('model_type')!r}) is not part of transformers {transformers.__version__}, "
            "and edgeq never runs code of a model's folder",
            "Install a newer transformers, or export it yourself and give the ONNX file",
        )
    automatic = getattr(transformers, task.auto_class)
    kind = transformers.CONFIG_MAPPING[config["model_type"]]
    mapped = automatic._model_mapping.get(kind, None)  # noqa: SLF001 - the table behind the public class
    classes: list[type[Any] | None] = list(mapped) if isinstance(mapped, (tuple, list)) else [mapped]
    own = [candidate for candidate in classes if candidate is not None and candidate.__name__ == architecture]
    if own:
        return own[0]
    named: type[Any] | None = getattr(transformers, architecture, None)
    if named is not None and _serves(architecture, task):
        return named
    first = classes[0]
    if first is None:
        raise UnsupportedModelError(
            f"transformers has no {task.name} for {config['model_type']}", "Choose another task, or leave it out"
        )
    return first


def _serves(architecture: str, task: Task) -> bool:
    """Whether a class outside of transformers' table of the task is named after it, such as SiglipVisionModel."""
    return architecture.endswith(task.auto_class.removeprefix("AutoModel") or ("Model", "Encoder", "WithProjection"))


def _from_pretrained(kind: type[Any], folder: Path, **options: bool) -> tuple[torch.nn.Module, list[str]]:
    """The loaded model, and names of weights that it has and the folder has not."""
    import torch

    if "add_pooling_layer" in _parameters(kind) and getattr(kind, "main_input_name", "") == "input_ids":
        options["add_pooling_layer"] = False  # of texts the hidden states alone are exported
    try:
        with quiet():
            model, report = kind.from_pretrained(
                str(folder),
                dtype=torch.float32,
                attn_implementation="eager",
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
    except EdgeqError:
        raise
    except ImportError as error:
        raise MissingPackageError(f"{kind.__name__} cannot be loaded: {_first_line(error)}", "Install it") from error
    except Exception as error:  # transformers' errors have no common base
        raise SourceError(
            f"transformers cannot load {folder} as {kind.__name__}: {_first_line(error)}",
            "Check the model's files against where they come from, or choose another task",
        ) from error
    return model, sorted(report["missing_keys"])


def _parameters(kind: type[Any]) -> frozenset[str]:
    return frozenset(inspect.signature(kind.__init__).parameters)


def _first_line(error: BaseException) -> str:
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}…"


def _answer_plainly(model: torch.nn.Module) -> None:
    """Outputs by name and nothing besides, whatever config.json asks for."""
    own: Any = model.config
    for config in (own, getattr(own, "vision_config", None), getattr(own, "text_config", None)):
        if config is not None and not isinstance(config, dict):
            config.return_dict = True
            config.output_hidden_states = False
            config.output_attentions = False
