"""Which tensor of a checkpoint becomes which tensor of the GGUF, decided from names and shapes alone."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from edgeq.converters.checkpoint import Checkpoint, TensorEntry
from edgeq.converters.gguf.architectures import ARCHITECTURES
from edgeq.converters.gguf.architectures.base import WAY_OUT, Architecture, Dims, Floats, Settings, Tensor
from edgeq.converters.gguf.architectures.decoder import read_dims
from edgeq.converters.gguf.config import ModelConfig, load_config
from edgeq.errors import SourceError, UnsupportedModelError, require_package
from edgeq.ggml_types import tensor_bytes

__all__ = ["FloatType", "Layout", "PlannedTensor", "expected_tensors", "plan_layout"]

FloatType = Literal["source", "f16", "bf16", "f32"]

_SHOWN = 5
_COMPARE_ROWS_BYTES = 1 << 22


@dataclasses.dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the GGUF before it is written.

    Attributes:
        name: in the GGUF.
        source: its entry in the checkpoint, or its values if they are computed.
        shape: in the checkpoint's order, rows first.
        type: name in ``edgeq.ggml_types``.
        interleave: width of the heads whose halves are interleaved; 0 for none.
        add: is added to every weight.
    """

    name: str
    source: TensorEntry | Floats
    shape: tuple[int, ...]
    type: str
    interleave: int = 0
    add: float = 0.0

    @property
    def ggml_shape(self) -> tuple[int, ...]:
        """In ggml's order, the row length first."""
        return tuple(reversed(self.shape))

    @property
    def nbytes(self) -> int:
        """Of its data, without padding."""
        return tensor_bytes(self.type, self.ggml_shape)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Everything about a GGUF but its vocabulary and its weights.

    Attributes:
        architecture: that was found for config.json.
        settings: keys without the architecture's prefix, and notes.
        tensors: in the order of the file.
        checkpoint: where the weights come from.
        n_vocab: rows of the embedding.
    """

    architecture: Architecture
    settings: Settings
    tensors: tuple[PlannedTensor, ...]
    checkpoint: Checkpoint
    n_vocab: int


def plan_layout(folder: Path, float_type: FloatType) -> Layout:
    """Read config.json and the headers of the weights, and decide every tensor.

    Weights are read in one case only: a tied model whose checkpoint holds an output matrix all the same.

    Raises:
        SourceError: the checkpoint is damaged, or contradicts config.json.
        UnsupportedModelError: the architecture, or a setting of it, cannot be converted.
    """
    config = load_config(folder)
    architecture = ARCHITECTURES.get(config.architecture)
    if architecture is None:
        raise UnsupportedModelError(
            f"{config.architecture} is not an architecture that edgeq converts "
            f"(it converts {', '.join(ARCHITECTURES.names())})",
            WAY_OUT,
        )
    config = config.with_defaults(architecture.defaults)
    dims = read_dims(config)
    settings = architecture.settings(config, dims)
    checkpoint = Checkpoint.open(folder)
    mapped, notes = _map_names(architecture, checkpoint, dims)
    mapped, tie_notes = _tie_output(config, checkpoint, mapped)
    expected = expected_tensors(architecture, config, dims)
    _check_complete(expected, mapped, optional={"output.weight"} if config.flag("tie_word_embeddings") else set())
    planned = [PlannedTensor(name, values, values.shape, "f32") for name, values in sorted(settings.extra.items())]
    for name, spec in expected.items():
        if name in mapped:
            planned.append(_plan_tensor(name, spec, mapped[name], dims, float_type))
    return Layout(
        architecture=architecture,
        settings=dataclasses.replace(settings, notes=(*settings.notes, *notes, *tie_notes)),
        tensors=tuple(planned),
        checkpoint=checkpoint,
        n_vocab=dims.vocab,
    )


def _map_names(
    architecture: Architecture, checkpoint: Checkpoint, dims: Dims
) -> tuple[dict[str, TensorEntry], tuple[str, ...]]:
    """GGUF name to entry for all tensors that are not ignored, and the notes of those that are."""
    lookup = _name_lookup(architecture, dims)
    mapped: dict[str, TensorEntry] = {}
    notes: list[str] = []
    unknown: list[str] = []
    for name, entry in checkpoint.entries.items():
        ignored = next((rule for rule in architecture.ignored if re.search(rule.pattern, name)), None)
        if ignored is not None:
            if ignored.note is not None and ignored.note not in notes:
                notes.append(ignored.note)
            continue
        target = lookup(_rename(architecture, name))
        if target is None:
            unknown.append(name)
        elif target in mapped:
            raise SourceError(f"{name} and {mapped[target].name} are the same tensor ({target})", "Remove one of them")
        else:
            mapped[target] = entry
    if unknown:
        raise UnsupportedModelError(
            f"{_list(unknown)} of the checkpoint have no place in a {architecture.gguf} GGUF", WAY_OUT
        )
    return mapped, tuple(notes)


def _rename(architecture: Architecture, name: str) -> str:
    for old, new in architecture.prefixes:
        if name.startswith(old):
            return new + name[len(old) :]
    return name


def _name_lookup(architecture: Architecture, dims: Dims) -> Callable[[str], str | None]:
    require_package("gguf", "convert", "to write GGUF files")
    import gguf

    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture.gguf], dims.layers)
    return lambda name: names.get_name(name, try_suffixes=(".weight", ".bias"))


def expected_tensors(architecture: Architecture, config: ModelConfig, dims: Dims) -> dict[str, Tensor]:
    """The architecture's table for this config, blocks written out, in the order of the file."""
    table = {name: spec for name, spec in architecture.tensors.items() if spec.when(config)}
    blocks = {name: spec for name, spec in table.items() if "{i}" in name}
    expected = {"token_embd.weight": table["token_embd.weight"]}
    for i in range(dims.layers):
        expected.update({name.format(i=i): spec for name, spec in blocks.items()})
    expected.update({name: spec for name, spec in table.items() if name not in blocks})
    return expected


def _check_complete(expected: Mapping[str, Tensor], mapped: Mapping[str, TensorEntry], optional: set[str]) -> None:
    missing = [name for name in expected if name not in mapped and name not in optional]
    if missing:
        raise SourceError(
            f"The checkpoint lacks {_list(missing)} (names in the GGUF), which config.json makes necessary",
            "Download the model again, with the config.json that belongs to it",
        )
    extra = [entry.name for name, entry in mapped.items() if name not in expected]
    if extra:
        raise SourceError(
            f"The checkpoint holds {_list(extra)}, which config.json says it has not",
            "Use the config.json that belongs to the weights",
        )


def _tie_output(
    config: ModelConfig, checkpoint: Checkpoint, mapped: Mapping[str, TensorEntry]
) -> tuple[dict[str, TensorEntry], tuple[str, ...]]:
    """Leave out an output matrix that is the embedding once more."""
    kept = dict(mapped)
    output, embedding = kept.get("output.weight"), kept.get("token_embd.weight")
    if not config.flag("tie_word_embeddings") or output is None or embedding is None:
        return kept, ()
    if _same_data(checkpoint, output, embedding):
        del kept["output.weight"]
        return kept, ()
    return kept, (f"{output.name} differs from the embedding although config.json ties them: both were written",)


def _same_data(checkpoint: Checkpoint, one: TensorEntry, other: TensorEntry) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape) or not one.readable or not one.shape:
        return False
    step = max(1, _COMPARE_ROWS_BYTES * one.shape[0] // max(1, one.nbytes))
    for start in range(0, one.shape[0], step):
        stop = min(start + step, one.shape[0])
        a = checkpoint.read_rows(one.name, start, stop)
        b = checkpoint.read_rows(other.name, start, stop)
        if not np.array_equal(a.view(np.uint8), b.view(np.uint8)):
            return False
    return True


def _plan_tensor(name: str, spec: Tensor, entry: TensorEntry, dims: Dims, float_type: FloatType) -> PlannedTensor:
    shape = tuple(dims.size(symbol) for symbol in spec.shape)
    if entry.shape != shape:
        raise SourceError(
            f"{entry.name} has the shape {_shape(entry.shape)}, config.json makes it {_shape(shape)}",
            "Use the config.json that belongs to the weights",
        )
    if not entry.readable:
        raise UnsupportedModelError(
            f"{entry.name} is of dtype {entry.dtype}", "Use a checkpoint in F32, F16 or BF16 (an unquantized one)"
        )
    # As llama.cpp's own converter: its kernels take vectors and norms in f32 only.
    small = len(shape) == 1 or name.endswith("_norm.weight")
    kind = "f32" if small else entry.dtype.lower() if float_type == "source" else float_type
    interleave = dims.head if spec.interleave else 0
    return PlannedTensor(name, entry, shape, kind, interleave, spec.add)


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(str(n) for n in shape) or "scalar"


def _list(names: list[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"
