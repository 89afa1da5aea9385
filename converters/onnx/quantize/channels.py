"""What goes through each channel behind a normalization, over many inputs, in memory that does not grow with them."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.onnx.quantize.graph import open_editor, save_model
from edgeq.errors import ConversionError
from edgeq.profiles.onnx.session import open_onnx_session

__all__ = ["ChannelSample", "sample_channels"]

_ROWS_A_CALL = 16


@dataclasses.dataclass(frozen=True)
class ChannelSample:
    """Of an activation of shape [..., channels].

    Attributes:
        low: the least element of each channel, shape [channels], float32.
        high: the largest, likewise.
        rows: some of its vectors, shape [rows, channels], float32.
    """

    low: NDArray[np.float32]
    high: NDArray[np.float32]
    rows: NDArray[np.float32]


def sample_channels(
    model: Path,
    tensors: Sequence[str],
    inputs: Iterable[Mapping[str, NDArray[Any]]],
    *,
    rows: int = 256,
    threads: int = 1,
) -> dict[str, ChannelSample]:
    """Run a model and watch some of its values.

    Args:
        model: any ONNX file.
        tensors: names of values whose last axis is channels.
        inputs: of one call each.
        rows: vectors that are kept of each value.
        threads: of the session.

    Raises:
        ConversionError: no inputs, or a value that is not finite.
        SessionError: the model cannot be run.
    """
    with tempfile.TemporaryDirectory() as folder:
        watched = Path(folder) / "watched.onnx"
        _watch(model, tensors, watched)
        session = open_onnx_session(watched, threads)
        found: dict[str, ChannelSample] = {}
        for feeds in inputs:
            for name, array in zip(tensors, session.run(list(tensors), dict(feeds)), strict=True):
                found[name] = _seen(name, found.get(name), np.asarray(array), rows)
    if tensors and not found:
        raise ConversionError("There are no inputs to calibrate with", "Give at least one")
    return found


def _watch(model: Path, tensors: Sequence[str], out: Path) -> None:
    editor = open_editor(model)
    values = {value.name: value for node in editor.graph for value in node.outputs}
    leaving = {value.name for value in editor.graph.outputs}
    for name in tensors:
        if name not in values:
            raise ConversionError(f"The model has no value {name!r}", "Name values of this very file")
        if name not in leaving:
            editor.graph.outputs.append(values[name])
    save_model(editor, out)


def _seen(name: str, before: ChannelSample | None, array: NDArray[Any], rows: int) -> ChannelSample:
    flat = array.reshape(-1, array.shape[-1]).astype(np.float32, copy=False)
    if not np.isfinite(flat).all():
        raise ConversionError(f"The value {name!r} is not finite", "Calibrate with inputs that give finite numbers")
    step = max(1, flat.shape[0] // _ROWS_A_CALL)
    picked = flat[::step][:_ROWS_A_CALL].copy()
    if before is None:
        return ChannelSample(flat.min(axis=0), flat.max(axis=0), picked[:rows])
    kept = before.rows
    if kept.shape[0] < rows:
        kept = np.concatenate([kept, picked[: rows - kept.shape[0]]])
    return ChannelSample(np.minimum(before.low, flat.min(axis=0)), np.maximum(before.high, flat.max(axis=0)), kept)
