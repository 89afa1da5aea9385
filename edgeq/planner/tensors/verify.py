"""The finished bundle, loaded as a robot would, against the float model that it was made from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgeq.errors import ConversionError
from edgeq.planner.tensors.samples import Samples
from edgeq.profiles.onnx.session import open_onnx_session
from edgeq.runtime.session import load

__all__ = ["verify_bundle", "verify_graph"]

Progress = Callable[[str, int, int, str], None]
Arrays = Mapping[str, NDArray[np.generic]]


def verify_bundle(folder: Path, device: str, reference: Path, samples: Samples, progress: Progress) -> None:
    """Load a bundle and run one held-out input: names, shapes and dtypes are those of the float model, all is finite.

    Args:
        folder: of the bundle, with its manifest.
        device: that it was made for, whose graph a CPU computes.
        reference: the float model.
        samples: inputs.
        progress: told stage, amount done, amount in all, and a detail.

    Raises:
        ConversionError: they are not.
        EdgeqError: the bundle cannot be loaded, or not be called.
    """
    progress("check bundle", 0, 1, device)
    call = dict(samples.judged[0])
    with load(folder, kind="tensor", device=device) as session:
        found = session.run(call)
    _compare(_computed(reference, call), found)
    progress("check bundle", 1, 1, device)


def verify_graph(model: Path, reference: Path, samples: Samples, progress: Progress) -> None:
    """Likewise for a GPU's graph before there is an engine of it: ONNX Runtime computes it on the CPU.

    Raises:
        ConversionError: the outputs are not those of the float model.
        SessionError: the graph cannot be loaded.
    """
    progress("check graph", 0, 1, "")
    call = dict(samples.judged[0])
    _compare(_computed(reference, call), _computed(model, call))
    progress("check graph", 1, 1, "")


def _computed(model: Path, call: Arrays) -> dict[str, NDArray[np.generic]]:
    session = open_onnx_session(model, 1)
    names = [output.name for output in session.get_outputs()]
    return {name: np.asarray(array) for name, array in zip(names, session.run(None, dict(call)), strict=True)}


def _compare(expected: Arrays, found: Arrays) -> None:
    if list(expected) != list(found):
        raise ConversionError(
            f"The outputs {', '.join(found)} were {', '.join(expected)} before", "Report this with the model's name"
        )
    for name, wanted in expected.items():
        got = found[name]
        if wanted.shape != got.shape or wanted.dtype != got.dtype:
            raise ConversionError(
                f"{name} is {got.dtype} {got.shape}, it was {wanted.dtype} {wanted.shape}",
                "Report this with the model's name",
            )
        if np.isfinite(wanted).all() and not np.isfinite(got).all():
            raise ConversionError(f"{name} is no longer finite", "Choose --precision auto, or keep more in floats")
