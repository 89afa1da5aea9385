"""``config.json`` of a Hugging Face model, read with types: nested text configs, RoPE settings in both spellings."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from edgeq.errors import SourceError, UnsupportedModelError

__all__ = ["ModelConfig", "Rope", "config_of", "load_config", "read_license", "read_rope"]

_LICENSE = re.compile(r"^license:[ \t]*[\"']?([A-Za-z0-9][\w.+-]*)", re.MULTILINE)
_LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Settings of a model, each checked for its type when it is asked for.

    Attributes:
        architecture: the first of ``architectures``.
        values: the settings; those of ``text_config`` before the outer ones.
        defaults: what the model's class assumes for a key that is absent.
    """

    architecture: str
    values: Mapping[str, object]
    defaults: Mapping[str, object] = dataclasses.field(default_factory=dict)

    def get(self, key: str) -> object:
        """The raw value, the class's default, or None. A null in the file counts as absent."""
        value = self.values.get(key)
        return self.defaults.get(key) if value is None else value

    def count(self, key: str) -> int:
        """A whole number of at least 1.

        Raises:
            SourceError: it is absent or no such number.
        """
        value = self._required(key)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
            raise _wrong(key, value, "a whole number of at least 1")
        return value

    def optional_count(self, key: str) -> int | None:
        """As `count`, but null in the file means None; the class's default is for an absent key only."""
        value = self.values[key] if key in self.values else self.defaults.get(key)
        return None if value is None else self.count(key)

    def number(self, key: str) -> float:
        """A finite number. Raises SourceError as `count` does."""
        return as_number(key, self._required(key))

    def flag(self, key: str) -> bool:
        """True or false; absent is false. Raises SourceError for anything else."""
        value = self.get(key)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise _wrong(key, value, "true or false")
        return value

    def text(self, key: str) -> str:
        """A string. Raises SourceError as `count` does."""
        value = self._required(key)
        if not isinstance(value, str):
            raise _wrong(key, value, "a string")
        return value

    def strings(self, key: str) -> tuple[str, ...] | None:
        """A list of strings, or None if it is absent. Raises SourceError for anything else."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, list):
            raise _wrong(key, value, "a list of strings")
        found = tuple(item for item in value if isinstance(item, str))
        if len(found) != len(value):
            raise _wrong(key, value, "a list of strings")
        return found

    def table(self, key: str) -> Mapping[str, object] | None:
        """An object, or None if it is absent. Raises SourceError for anything else."""
        value = self.get(key)
        return None if value is None else _as_table(key, value)

    def with_defaults(self, defaults: Mapping[str, object]) -> ModelConfig:
        """The same settings with a class's defaults behind them."""
        return dataclasses.replace(self, defaults=defaults)

    def _required(self, key: str) -> object:
        value = self.get(key)
        if value is None:
            raise SourceError(f"config.json has no {key}", "Use the config.json that belongs to the weights")
        return value


def as_number(key: str, value: object) -> float:
    """``value`` as a finite number. Raises SourceError naming ``key``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise _wrong(key, value, "a number")
    return float(value)


def _wrong(key: str, value: object, wanted: str) -> SourceError:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return SourceError(
        f"{key} in config.json is {shown}, not {wanted}", "Use the config.json that belongs to the weights"
    )


def _as_table(key: str, value: object) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise _wrong(key, value, "an object")
    return {str(name): item for name, item in value.items()}


def load_config(folder: Path) -> ModelConfig:
    """Read ``config.json``.

    Raises:
        SourceError: it is missing, no JSON object, or names no architecture.
        UnsupportedModelError: the weights are quantized.
    """
    path = folder / "config.json"
    try:
        decoded: object = msgspec.json.decode(path.read_bytes())
    except FileNotFoundError as error:
        raise SourceError(f"{folder} has no config.json", "Name a complete Hugging Face model folder") from error
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}", "Check the file and its permissions") from error
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise SourceError(f"{path} is no JSON ({error})", "Download that file again") from error
    if not isinstance(decoded, dict):
        raise SourceError(f"{path} is no JSON object", "Download that file again")
    config = config_of(_as_table("config.json", decoded), str(path))
    _refuse_quantized(config)
    return config


def config_of(values: Mapping[str, object], where: str = "config.json") -> ModelConfig:
    """The settings of a config.json that is in memory already.

    Args:
        values: the whole of it.
        where: its file, for messages.

    Raises:
        SourceError: it names no architecture.
    """
    names = ModelConfig("", values).strings("architectures")
    if not names:
        raise SourceError(
            f"{where} names no architectures, so nobody can tell what its weights mean",
            'Add the class of the model, such as "architectures": ["LlamaForCausalLM"]',
        )
    inner = values.get("text_config")
    return ModelConfig(names[0], values if inner is None else {**values, **_as_table("text_config", inner)})


def _refuse_quantized(config: ModelConfig) -> None:
    table = config.table("quantization_config") or config.table("compression_config")
    if table is None:
        return
    method = table.get("quant_method", "an unnamed method")
    raise UnsupportedModelError(
        f"The checkpoint is quantized already ({method})", "Use the original checkpoint in F32, F16 or BF16"
    )


def read_license(folder: Path) -> str | None:
    """The ``license:`` of the model card's front matter, or None."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8", errors="replace")[:20_000]
    except OSError:
        return None
    if not text.startswith("---"):
        return None
    match = _LICENSE.search(text.split("\n---", maxsplit=1)[0])
    return match[1] if match else None


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding of one kind of layer.

    Attributes:
        kind: ``default``, ``linear``, ``dynamic``, ``yarn``, ``llama3`` or ``longrope``; others as config.json says.
        theta: the base.
        values: the remaining settings, such as ``factor``.
    """

    kind: str
    theta: float
    values: Mapping[str, object]

    def number(self, key: str) -> float:
        """A finite number. Raises SourceError if it is absent or none."""
        if self.values.get(key) is None:
            raise SourceError(f"RoPE type {self.kind} in config.json has no {key}", "Use the model's own config.json")
        return as_number(key, self.values[key])

    def optional(self, key: str) -> float | None:
        """As `number`, or None if it is absent."""
        return None if self.values.get(key) is None else self.number(key)

    def numbers(self, key: str) -> tuple[float, ...]:
        """A list of finite numbers. Raises SourceError as `number` does."""
        value = self.values.get(key)
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise _wrong(key, value, "a list of numbers")
        return tuple(as_number(key, item) for item in value)

    def keys(self) -> Iterator[str]:
        """The settings that are not null."""
        return (key for key, value in self.values.items() if value is not None)


def read_rope(config: ModelConfig, layer_type: str = "full_attention", *, theta_key: str = "rope_theta") -> Rope:
    """The RoPE settings of one kind of layer, from the old or the new form.

    Old: ``rope_theta`` and ``rope_scaling`` (type under ``rope_type`` or ``type``). New (transformers 5):
    ``rope_parameters``, flat or nested by layer type. As in transformers, ``original_max_position_embeddings`` beside
    them goes before the one within, and ``rope_scaling`` does not touch sliding layers.

    Args:
        config: the model's.
        layer_type: ``"full_attention"`` or ``"sliding_attention"``.
        theta_key: where the old form (and the class's default) has the base of these layers.

    Raises:
        SourceError: a setting is of the wrong type.
    """
    parameters: dict[str, object] = {}
    new = config.table("rope_parameters") or {}
    if any(name in new for name in _LAYER_TYPES):
        nested = new.get(layer_type)
        parameters.update({} if nested is None else _as_table(layer_type, nested))
    elif layer_type == "full_attention":
        parameters.update(new)
    if layer_type == "full_attention":
        parameters.update(config.table("rope_scaling") or {})
    old_kind = parameters.pop("type", None)
    kind = parameters.pop("rope_type", None) or old_kind or "default"
    if not isinstance(kind, str):
        raise _wrong("rope_type", kind, "a string")
    theta = parameters.pop("rope_theta", None)
    for key in ("original_max_position_embeddings", "partial_rotary_factor"):
        outer = config.get(key)
        if outer is not None and (key == "original_max_position_embeddings" or parameters.get(key) is None):
            parameters[key] = outer
    return Rope(
        kind={"su": "longrope"}.get(kind.lower(), kind.lower()),
        theta=config.number(theta_key) if theta is None else as_number("rope_theta", theta),
        values=parameters,
    )
