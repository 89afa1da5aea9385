"""Where a bundle goes, found out before any work is done for it."""

from __future__ import annotations

import os
from pathlib import Path

from edgeq.bundle import MANIFEST, refuse_strangers
from edgeq.errors import ConversionError, UsageError
from edgeq.staging import refuse_occupied

__all__ = ["settled_output"]


def settled_output(out: Path, *, force: bool) -> Path:
    """The output as an absolute path whose last part is its name, so that it stays the same folder all the way.

    Raises:
        UsageError: a name that no manifest can hold.
        ConversionError: the current folder is gone.
        OutputExistsError: something is there that may not be replaced.
    """
    whole = out.name in {"", ".."}
    try:
        target = Path(os.path.realpath(out)) if whole else Path(os.path.realpath(out.parent)) / out.name
        target.name.encode()  # a manifest is JSON, and names its bundle
    except FileNotFoundError as error:
        raise ConversionError(
            "The current folder was deleted", "Change into one that exists, or give a full path with -o"
        ) from error
    except UnicodeEncodeError as error:
        raise UsageError(f"The output's name {out.name!a} is not UTF-8", "Choose another one with -o") from error
    refuse_occupied(target, force=force, marker=MANIFEST, check=refuse_strangers)
    return target
