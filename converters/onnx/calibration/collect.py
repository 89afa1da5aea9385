"""From a float model and inputs to the ranges of its tensors.

Inputs stream by once. A call's tensors are looked at stage by stage and let go, and observers have a fixed size, so
memory does not grow with the number of inputs; see `edgeq.converters.onnx.stages` for how little a call itself holds.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgeq.bundle import hash_file
from edgeq.converters.onnx.calibration.checkpoint import Checkpoint
from edgeq.converters.onnx.calibration.histogram import NotFiniteError
from edgeq.converters.onnx.calibration.observers import METHODS, ChannelObserver, Method, Observer, make_observer
from edgeq.converters.onnx.calibration.ranges import ChannelRanges, Range
from edgeq.converters.onnx.feeds import Feeds, InputDigest, check_feeds
from edgeq.converters.onnx.skeleton import read_skeleton
from edgeq.converters.onnx.stages import StagedModel
from edgeq.errors import ConversionError, UsageError

__all__ = [
    "Calibration",
    "Progress",
    "calibrate",
    "collect_by_method",
    "collect_channel_ranges",
    "collect_ranges",
]

Progress = Callable[[int, int, str], None]

_SAVE_EVERY_S = 20.0


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What calibration found.

    Attributes:
        ranges: of each tensor.
        constants: tensors that held one and the same number all the time, whose layer may be dead.
        calls: inputs seen.
        sha256: of these inputs.
    """

    ranges: dict[str, Range]
    constants: tuple[str, ...]
    calls: int
    sha256: str


class _Watcher(Protocol):
    """An observer of any kind."""

    def update(self, values: NDArray[np.floating]) -> None:
        """Take in what one call made."""
        ...


def collect_ranges(  # noqa: PLR0913 - the settings of a calibration
    model: Path,
    tensors: Sequence[str],
    inputs: Iterable[Feeds],
    *,
    method: Method,
    symmetric: bool,
    percentile: float = 99.99,
    threads: int = 1,
    progress: Progress | None = None,
    state: Path | None = None,
) -> dict[str, Range]:
    """The ranges of `calibrate` alone, with its arguments and errors, ready for a quantizer.

    Each holds zero and is wide enough for a scale that is not zero; see `Range.quantizable`.
    """
    found = calibrate(
        model,
        tensors,
        inputs,
        method=method,
        symmetric=symmetric,
        percentile=percentile,
        threads=threads,
        progress=progress,
        state=state,
    )
    return {name: some.quantizable(symmetric=symmetric) for name, some in found.ranges.items()}


def calibrate(  # noqa: PLR0913 - the settings of a calibration
    model: Path,
    tensors: Sequence[str],
    inputs: Iterable[Feeds],
    *,
    method: Method,
    symmetric: bool,
    percentile: float = 99.99,
    threads: int = 1,
    progress: Progress | None = None,
    state: Path | None = None,
) -> Calibration:
    """Run a float model on inputs and find the ranges to quantize its tensors in.

    Args:
        model: the ``.onnx`` file; external data lies beside it.
        tensors: names of floating-point activations, inputs of the model among them.
        inputs: one mapping of names to arrays for each call; it is gone through once.
        method: how to clip; ``"minmax"`` does not.
        symmetric: whether ranges shall be symmetric around zero.
        percentile: for ``"percentile"``: how many percent of the numbers stay inside.
        threads: of each call.
        progress: told calls done, calls in all (0 if ``inputs`` does not say), and what is going on.
        state: a file to keep what was seen in, every 20 seconds and at the end. If there is one, those first inputs
            are only compared with what it says of them, and calibration goes on behind them.

    Raises:
        UsageError: no inputs or tensors, an unknown method, or a name that is no activation of the graph.
        ConversionError: inputs that do not fit the model; a tensor with NaN or infinite numbers, or that is none of
            floats; a ``state`` of another calibration.
        SourceError: no sound ONNX file.
        SessionError: ONNX Runtime cannot load it.
        DiskFullError: no room for temporary files or the state.
        MissingPackageError: the package onnx or onnxruntime is not installed.
    """
    observers = {
        name: make_observer(method, percentile=percentile, symmetric=symmetric) for name in dict.fromkeys(tensors)
    }
    checkpoint = None
    if state is not None:
        # All methods but one keep the same histograms.
        checkpoint = Checkpoint(state, _key(model, [*observers], "limits" if method == "minmax" else "histogram"))
    done, seen = (0, "") if checkpoint is None else checkpoint.load(observers)
    calls, digest, saved = 0, InputDigest(), time.monotonic()
    for calls in _watch(model, observers, inputs, digest, skipped=done, threads=threads, progress=progress):
        if calls == done and digest.hexdigest() != seen:
            raise _other_inputs(state)
        if checkpoint is not None and calls > done and time.monotonic() > saved + _SAVE_EVERY_S:
            checkpoint.save(observers, calls, digest.hexdigest())
            saved = time.monotonic()
    if calls < done:
        raise _other_inputs(state)
    if checkpoint is not None and calls > done:
        checkpoint.save(observers, calls, digest.hexdigest())
    constants = tuple(name for name, observer in observers.items() if observer.seen().is_constant)
    ranges = {name: observer.range() for name, observer in observers.items()}
    return Calibration(ranges, constants, calls, digest.hexdigest())


def collect_by_method(
    model: Path,
    tensors: Sequence[str],
    inputs: Iterable[Feeds],
    *,
    methods: Sequence[Method] = METHODS,
    symmetric: bool,
    percentile: float = 99.99,
    threads: int = 1,
    progress: Progress | None = None,
) -> dict[Method, dict[str, Range]]:
    """What `collect_ranges` finds by each of several methods, for the price of one: they share their histograms.

    Args:
        model: as in `calibrate`, like all that is not named here.
        tensors: likewise.
        inputs: likewise.
        methods: how to clip.
        symmetric: likewise.
        percentile: likewise.
        threads: likewise.
        progress: likewise.

    Raises:
        EdgeqError: as `calibrate` raises them.
    """
    # A histogram has the limits too, but counting takes nearly thirty times as long as looking for them.
    kept: Method = "minmax" if set(methods) == {"minmax"} else "percentile"
    observers = {name: make_observer(kept, percentile=percentile) for name in dict.fromkeys(tensors)}
    found: dict[Method, dict[str, Range]] = {method: {} for method in methods}
    judges: dict[Method, Observer] = {
        method: make_observer(method, percentile=percentile, symmetric=symmetric) for method in methods
    }
    for _ in _watch(model, observers, inputs, InputDigest(), skipped=0, threads=threads, progress=progress):
        pass
    for name, observer in observers.items():
        state = observer.state()
        for method, judge in judges.items():
            judge.restore(state)
            found[method][name] = judge.range().quantizable(symmetric=symmetric)
    return found


def collect_channel_ranges(
    model: Path,
    axes: Mapping[str, int],
    inputs: Iterable[Feeds],
    *,
    threads: int = 1,
    progress: Progress | None = None,
) -> dict[str, ChannelRanges]:
    """The range of every channel of some tensors, as SmoothQuant needs them.

    Args:
        model: as in `calibrate`.
        axes: where the channels are, by the names of the tensors: -1 for what a MatMul reads.
        inputs: as in `calibrate`.
        threads: of each call.
        progress: as in `calibrate`.

    Raises:
        ConversionError: also an axis that a tensor does not have, or whose size changes.
        EdgeqError: as `calibrate` raises them.
    """
    observers = {name: ChannelObserver(axis) for name, axis in axes.items()}
    for _ in _watch(model, observers, inputs, InputDigest(), skipped=0, threads=threads, progress=progress):
        pass
    return {name: observer.ranges() for name, observer in observers.items()}


def _watch(
    model: Path,
    observers: Mapping[str, _Watcher],
    inputs: Iterable[Feeds],
    digest: InputDigest,
    *,
    skipped: int,
    threads: int,
    progress: Progress | None,
) -> Iterator[int]:
    """Show observers what each call makes; yields the number of calls after each of them.

    Args:
        model: the file.
        observers: by tensor.
        inputs: of all calls.
        digest: takes in all inputs.
        skipped: calls at the beginning that are not run.
        threads: of a call.
        progress: as in `calibrate`.
    """
    if not observers:
        raise UsageError("No tensors to calibrate", "Name at least one")
    total = len(inputs) if isinstance(inputs, Sized) else 0
    index = -1
    with StagedModel(model, [*observers], threads=threads) as staged:
        for index, feeds in enumerate(inputs):
            check_feeds(feeds, staged.specs, index)
            digest.update(feeds)
            if index >= skipped:
                for name, values in staged.run(feeds):
                    _show(observers[name], name, values, index)
            yield index + 1
            if progress is not None:
                progress(index + 1, total, "Calibrating")
    if index < 0:
        raise UsageError("No calibration inputs", "Give at least one")


def _show(observer: _Watcher, name: str, values: NDArray[np.generic], index: int) -> None:
    if not np.issubdtype(values.dtype, np.floating):
        raise ConversionError(
            f"The tensor {name!r} holds {values.dtype.name}, which is not quantized", "Leave it out of calibration"
        )
    try:
        observer.update(values.astype(np.float32, copy=False))
    except NotFiniteError as error:
        wrong = np.flatnonzero(~np.isfinite(values.reshape(-1)))
        what = "NaN" if np.isnan(values.reshape(-1)[wrong]).any() else "infinite"
        raise ConversionError(
            f"Calibration input {index} makes {len(wrong)} of {values.size} numbers of {name!r} {what}",
            "Leave that input out, or keep the nodes that make and read the tensor in floats",
        ) from error


def _key(model: Path, tensors: Sequence[str], kind: str) -> str:
    """What states depend on beside the inputs."""
    digest = hashlib.sha256("\0".join([kind, *tensors]).encode())
    places = {weight.location for weight in read_skeleton(model).weights}
    for name in (model.name, *sorted(place for place in places if place is not None)):
        digest.update(hash_file(model.parent / name).encode())
    return digest.hexdigest()


def _other_inputs(state: Path | None) -> ConversionError:
    return ConversionError(
        f"{state} was left by a calibration with other inputs", "Give the same ones, or remove it to calibrate anew"
    )
