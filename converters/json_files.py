"""JSON files of a Hugging Face folder, which may be anybody's: of a bounded size, and errors that name the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edgeq.errors import SourceError

__all__ = ["read_json", "read_json_object"]

_MAX_BYTES = 16 << 20


def read_json(path: Path) -> Any:  # noqa: ANN401 - any JSON
    """What a JSON file holds.

    Raises:
        SourceError: it cannot be read, is larger than 16 MiB, or is no JSON.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise SourceError(f"{path} is too large for a configuration", "Download the model again")
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}", "Check the path and its permissions") from error
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path} is no valid JSON ({error})", "Download the model again") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """Likewise, of a file that must hold an object.

    Raises:
        SourceError: also if it holds something else.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise SourceError(f"{path} holds no JSON object", "Download the model again")
    return content
