"""A float model written in a scheme, and what of it is then quantized: one way, judged or only counted."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.onnx.calibration.ranges import Range
from edgeq.converters.onnx.quantize.coverage import coverage, write_executed
from edgeq.converters.onnx.quantize.dynamic import quantize_dynamic
from edgeq.converters.onnx.quantize.fp8 import fp8_tensors, quantize_fp8
from edgeq.converters.onnx.quantize.graph import open_editor, save_model
from edgeq.converters.onnx.quantize.half import to_half
from edgeq.converters.onnx.quantize.half_kinds import BFLOAT16
from edgeq.converters.onnx.quantize.heads import read_heads_in_place
from edgeq.converters.onnx.quantize.rounded import write_rounded
from edgeq.converters.onnx.quantize.static import calibration_tensors, quantize_static
from edgeq.converters.onnx.quantize.weights_only import quantize_weights
from edgeq.planner.tensors.overflow import nodes_that_touch
from edgeq.tensor_types import Coverage, Scheme
from edgeq.types import runs_on_gpu

__all__ = [
    "DISABLED_OPTIMIZERS",
    "MODEL_FILE",
    "Dialect",
    "Evidence",
    "coverage_of",
    "tensors_to_range",
    "write_floats",
    "write_scheme",
    "write_stand_in",
]

MODEL_FILE = "model.onnx"
# ONNX Runtime's fused kernel takes five times what LayerNormalization and a sum take (1.31, x86-64 and 128 x 768).
DISABLED_OPTIMIZERS = ("SkipLayerNormFusion",)


@dataclasses.dataclass(frozen=True)
class Dialect:
    """What a device wants of a graph.

    Attributes:
        backend: its name.
        activations: of static INT8.
        narrow_weights: of fewer steps, for CPUs without VNNI.
        newest_opset: that the backend takes; None for any.
        has_bf16: whether it computes in BF16 too.
    """

    backend: str
    activations: Literal["u8", "s8"]
    narrow_weights: bool = False
    newest_opset: int | None = None
    has_bf16: bool = False

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU computes it: then what is not quantized is in 16 bits."""
        return runs_on_gpu(self.backend)


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What inputs show of a model; nothing, for a file that is only counted.

    Attributes:
        ranges: of every value that becomes a grid.
        means: of what convolutions read, to correct biases by.
        too_large: values that FP16 cannot hold, with the largest absolute value.
    """

    ranges: Mapping[str, Range] = dataclasses.field(default_factory=dict)
    means: Mapping[str, NDArray[np.float64]] | None = None
    too_large: Mapping[str, float] = dataclasses.field(default_factory=dict)


def tensors_to_range(model: Path, scheme: Scheme, dialect: Dialect, kept: Set[str] = frozenset()) -> tuple[str, ...]:
    """Values whose ranges a scheme needs; none for most."""
    if scheme == "fp8":
        return tuple(fp8_tensors(model))
    return tuple(calibration_tensors(model, dialect.backend, kept)) if scheme == "int8-static" else ()


def write_scheme(
    scheme: Scheme, model: Path, out: Path, dialect: Dialect, *, kept: Set[str] = frozenset(), evidence: Evidence
) -> tuple[str, ...]:
    """Write a float model in a scheme.

    Args:
        scheme: any but ``"fp32"``.
        model: in floats, cleaned for the backend.
        out: is written; data beside it if it is large.
        dialect: what the device wants.
        kept: names of nodes that stay in floats.
        evidence: what inputs show; ranges of `tensors_to_range`.

    Returns:
        Notes for the user.

    Raises:
        ConversionError: the model has nothing that this scheme could quantize, or cannot be written in it.
    """
    if scheme == "bf16":
        return to_half(model, out, kind=BFLOAT16, keep_float=kept, newest_opset=dialect.newest_opset)
    if scheme == "fp16":
        return _to_half(model, out, kept, evidence, dialect)
    if scheme == "int8-dynamic":
        quantize_dynamic(model, out, keep_float=kept, narrow_weights=dialect.narrow_weights)
    elif scheme in ("int8-weights", "int4-weights"):
        quantize_weights(model, out, bits=8 if scheme == "int8-weights" else 4, keep_float=kept)
    elif dialect.on_gpu:
        # What is not quantized is in FP16: a GPU computes it faster, and Turing no other way.
        grids = out.with_name("grids") / MODEL_FILE
        grids.parent.mkdir(exist_ok=True)
        _write_grids(scheme, model, grids, dialect, kept, evidence)
        notes = _to_half(grids, out, frozenset(), evidence, dialect)
        shutil.rmtree(grids.parent)
        return notes
    else:
        _write_grids(scheme, model, out, dialect, kept, evidence)
    return ()


def _write_grids(scheme: Scheme, model: Path, out: Path, dialect: Dialect, kept: Set[str], evidence: Evidence) -> None:
    if scheme == "fp8":
        quantize_fp8(model, out, evidence.ranges, keep_float=kept)
        return
    quantize_static(
        model,
        out,
        evidence.ranges,
        backend=dialect.backend,
        activations=dialect.activations,
        keep_float=kept,
        narrow_weights=dialect.narrow_weights,
        means=evidence.means,
    )


def _to_half(model: Path, out: Path, kept: Set[str], evidence: Evidence, dialect: Dialect) -> tuple[str, ...]:
    """In FP16 but for what is kept and what overflows there. Returns notes."""
    large = evidence.too_large
    both = kept | nodes_that_touch(model, large.keys()) if large else kept
    notes = to_half(model, out, keep_float=both)
    if not large:
        return notes
    worst = max(large, key=lambda name: large[name])
    told = f"{len(both - kept)} nodes stay in FP32: {worst!r} reaches {large[worst]:.3g}, FP16 ends at 65504"
    return (*notes, f"{told}; --precision bf16 holds it in 16 bits" if dialect.has_bf16 else told)


def write_floats(model: Path, out: Path, dialect: Dialect) -> Path:
    """A float model as the backend's kernels compute it fastest, with the same results.

    Args:
        model: cleaned for the backend.
        out: is written where that is another graph; its folder is made.
        dialect: what the device wants.

    Returns:
        ``out``, or the model itself.
    """
    if dialect.on_gpu:
        return model
    editor = open_editor(model)
    if not read_heads_in_place(editor):
        return model
    out.parent.mkdir(parents=True, exist_ok=True)
    save_model(editor, out)
    return out


def write_stand_in(scheme: Scheme, model: Path, folder: Path) -> Path | None:
    """What a CPU computes in a model's place, with the same roundings; None where it computes the model itself.

    Args:
        scheme: of the model.
        model: written by `write_scheme`.
        folder: for the copy; made if there is one.
    """
    if scheme != "bf16":
        return None
    folder.mkdir(parents=True, exist_ok=True)
    write_rounded(model, folder / MODEL_FILE)
    return folder / MODEL_FILE


def coverage_of(model: Path, dialect: Dialect, dims: Mapping[str, int]) -> Coverage:
    """What is truly quantized: on a CPU in the graph that ONNX Runtime executes, on a GPU as Q and DQ say.

    Args:
        model: written by `write_scheme`; a folder beside it holds the executed graph meanwhile.
        dialect: that it was written in.
        dims: usual sizes of dynamic axes.

    Raises:
        ConversionError: ONNX Runtime cannot load it with these sizes.
    """
    if dialect.on_gpu:
        return coverage(model, executed=None, dims=dims)
    executed = model.with_name("executed") / MODEL_FILE
    executed.parent.mkdir()
    try:
        signed = dialect.activations == "s8"
        write_executed(model, executed, dims=dims, disabled_optimizers=DISABLED_OPTIMIZERS, signed=signed)
        return coverage(model, executed=executed, dims=dims)
    finally:
        shutil.rmtree(executed.parent)
