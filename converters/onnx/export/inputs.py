"""What a Hugging Face model is fed: names, types, sizes by its files, axes that stay open, and random examples."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.json_files import read_json_object
from edgeq.converters.onnx.export.tasks import Task, TaskInput
from edgeq.errors import UnsupportedModelError, UsageError
from edgeq.registry import nearest
from edgeq.tensor_types import TensorSpec

__all__ = ["InputPlan", "image_size", "plan_inputs"]

Arrays = dict[str, NDArray[Any]]

_OPEN = frozenset({"batch", "sequence", "samples"})
_SPATIAL = ("height", "width")
_ASSUMED_EDGE = 224
_USUAL_TOKENS = 128
_STEP = 32  # what most image models halve five times
# Their position table starts after the padding token's.
_SHIFTED_POSITIONS = frozenset(
    {"camembert", "data2vec-text", "longformer", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta"}
    | {"xlm-roberta-xl"}
)
_LONGEST_EDGE = 1 << 16


@dataclasses.dataclass(frozen=True)
class InputPlan:
    """The inputs of one export.

    Attributes:
        specs: in the order of the graph; open axes by name.
        sizes: of the open axes, for tracing.
        other_sizes: of the open axes, for checking that they are really open.
        usual_sizes: of the open axes, where one has to be fixed nevertheless.
        limits: numbers of tokens and token types, by input.
        constants: further arguments of ``forward`` that hold for every call.
        notes: what a user must know.
    """

    specs: tuple[TensorSpec, ...]
    sizes: Mapping[str, int]
    other_sizes: Mapping[str, int]
    usual_sizes: Mapping[str, int]
    limits: Mapping[str, int]
    constants: Mapping[str, Any]
    notes: tuple[str, ...]

    @property
    def dynamic(self) -> dict[str, dict[int, str]]:
        """Open axes: input to position to name."""
        return {s.name: {i: a for i, a in enumerate(s.shape) if isinstance(a, str)} for s in self.specs}

    def fixed(self, axes: Collection[str]) -> InputPlan:
        """The same with these axes at their usual sizes."""
        chosen = {axis: self.usual_sizes[axis] for axis in axes}
        specs = tuple(
            TensorSpec(
                name=spec.name,
                dtype=spec.dtype,
                shape=tuple(chosen.get(axis, axis) if isinstance(axis, str) else axis for axis in spec.shape),
            )
            for spec in self.specs
        )
        return dataclasses.replace(
            self,
            specs=specs,
            sizes={name: size for name, size in self.sizes.items() if name not in axes},
            other_sizes={name: size for name, size in self.other_sizes.items() if name not in axes},
        )

    def draw(self, sizes: Mapping[str, int], seed: int) -> Arrays:
        """Random inputs of one call: any tokens, texts of different lengths, normally distributed numbers."""
        rng = np.random.default_rng(seed)
        drawn: Arrays = {}
        for spec in self.specs:
            shape = tuple(sizes[axis] if isinstance(axis, str) else axis for axis in spec.shape)
            drawn[spec.name] = _draw(spec.name, shape, self.limits, rng)
        return drawn


def _draw(name: str, shape: tuple[int, ...], limits: Mapping[str, int], rng: np.random.Generator) -> NDArray[Any]:
    if name in limits:
        return rng.integers(0, limits[name], shape, dtype=np.int64)
    if name == "attention_mask":
        lengths = rng.integers(1, shape[1] + 1, shape[0])
        lengths[0] = shape[1]
        return (np.arange(shape[1]) < lengths[:, None]).astype(np.int64)
    return rng.standard_normal(shape, dtype=np.float32)


def plan_inputs(
    task: Task,
    folder: Path,
    config: Mapping[str, Any],
    parameters: Collection[str],
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> InputPlan:
    """What a model is fed.

    Args:
        task: that it is exported for.
        folder: of the model, for its preprocessing.
        config: of the loaded model, with all defaults.
        parameters: names of the arguments of its ``forward``.
        shapes: of inputs, by the user: then all axes are fixed.

    Raises:
        UsageError: shapes of inputs that are not there, or that the model cannot take.
        UnsupportedModelError: the model takes inputs that nothing is known of.
    """
    inputs = _taken(task, config, parameters)
    sizes, varying = _known_sizes(task, folder, config, inputs)
    given = _given_sizes(inputs, shapes, sizes, config)
    is_open = {} if shapes else {axis: size for axis, size in sizes.items() if axis in _OPEN or axis in varying}
    bound = {**{axis: size for axis, size in sizes.items() if axis not in is_open}, **given}
    specs = tuple(
        TensorSpec(name=i.name, dtype=i.dtype, shape=tuple(bound.get(axis, axis) for axis in i.axes)) for i in inputs
    )
    return InputPlan(
        specs=specs,
        sizes=is_open,
        other_sizes={axis: _other(axis, size, _step(config)) for axis, size in is_open.items()},
        usual_sizes={**is_open, "batch": 1, "sequence": min(_USUAL_TOKENS, _most_tokens(config))},
        limits=_limits(config),
        constants=_constants(config, parameters, bound, open_size="height" in is_open),
        notes=_notes(folder, config, given, sizes),
    )


def _taken(task: Task, config: Mapping[str, Any], parameters: Collection[str]) -> tuple[TaskInput, ...]:
    """The inputs that this model has. Text encoders need no token types where all texts are single ones."""
    taken = tuple(i for i in task.inputs if not i.optional or i.name in parameters)
    if task.name == "feature-extraction" or config.get("type_vocab_size", 0) < 2:
        taken = tuple(i for i in taken if i.name != "token_type_ids")
    if task.modality == "audio":
        taken = tuple(_spectrogram(i, config) for i in taken[:1])
    if not taken or taken[0].name not in parameters:
        raise UnsupportedModelError(
            f"The model takes {', '.join(sorted(parameters)[:6])}, not the inputs of {task.name}",
            "Choose another task, or export it yourself and give the ONNX file",
        )
    return taken


def _spectrogram(item: TaskInput, config: Mapping[str, Any]) -> TaskInput:
    """Models of sound take raw samples, or spectrograms with the bins first (Whisper) or last (AST)."""
    if item.name == "input_values" and "num_mel_bins" in config:
        return dataclasses.replace(item, axes=("batch", "frames", "mel_bins"))
    if item.name == "input_features" and "max_source_positions" not in config:
        raise UnsupportedModelError(
            f"How long the spectrograms of {config.get('model_type')} are is not known",
            "Export it yourself and give the ONNX file",
        )
    return item


def _known_sizes(
    task: Task, folder: Path, config: Mapping[str, Any], inputs: tuple[TaskInput, ...]
) -> tuple[dict[str, int], tuple[str, ...]]:
    """Sizes of all axes, for tracing where they stay open; and the axes that the preprocessing leaves open."""
    if task.modality == "text":
        return {"batch": 2, "sequence": min(16, _most_tokens(config))}, ()
    if task.modality == "image":
        height, width, varies = image_size(folder, config)
        channels = _nested(config, "num_channels") or 3
        sizes = {"batch": 2, "channels": channels, "height": height, "width": width}
        return sizes, _SPATIAL if varies else ()
    if "samples" in inputs[0].axes:
        return {"batch": 2, "samples": _sampling_rate(folder)}, ()
    frames = config.get("max_length") if inputs[0].name == "input_values" else 2 * config["max_source_positions"]
    return {"batch": 2, "mel_bins": config["num_mel_bins"], "frames": int(frames or 1024)}, ()


def _sampling_rate(folder: Path) -> int:
    path = folder / "preprocessor_config.json"
    rate = read_json_object(path).get("sampling_rate") if path.is_file() else None
    return rate if isinstance(rate, int) and 1000 <= rate <= 192_000 else 16_000


def _most_tokens(config: Mapping[str, Any]) -> int:
    most = config.get("max_position_embeddings") or config.get("n_positions") or 512
    if config.get("model_type") in _SHIFTED_POSITIONS:
        most -= (config.get("pad_token_id") or 0) + 1
    return max(int(most), 1)


def _nested(config: Mapping[str, Any], key: str) -> Any:  # noqa: ANN401 - as JSON has it
    """A setting of the model, or of its vision part or backbone."""
    for part in (config, *(config.get(name) for name in ("vision_config", "backbone_config"))):
        if isinstance(part, Mapping) and part.get(key) is not None:
            return part[key]
    return None


def image_size(folder: Path, config: Mapping[str, Any]) -> tuple[int, int, bool]:
    """Height and width of what a model's preprocessing makes.

    Args:
        folder: with preprocessor_config.json; without it, config.json decides.
        config: of the model.

    Returns:
        Height, width, and whether images of another ratio of their sides become another size.
    """
    path = folder / "preprocessor_config.json"
    settings = read_json_object(path) if path.is_file() else {}
    crop = _pair(settings.get("crop_size")) if settings.get("do_center_crop") else None
    if crop:
        return (*crop, False)
    size = settings.get("size") if settings.get("do_resize", True) else None
    padded = _pair(settings.get("pad_size")) if settings.get("do_pad") else None
    if padded:
        return (*padded, False)
    if isinstance(size, Mapping) and "shortest_edge" in size:
        return _shortest(settings, size)
    pair = _pair(size)
    if pair:
        return (*pair, bool(settings.get("keep_aspect_ratio")))
    own = _pair(_nested(config, "image_size"))
    height, width = own or (_ASSUMED_EDGE, _ASSUMED_EDGE)
    return height, width, False


def _shortest(settings: Mapping[str, Any], size: Mapping[str, Any]) -> tuple[int, int, bool]:
    edge = _edge(size["shortest_edge"]) or _ASSUMED_EDGE
    if "crop_pct" in settings or "ConvNext" in str(settings.get("image_processor_type")):
        return edge, edge, False  # it resizes, then crops to the square
    longest = _edge(size.get("longest_edge")) or 2 * edge
    wide = min(longest, edge * 4 // 3)
    if str(settings.get("image_processor_type")).startswith("Yolos"):
        edge, wide = max(edge // 16, 1) * 16, max(wide // 16, 1) * 16
    return edge, wide, True


def _pair(value: object) -> tuple[int, int] | None:
    if isinstance(value, Mapping):
        value = (value.get("height"), value.get("width"))
    elif isinstance(value, int):
        value = (value, value)
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return None
    height, width = _edge(value[0]), _edge(value[1])
    return (height, width) if height and width else None


def _edge(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _LONGEST_EDGE else None


def _step(config: Mapping[str, Any]) -> int:
    """What height and width are a multiple of."""
    patch = _nested(config, "patch_size")
    return patch if isinstance(patch, int) and patch > 0 else _STEP


def _other(axis: str, size: int, step: int) -> int:
    """Another size of an open axis, smaller so that it costs little."""
    if axis == "batch":
        return 1
    if axis in _SPATIAL:
        return max(size * 3 // 4 // step * step, step)
    return max(size * 2 // 3, 1)


def _given_sizes(
    inputs: tuple[TaskInput, ...],
    shapes: Mapping[str, tuple[int, ...]] | None,
    sizes: Mapping[str, int],
    config: Mapping[str, Any],
) -> dict[str, int]:
    """Sizes of axes by the user's shapes."""
    known = {item.name: item for item in inputs}
    given: dict[str, int] = {}
    for name, shape in (shapes or {}).items():
        if name not in known:
            close = nearest(name, list(known)) or list(known)
            raise UsageError(f"The model has no input {name!r}", f"Give the shape of {' or '.join(close)}")
        axes = known[name].axes
        if len(shape) != len(axes):
            raise UsageError(
                f"The shape {_times(shape)} of {name} has {len(shape)} axes, not {len(axes)}",
                f"Give {name}={'x'.join(axes)}",
            )
        for axis, size in zip(axes, shape, strict=True):
            _check_size(name, axis, size, sizes, config)
            if given.setdefault(axis, size) != size:
                raise UsageError(
                    f"The inputs have different sizes of {axis}: {given[axis]} and {size}", "Give the same for all"
                )
    return given


def _check_size(name: str, axis: str, size: int, sizes: Mapping[str, int], config: Mapping[str, Any]) -> None:
    if not isinstance(size, int) or size < 1:
        raise UsageError(f"The axis {axis} of {name} cannot have the size {size!r}", "Give whole sizes of 1 or more")
    if axis not in _OPEN and axis not in _SPATIAL and size != sizes[axis]:
        raise UsageError(
            f"The axis {axis} of {name} has the size {sizes[axis]}, not {size}", f"Give {sizes[axis]} for it"
        )
    if axis == "sequence" and size > _most_tokens(config):
        raise UsageError(
            f"The model was trained for {_most_tokens(config)} tokens, fewer than {size}",
            f"Give at most {_most_tokens(config)}",
        )


def _limits(config: Mapping[str, Any]) -> dict[str, int]:
    limits = {"input_ids": _nested(config, "vocab_size"), "token_type_ids": config.get("type_vocab_size")}
    return {name: int(limit) for name, limit in limits.items() if limit}


def _constants(
    config: Mapping[str, Any], parameters: Collection[str], bound: Mapping[str, int], *, open_size: bool
) -> dict[str, Any]:
    """Transformers refuses images of another size than the model was trained with, unless it is told to adapt."""
    trained = _pair(_nested(config, "image_size"))
    if "interpolate_pos_encoding" not in parameters or trained is None:
        return {}
    adapted = open_size or (bound.get("height"), bound.get("width")) != trained
    return {"interpolate_pos_encoding": True} if adapted else {}


def _notes(
    folder: Path, config: Mapping[str, Any], given: Mapping[str, int], sizes: Mapping[str, int]
) -> tuple[str, ...]:
    """About sizes of images: those that were asked for although the model has others, and those that were assumed."""
    if "height" not in sizes:
        return ()
    own = f"{sizes['height']}x{sizes['width']}"
    preprocessed = (folder / "preprocessor_config.json").is_file()
    known = preprocessed or _pair(_nested(config, "image_size")) is not None
    if given:
        asked = f"{given['height']}x{given['width']}"
        differs = known and asked != own
        source = "its preprocessing makes" if preprocessed else "it was made for"
        return (f"The model takes images of {asked} as asked for; {source} {own}",) if differs else ()
    return () if known else (f"No file says how large images are: {own} was assumed",)


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
