"""Is an engine what its graph says? Its outputs against those of the ONNX graph on a CPU, on the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeq.errors import SessionError
from edgeq.profiles.onnx.session import open_onnx_session
from edgeq.queries import in_order_of
from edgeq.runtime.tensorrt.records import EngineCheck

__all__ = ["LEAST_COSINE", "Arrays", "Run", "answered", "check_engine"]

# Engine and CPU compute the same quantized graph; they differ by the order of sums, by ties at rounding, and by
# TensorFloat-32 and FP16 products. A wrong kernel or a wrong input is far below this.
LEAST_COSINE = 0.99

Arrays = Mapping[str, npt.NDArray[Any]]
Run = Callable[[Arrays], Mapping[str, npt.NDArray[Any]]]


def answered(onnx: Path, inputs: Iterable[Arrays], *, threads: int = 1) -> Iterator[tuple[Arrays, Arrays]]:
    """Inputs, each with what a graph makes of it on this CPU.

    Args:
        onnx: the graph.
        inputs: calls.
        threads: of one.

    Raises:
        SessionError: ONNX Runtime cannot load it.
        MissingPackageError: onnxruntime is not installed.
    """
    reference = open_onnx_session(onnx, threads)
    names = [output.name for output in reference.get_outputs()]
    for arrays in inputs:
        yield arrays, dict(zip(names, map(np.asarray, reference.run(names, dict(arrays))), strict=True))


def check_engine(
    run: Run, calls: Iterable[tuple[Arrays, Arrays]], *, least_cosine: float = LEAST_COSINE
) -> EngineCheck:
    """Compare an engine with its graph.

    Args:
        run: a call of the engine.
        calls: at least one, with what the graph makes of it: of `answered`, or what a bundle brings.
        least_cosine: that every output of every call must reach.

    Raises:
        SessionError: an output differs, with its name; or there are no inputs.
    """
    count, cosine, error = 0, 1.0, 0.0
    for arrays, expected in calls:
        count += 1
        found = in_order_of(expected, run(arrays))  # equal scores of a detector's queries fall either way
        for name in expected:
            near, far = _compare(name, found[name], expected[name], least_cosine)
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
