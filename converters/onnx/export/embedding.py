"""What lies beside the weights in a Hugging Face folder and must stay with them: settings, tokenizer, pooling."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from edgeq.converters.json_files import read_json, read_json_object
from edgeq.converters.onnx.export.tasks import TASKS
from edgeq.errors import SourceError
from edgeq.tensor_types import Embedding

__all__ = ["bundle_files", "class_count", "class_labels", "read_config", "read_embedding"]

_SENTENCE_CONFIGS = (
    "sentence_bert_config.json",
    "sentence_roberta_config.json",
    "sentence_distilbert_config.json",
    "sentence_camembert_config.json",
    "sentence_albert_config.json",
    "sentence_xlm-roberta_config.json",
    "sentence_xlnet_config.json",
)
_POOLING: Mapping[str, Literal["mean", "cls", "max", "last"]] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
}
_POOLING_NAMES: Mapping[str, Literal["mean", "cls", "max", "last"]] = {
    "cls": "cls",
    "max": "max",
    "mean": "mean",
    "lasttoken": "last",
}
_MOST_TOKENS = 1 << 20  # tokenizers without a limit say 10**30


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a model.

    Raises:
        SourceError: there is none, or it cannot be read.
    """
    if not (folder / "config.json").is_file():
        raise SourceError(
            f"{folder} has no config.json, so it is no Hugging Face model",
            "Give the folder that save_pretrained wrote, with config.json and safetensors",
        )
    return read_json_object(folder / "config.json")


def bundle_files(folder: Path, task: str) -> dict[str, Path]:
    """The files of a model's folder that work without its weights, by role. Each keeps its place in the folder.

    Args:
        folder: that the model was loaded from.
        task: as in `edgeq.tensor_types.TensorArtifact.task`.

    Raises:
        SourceError: modules.json cannot be read, or names a path that leaves the folder.
    """
    names = {"config": "config.json", "preprocessor": "preprocessor_config.json", "processor": "processor_config.json"}
    if _reads_text(task):
        names |= {"tokenizer": "tokenizer.json", "tokenizer_config": "tokenizer_config.json"}
        names |= {"special_tokens": "special_tokens_map.json"}
    if task == "feature-extraction" and (folder / "modules.json").is_file():
        names |= {"modules": "modules.json", "sentence_transformers": "config_sentence_transformers.json"}
        sentence = next((name for name in _SENTENCE_CONFIGS if (folder / name).is_file()), _SENTENCE_CONFIGS[0])
        names["sentence_bert"] = sentence
        pooling = _module(_read_modules(folder), "Pooling")
        if pooling is not None:
            names["pooling"] = f"{pooling}/config.json"
    return {role: folder / name for role, name in names.items() if (folder / name).is_file()}


def _reads_text(task: str) -> bool:
    return any(item.name == task and item.modality == "text" for item in TASKS)


def class_labels(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the classes by index; empty where there are none, or only LABEL_0, LABEL_1 and so on."""
    table = config.get("id2label")
    if not isinstance(table, Mapping) or not table:
        return ()
    labels = tuple(table.get(str(index), table.get(index)) for index in range(len(table)))
    if not all(isinstance(label, str) for label in labels):
        return ()
    if all(label == f"LABEL_{index}" for index, label in enumerate(labels)):
        return ()
    return tuple(str(label) for label in labels)


def class_count(config: Mapping[str, Any]) -> int | None:
    """How many classes there are, whether or not they have names; None where config.json does not say."""
    table, count = config.get("id2label"), config.get("num_labels")
    if isinstance(table, Mapping) and table:
        return len(table)
    return count if isinstance(count, int) and not isinstance(count, bool) and count > 0 else None


def read_embedding(folder: Path, config: Mapping[str, Any]) -> tuple[Embedding | None, tuple[str, ...]]:
    """How hidden states become an embedding, from the files of sentence-transformers, and what they ask for besides.

    Args:
        folder: of the model.
        config: contents of its config.json.

    Returns:
        None where there is no modules.json or it asks for what `Embedding` cannot say, and notes for people.

    Raises:
        SourceError: a file cannot be read, or a path leaves the folder.
    """
    if not (folder / "modules.json").is_file():
        return None, ()
    modules = _read_modules(folder)
    other = [kind for kind, _ in modules if kind not in {"Transformer", "Pooling", "Normalize"}]
    if other:
        return None, (f"modules.json has a layer {other[0]} after the model, which embed() does not compute",)
    pooling_folder = _module(modules, "Pooling")
    if pooling_folder is None:
        return None, ("modules.json names no pooling, so embed() is not offered",)
    kinds = [kind for kind, _ in modules]
    if "Normalize" in kinds[: kinds.index("Pooling")]:
        return None, ("modules.json normalizes before it pools, which embed() does not compute",)
    settings = read_json_object(folder / pooling_folder / "config.json")
    pooling = _pooling(settings)
    if pooling is None:
        return None, ("The pooling of modules.json is none of mean, cls, max and last, so embed() is not offered",)
    notes: list[str] = []
    prompt = _default_prompt(folder)
    if prompt:
        notes.append(f"Embeddings were trained with the prompt {prompt!r} before each text; embed() does not add it")
    embedding = Embedding(
        pooling=pooling,
        normalize="Normalize" in kinds,
        max_tokens=_max_tokens(folder, config),
        lowercase=_sentence_config(folder).get("do_lower_case") is True,
    )
    return embedding, tuple(notes)


def _read_modules(folder: Path) -> list[tuple[str, str]]:
    """Kind and folder of each module, in order."""
    path = folder / "modules.json"
    content = read_json(path)
    if not isinstance(content, list) or not all(isinstance(entry, dict) for entry in content):
        raise SourceError(f"{path} holds no list of modules", "Download the model again")
    modules = []
    for entry in content:
        place = str(entry.get("path", ""))
        parts = PurePosixPath(place).parts
        if place.startswith("/") or ".." in parts or "\\" in place or "\0" in place:
            raise SourceError(
                f"{path} names {place!r}, a path that leaves the folder", "Use a model from a source you trust"
            )
        modules.append((str(entry.get("type", "")).rsplit(".", 1)[-1], place))
    return modules


def _module(modules: list[tuple[str, str]], kind: str) -> str | None:
    return next((place for name, place in modules if name == kind), None)


def _pooling(settings: Mapping[str, Any]) -> Literal["mean", "cls", "max", "last"] | None:
    named = settings.get("pooling_mode")
    if isinstance(named, list) and len(named) == 1:
        named = named[0]
    if named is not None:
        return _POOLING_NAMES.get(named) if isinstance(named, str) else None
    modes = [key for key, value in settings.items() if key.startswith("pooling_mode_") and value is True]
    if not modes:
        return "mean"  # what sentence-transformers does then
    return _POOLING.get(modes[0]) if len(modes) == 1 else None


def _default_prompt(folder: Path) -> str | None:
    path = folder / "config_sentence_transformers.json"
    if not path.is_file():
        return None
    settings = read_json_object(path)
    name, prompts = settings.get("default_prompt_name"), settings.get("prompts")
    if not isinstance(name, str) or not isinstance(prompts, Mapping):
        return None
    prompt = prompts.get(name)
    return prompt if isinstance(prompt, str) and prompt else None


def _sentence_config(folder: Path) -> dict[str, Any]:
    """The first file that there is, as sentence-transformers takes it; empty if there is none."""
    name = next((name for name in _SENTENCE_CONFIGS if (folder / name).is_file()), None)
    return {} if name is None else read_json_object(folder / name)


def _max_tokens(folder: Path, config: Mapping[str, Any]) -> int:
    """What sentence-transformers cuts at: its own setting, or the smaller of tokenizer's and model's limits."""
    limit = _sentence_config(folder).get("max_seq_length")
    if isinstance(limit, int) and limit > 0:
        return limit
    limits = []
    if (folder / "tokenizer_config.json").is_file():
        limits.append(read_json_object(folder / "tokenizer_config.json").get("model_max_length"))
    limits.append(config.get("max_position_embeddings"))
    found = [int(limit) for limit in limits if isinstance(limit, int) and 0 < limit <= _MOST_TOKENS]
    return min(found, default=512)
