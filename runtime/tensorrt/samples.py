"""Inputs that a bundle brings, so that a new engine is compared with its graph on the real thing.

One ``.npz`` of the role ``"samples"``, with arrays named ``"INDEX.INPUT"``. Where no CPU computes the graph (BF16),
another one of the role ``"answers"`` has what it makes of them, as ``"INDEX.OUTPUT"``.
"""

from __future__ import annotations

import itertools
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeq.bundle import Bundle
from edgeq.errors import BundleError, UsageError
from edgeq.inputs.arrays import check_arrays
from edgeq.tensor_types import TensorManifest, TensorSpec

__all__ = [
    "ANSWERS_FILE",
    "ANSWERS_ROLE",
    "KEPT_SAMPLES",
    "SAMPLES_FILE",
    "SAMPLES_ROLE",
    "bundle_answers",
    "bundle_samples",
    "write_samples",
]

SAMPLES_FILE = "samples.npz"
SAMPLES_ROLE = "samples"
ANSWERS_FILE = "answers.npz"
ANSWERS_ROLE = "answers"
KEPT_SAMPLES = 4  # a batch of pictures takes megabytes
_DRAWN = 4
_MOST = 64
# What zipfile and numpy raise for files that were cut or made up; RuntimeError is what an encrypted one gives.
_BROKEN: tuple[type[Exception], ...] = (
    *(OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, MemoryError, RuntimeError),
    *(zlib.error, zipfile.BadZipFile),
)

Arrays = Mapping[str, npt.NDArray[Any]]


def write_samples(path: Path, calls: Iterable[Arrays]) -> None:
    """Keep the first four calls for a bundle, or what a graph makes of each.

    Args:
        path: of the ``.npz``; the bundle's manifest names it with the role ``"samples"`` or ``"answers"``.
        calls: an array for each input, or for each output.
    """
    arrays: dict[str, Any] = {
        f"{index}.{name}": array
        for index, call in enumerate(itertools.islice(calls, KEPT_SAMPLES))
        for name, array in call.items()
    }
    with path.open("wb") as file:  # which keeps numpy from adding a suffix
        np.savez_compressed(file, **arrays)


def bundle_samples(bundle: Bundle, seed: int = 0) -> Iterator[dict[str, npt.NDArray[Any]]]:
    """Inputs to check an engine with: those that the bundle brings, or drawn ones.

    Raises:
        BundleError: the file is no such archive, or its arrays are not what the model takes.
    """
    manifest = bundle.tensor
    entry = next((entry for entry in manifest.files if entry.role == SAMPLES_ROLE), None)
    if entry is None:
        rng = np.random.default_rng(seed)
        for _ in range(_DRAWN):
            yield {spec.name: _draw(rng, spec, manifest) for spec in manifest.artifact.inputs}
        return
    path, inputs, found = bundle.path / entry.path, manifest.artifact.inputs, 0
    for call in _stored(path, [spec.name for spec in inputs]):
        try:
            check_arrays(call, inputs, manifest.plan.axes, source=f"call {found}")
        except UsageError as error:
            raise _unfit(path, error.cause) from error
        yield call
        found += 1
    if not found:
        raise _unfit(path, "it has no whole call")


def bundle_answers(bundle: Bundle) -> Iterator[tuple[Arrays, Arrays]]:
    """The bundle's samples, each with what its graph makes of it.

    Raises:
        BundleError: the bundle has no answers, or one of its files is broken.
    """
    path = bundle.file(ANSWERS_ROLE)
    answers = list(_stored(path, [spec.name for spec in bundle.tensor.artifact.outputs]))
    samples = list(bundle_samples(bundle))
    if len(samples) != len(answers):
        raise BundleError(
            f"{path} has {len(answers)} whole answers to {len(samples)} samples", "Convert the model again"
        )
    return zip(samples, answers, strict=True)


def _stored(path: Path, names: list[str]) -> Iterator[dict[str, npt.NDArray[Any]]]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            for index in range(_MOST):
                places = {name: f"{index}.{name}" for name in names}
                if any(place not in archive for place in places.values()):
                    break
                yield {name: archive[place] for name, place in places.items()}
    except _BROKEN as error:
        raise _unfit(path, " ".join(str(error).split()) or type(error).__name__) from error


def _unfit(path: Path, why: str) -> BundleError:
    return BundleError(f"{path} holds no inputs of the model: {why}", "Convert the model again")


def _draw(rng: np.random.Generator, spec: TensorSpec, manifest: TensorManifest) -> npt.NDArray[Any]:
    """Random values of the usual shape. Whole numbers are 1, which is a token, a type and a mask of every model."""
    axes = manifest.plan.axes
    shape = [size if isinstance(size, int) else axes[size].usual if size in axes else 1 for size in spec.shape]
    dtype = np.dtype(spec.dtype)
    if dtype.kind == "f":
        return rng.standard_normal(shape).astype(dtype)
    if dtype == np.uint8:
        return rng.integers(0, 256, shape, dtype=np.uint8)
    return np.ones(shape, dtype)
