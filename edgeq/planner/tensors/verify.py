"""The finished bundle, loaded as a robot would, against the float model that it was made from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from edgeq.errors import ConversionError
from edgeq.planner.tensors.samples import Samples
from edgeq.profiles.onnx.session import open_onnx_session

__all__ = ["verify_bundle"]

Progress = Callable[[str, int, int, str], None]


def verify_bundle(folder: Path, reference: Path, samples: Samples, progress: Progress) -> None:
    """Run one held-out input through both: names, shapes and dtypes of the outputs are the same, and all are finite.

    Raises:
        ConversionError: they are not.
        SessionError: the bundle's model cannot be loaded.
    """
    progress("check bundle", 0, 1, "")
    call = dict(samples.judged[0])
    sessions = [open_onnx_session(path, 1) for path in (reference, folder / "model.onnx")]
    names = [[output.name for output in session.get_outputs()] for session in sessions]
    if names[0] != names[1]:
        raise ConversionError(f"The outputs {names[1]} were {names[0]} before", "Report this with the model's name")
    for name, wanted, got in zip(names[0], *(session.run(None, call) for session in sessions), strict=True):
        if wanted.shape != got.shape or wanted.dtype != got.dtype:
            raise ConversionError(
                f"{name} is {got.dtype} {got.shape}, it was {wanted.dtype} {wanted.shape}",
                "Report this with the model's name",
            )
        if np.isfinite(wanted).all() and not np.isfinite(got).all():
            raise ConversionError(f"{name} is no longer finite", "Choose --precision auto, or keep more in floats")
    progress("check bundle", 1, 1, "")
