"""The calls that a model is measured with: the user's inputs, those that the bundle brings, or random numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from edgeq.bundle import Bundle
from edgeq.errors import UsageError
from edgeq.inputs.arrays import Array, check_arrays
from edgeq.inputs.read import read_inputs
from edgeq.inputs.synthetic import random_inputs
from edgeq.report import TensorWorkload
from edgeq.runtime.tensorrt.samples import SAMPLES_ROLE, bundle_samples
from edgeq.tensor_types import AxisRange, TensorSpec

__all__ = ["BenchInputs", "bench_inputs", "sizes_of"]

_MOST_CALLS = 16
# The measured process holds them, and its peak memory should be that of the model.
_MOST_BYTES = 8 << 20


@dataclasses.dataclass(frozen=True)
class BenchInputs:
    """Calls, which take turns.

    Attributes:
        calls: at least one.
        source: for people.
    """

    calls: list[dict[str, Array]]
    source: str

    @property
    def n_bytes(self) -> int:
        """Of all arrays."""
        return sum(array.nbytes for call in self.calls for array in call.values())

    @property
    def shapes(self) -> tuple[dict[str, tuple[int, ...]], ...]:
        """Of the inputs by name, each combination once, the smallest first."""
        found = {tuple((name, array.shape) for name, array in call.items()) for call in self.calls}
        return tuple(dict(shapes) for shapes in sorted(found, key=lambda shapes: ([s for _, s in shapes], shapes)))


def bench_inputs(bundle: Bundle, workload: TensorWorkload, inputs: Path | None = None) -> BenchInputs:
    """The calls of a workload: at most 16, and at most 8 MiB of them beside the first.

    Args:
        bundle: of a model that is called with arrays.
        workload: that says sizes; only random inputs can have them.
        inputs: what the user has, as `edgeq.inputs.read_inputs` takes it; None for the bundle's own, or else random
            numbers.

    Raises:
        UsageError: sizes that the model was not made for, or for inputs that have their own; inputs that it does not
            take.
        BundleError: the bundle's own inputs cannot be read.
        SourceError: settings of the model that make no sense.
        MissingPackageError: Pillow or ``tokenizers`` is not installed.
    """
    manifest = bundle.tensor
    artifact, ranges = manifest.artifact, manifest.plan.axes
    sized = workload.size is not None or bool(workload.axes)
    if inputs is not None:
        if sized:
            raise UsageError(f"{inputs} has sizes of its own", "Leave --size and --axis out, or leave --inputs out")
        return _some(read_inputs(inputs, artifact, bundle.path, _MOST_CALLS, axes=ranges), inputs.name)
    if not sized and any(entry.role == SAMPLES_ROLE for entry in manifest.files):
        return _some(bundle_samples(bundle), "those that the bundle brings")
    sizes = _sizes(workload, ranges, artifact.inputs)
    drawn = _some(random_inputs(artifact, sizes, _MOST_CALLS), "random numbers")
    check_arrays(drawn.calls[0], artifact.inputs, ranges)
    return drawn


def sizes_of(call: Mapping[str, tuple[int, ...]], specs: Iterable[TensorSpec]) -> dict[str, int]:
    """Sizes of the dynamic axes of a call, by their names."""
    return {
        axis: size
        for spec in specs
        for axis, size in zip(spec.shape, call[spec.name], strict=True)
        if isinstance(axis, str)
    }


def _some(calls: Iterator[dict[str, Array]], source: str) -> BenchInputs:
    chosen: list[dict[str, Array]] = []
    n_bytes = 0
    for call in calls:
        n_bytes += sum(array.nbytes for array in call.values())
        if chosen and (n_bytes > _MOST_BYTES or len(chosen) == _MOST_CALLS):
            break
        chosen.append(dict(call))
    if not chosen:
        raise UsageError(f"{source} holds no inputs", "Give at least one")
    return BenchInputs(chosen, source)


def _sizes(workload: TensorWorkload, ranges: Mapping[str, AxisRange], specs: Iterable[TensorSpec]) -> dict[str, int]:
    """The size of every dynamic axis."""
    dynamic = dict.fromkeys(axis for spec in specs for axis in spec.shape if isinstance(axis, str))
    known = ", ".join(dynamic) or "none: all sizes are fixed"
    for name, size in workload.axes.items():
        if name not in dynamic:
            raise UsageError(f"The model has no dynamic axis {name!r}", f"It has {known}")
        limits = ranges.get(name)
        if size < 1 or (limits is not None and not limits.least <= size <= limits.most):
            reach = "1 or more" if limits is None else f"{limits.least} to {limits.most}"
            raise UsageError(
                f"The axis {name!r} cannot have {size}: the model was made for {reach}",
                "Choose another size, or convert the model again",
            )
    chosen = {
        name: limits.most if workload.size == "largest" else limits.usual
        for name, limits in ranges.items()
        if name in dynamic
    }
    chosen |= workload.axes
    missing = [name for name in dynamic if name not in chosen]
    if missing:
        raise UsageError(f"The bundle names no size for the axis {missing[0]!r}", f"Say it with --axis {missing[0]}=1")
    return chosen
