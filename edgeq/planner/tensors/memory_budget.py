"""A model that takes more memory than its budget has, and what would fit."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from edgeq.errors import BudgetError, ConversionError
from edgeq.planner.tensors.options import TensorOption, count_options, predicted_of, write_option
from edgeq.planner.tensors.prepare import Prepared
from edgeq.planner.tensors.schemes import possible_schemes
from edgeq.tensor_types import AxisRange, Scheme, TensorPrediction
from edgeq.units import format_bytes

__all__ = ["memory_error", "sizes_that_fit"]

_NAMED = 2  # precisions

PeakBytes = Callable[[Mapping[str, int]], int]
"""Peak memory with every open axis at a size."""


def memory_error(
    prepared: Prepared, scheme: Scheme, model: Path, label: str, rejected: Collection[str], folder: Path
) -> BudgetError:
    """Why a model is refused, with sizes and precisions that would fit.

    Args:
        prepared: the model and the device; its budget limits the memory.
        scheme: of what takes too much.
        model: its file.
        label: for people.
        rejected: labels of what is not to be proposed.
        folder: for files to count; nothing stays there.
    """
    limit = prepared.budget.peak_memory_bytes or 0
    smaller = _Smaller(prepared, limit, folder)
    predicted, _ = predicted_of(prepared, model, prepared.axes)
    others: list[Scheme] = [
        other
        for other in possible_schemes(prepared.backend)
        if other != scheme and not any(name.startswith(other) for name in rejected)
    ]
    remedies = [
        *(smaller.shapes_of(model) or smaller.shapes_in_another(others)),
        *_precisions(count_options(prepared, others, {}, folder), limit),
        f"raise --max-memory to {_rounded_up(predicted.peak_memory_bytes)}",
    ]
    taken, allowed = _told_apart(predicted.peak_memory_bytes, limit)
    return BudgetError(
        f"{label} takes {taken} at its peak ({_parts(predicted)}), the limit is {allowed}",
        "; or ".join(remedies),
    )


def _told_apart(taken: int, limit: int) -> tuple[str, str]:
    """Both for people; in bytes where they would look the same."""
    texts = format_bytes(taken), format_bytes(limit)
    return texts if texts[0] != texts[1] else (f"{taken:,} bytes", f"{limit:,} bytes")


def _rounded_up(n_bytes: int) -> str:
    """The least limit in whole tenths of a MiB that a model keeps, as ``--max-memory`` takes it."""
    return f"{math.ceil(10 * n_bytes / 2**20) / 10:.1f}MiB"


def _parts(predicted: TensorPrediction) -> str:
    return (
        f"weights {format_bytes(predicted.weights_bytes)}, activations {format_bytes(predicted.activation_bytes)}, "
        f"process {format_bytes(predicted.runtime_bytes)}"
    )


def _peak(prepared: Prepared, model: Path, sizes: Mapping[str, int]) -> int:
    axes = {name: AxisRange(least=size, usual=size, most=size) for name, size in sizes.items()}
    return predicted_of(prepared, model, axes)[0].peak_memory_bytes


def sizes_that_fit(axes: Mapping[str, AxisRange], peak_bytes: PeakBytes, limit: int) -> dict[str, int] | None:
    """The largest fixed sizes of open axes that keep a limit, the batch being cut first; None if not even 1 does.

    Args:
        axes: with the largest sizes that a call may have.
        peak_bytes: grows with every axis.
        limit: bytes.
    """
    sizes = {name: found.most for name, found in axes.items()}
    for name in sorted(axes, key=lambda axis: axis != "batch"):
        low, high = 0, sizes[name]
        while low < high:
            middle = (low + high + 1) // 2
            if peak_bytes(sizes | {name: middle}) <= limit:
                low = middle
            else:
                high = middle - 1
        if low:
            return sizes | {name: low}
        sizes[name] = 1
    return None


@dataclasses.dataclass(frozen=True)
class _Smaller:
    """Finds fixed sizes that keep a limit, for models that are exported: others have none to choose."""

    prepared: Prepared
    limit: int
    folder: Path

    def shapes_of(self, model: Path, precision: str = "") -> list[str]:
        """The options that fix them; nothing if no sizes do."""
        prepared = self.prepared
        if not prepared.axes or prepared.source.format != "hf":
            return []
        found = sizes_that_fit(prepared.axes, lambda sizes: _peak(prepared, model, sizes), self.limit)
        if found is None:
            return []
        words = [precision] if precision else []
        for spec in prepared.exported.artifact.inputs:
            sizes = (found.get(size, 1) if isinstance(size, str) else size for size in spec.shape)
            words.append(f"--shape {spec.name}={'x'.join(map(str, sizes))}")
        return [f"{' '.join(words)} takes {format_bytes(_peak(prepared, model, found))}"]

    def shapes_in_another(self, schemes: Sequence[Scheme]) -> list[str]:
        """Likewise, in the first of other precisions that some sizes fit in."""
        for scheme in schemes:
            place = self.folder / f"smaller-{scheme}"
            try:
                model = write_option(self.prepared, scheme, {}, place)
            except ConversionError:  # nothing that this precision could take
                continue
            else:
                if found := self.shapes_of(model, f"--precision {scheme}"):
                    return found
            finally:
                shutil.rmtree(place, ignore_errors=True)
        return []


def _precisions(options: Sequence[TensorOption], limit: int) -> list[str]:
    fitting = [
        f"--precision {option.scheme} takes {format_bytes(option.predicted.peak_memory_bytes)}"
        for option in options
        if option.predicted is not None and option.predicted.peak_memory_bytes <= limit
    ]
    return fitting[:_NAMED]
