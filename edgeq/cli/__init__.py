"""The command line. Only this package prints; each command is a module that is imported when it is called.

Exit codes: 0 success, 1 a failure, 2 wrong usage, 3 a budget that is missed or undecided, 130 interrupted.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        arguments: None for those of the process, which an interrupt then ends at once.
    """
    try:
        # Imported here, so that Ctrl-C is one line from the first moment on.
        from edgeq.cli.app import run_command

        return run_command(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:
        from edgeq.cli.output import note

        note("edgeq: interrupted")
        if arguments is None:
            # Python would first wait for threads that llama.cpp or a download keeps busy, and a KeyboardInterrupt that
            # passed through exec(), as in the making of a dataclass, makes CPython end itself by SIGINT, not by 130.
            os._exit(130)
        return 130
