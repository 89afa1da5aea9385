"""Is an engine what its graph says? Its outputs against those of the ONNX graph on the CPU, on the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeq.bundle import Bundle
from edgeq.errors import BundleError, SessionError
from edgeq.profiles.onnx.session import open_onnx_session
from edgeq.runtime.tensorrt.records import EngineCheck
from edgeq.tensor_types import TensorManifest, TensorSpec

__all__ = ["LEAST_COSINE", "SAMPLES_ROLE", "Arrays", "Run", "bundle_samples", "check_engine"]

# Engine and CPU compute the same quantized graph; they differ by the order of sums, by ties at rounding, and by
# TensorFloat-32 and FP16 products. A wrong kernel or a wrong input is far below this.
LEAST_COSINE = 0.99
SAMPLES_ROLE = "samples"
_DRAWN_SAMPLES = 4
_MOST_SAMPLES = 64

Arrays = Mapping[str, npt.NDArray[Any]]
Run = Callable[[Arrays], Mapping[str, npt.NDArray[Any]]]


def check_engine(
    run: Run, onnx: Path, inputs: Iterable[Arrays], *, least_cosine: float = LEAST_COSINE, threads: int = 1
) -> EngineCheck:
    """Compare an engine with its graph.

    Args:
        run: a call of the engine.
        onnx: the graph that it was built from.
        inputs: calls; at least one.
        least_cosine: that every output of every call must reach.
        threads: of the graph on the CPU.

    Raises:
        SessionError: an output differs, with its name; or there are no inputs.
        MissingPackageError: onnxruntime is not installed.
    """
    reference = open_onnx_session(onnx, threads)
    names = [output.name for output in reference.get_outputs()]
    count, cosine, error = 0, 1.0, 0.0
    for arrays in inputs:
        count += 1
        expected = dict(zip(names, reference.run(names, dict(arrays)), strict=True))
        found = run(arrays)
        for name in names:
            near, far = _compare(name, np.asarray(found[name]), np.asarray(expected[name]), least_cosine)
            cosine, error = min(cosine, near), max(error, far)
    if not count:
        raise SessionError("There are no inputs to check the engine with", "Give at least one")
    return EngineCheck(inputs=count, min_cosine=cosine, max_error=error)


def _compare(
    name: str, found: npt.NDArray[Any], expected: npt.NDArray[Any], least_cosine: float
) -> tuple[float, float]:
    remedy = "The engine is not used; build it again with: edgeq build BUNDLE --force, or run the bundle on the CPU"
    if found.shape != expected.shape:
        raise SessionError(
            f"The engine's output {name!r} has the shape {found.shape}, the graph's {expected.shape}", remedy
        )
    a, b = found.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
    if np.isfinite(b).all() and not np.isfinite(a).all():
        raise SessionError(f"The engine's output {name!r} is not finite where the graph's is", remedy)
    scale = float(np.linalg.norm(a) * np.linalg.norm(b))
    cosine = float(a @ b) / scale if scale else float(np.array_equal(a, b))
    if not cosine >= least_cosine:
        raise SessionError(
            f"The engine's output {name!r} is not the graph's: cosine {cosine:.4f}, at least {least_cosine:g} is asked "
            "for",
            remedy,
        )
    return min(cosine, 1.0), float(np.max(np.abs(a - b), initial=0.0))


def bundle_samples(bundle: Bundle, seed: int = 0) -> Iterator[dict[str, npt.NDArray[Any]]]:
    """Inputs to check an engine with: those that the bundle brings, or drawn ones.

    A bundle brings them as one ``.npz`` of the role ``"samples"``, with arrays named ``"INDEX.INPUT"``.

    Raises:
        BundleError: the file is no such archive.
    """
    manifest = bundle.tensor
    entry = next((entry for entry in manifest.files if entry.role == SAMPLES_ROLE), None)
    if entry is None:
        rng = np.random.default_rng(seed)
        for _ in range(_DRAWN_SAMPLES):
            yield {spec.name: _draw(rng, spec, manifest) for spec in manifest.artifact.inputs}
        return
    path = bundle.path / entry.path
    try:
        with np.load(path, allow_pickle=False) as archive:
            for index in range(_MOST_SAMPLES):
                names = {spec.name: f"{index}.{spec.name}" for spec in manifest.artifact.inputs}
                if any(name not in archive for name in names.values()):
                    break
                yield {name: archive[stored] for name, stored in names.items()}
    except (OSError, ValueError, KeyError) as error:
        raise BundleError(f"{path} holds no inputs of the model: {error}", "Convert the model again") from error


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
