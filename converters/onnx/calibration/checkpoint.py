"""What a calibration has seen so far, in a file, so that one that was killed goes on where it was."""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.onnx.calibration.observers import Observer
from edgeq.errors import ConversionError
from edgeq.staging import disk_full_is_one_line

__all__ = ["Checkpoint"]

_CALLS, _SEEN, _KEY = "calls", "seen", "key"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A file of observers' states.

    Attributes:
        path: of the file.
        key: what the states depend on beside the inputs: the model, the tensors, the kind of observer.
    """

    path: Path
    key: str

    def load(self, observers: Mapping[str, Observer]) -> tuple[int, str]:
        """Restore observers; 0 calls if there is no file.

        Args:
            observers: by the names of their tensors.

        Returns:
            How many calls they have seen, and the hash of the inputs of these.

        Raises:
            ConversionError: the file belongs to another calibration, or cannot be read.
        """
        if not self.path.exists():
            return 0, ""
        try:
            with self.path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                if str(stored[_KEY]) != self.key:
                    raise ConversionError(
                        f"{self.path} was left by a calibration of another model or with other settings",
                        "Remove it to calibrate anew",
                    )
                for number, observer in enumerate(observers.values()):
                    prefix = f"{number}."
                    observer.restore({k[len(prefix) :]: stored[k] for k in stored.files if k.startswith(prefix)})
                return int(stored[_CALLS]), str(stored[_SEEN])
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise ConversionError(
                f"{self.path} cannot be read as a calibration that was begun ({error})", "Remove it to calibrate anew"
            ) from error

    def save(self, observers: Mapping[str, Observer], calls: int, seen: str) -> None:
        """Write the states, in one step.

        Args:
            observers: as in `load`, in the same order.
            calls: that they have seen.
            seen: hash of the inputs.

        Raises:
            DiskFullError: no room.
        """
        arrays: dict[str, NDArray[np.generic]] = {
            f"{number}.{name}": array
            for number, observer in enumerate(observers.values())
            for name, array in observer.state().items()
        }
        arrays |= {_CALLS: np.array(calls), _SEEN: np.array(seen), _KEY: np.array(self.key)}
        partial = self.path.with_name(f"{self.path.name}.partial")
        try:
            with disk_full_is_one_line(self.path.parent), partial.open("wb") as file:
                np.savez_compressed(file, allow_pickle=False, **arrays)
            partial.replace(self.path)
        finally:
            partial.unlink(missing_ok=True)
