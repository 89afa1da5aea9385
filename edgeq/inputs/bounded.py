"""Files of a model's folder, which may be anybody's, read only where they have a sensible size."""

from __future__ import annotations

from pathlib import Path

from edgeq.errors import SourceError

__all__ = ["read_bounded"]


def read_bounded(path: Path, most_bytes: int) -> bytes:
    """All of a file.

    Args:
        path: of the file.
        most_bytes: that it may have.

    Raises:
        SourceError: it has more, or cannot be read.
    """
    try:
        if path.stat().st_size > most_bytes:
            raise SourceError(f"{path} is larger than any such file", "Download the model again")
        return path.read_bytes()
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}", "Check its permissions") from error
