"""From arguments to an exit code."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from types import FrameType

from edgeq.cli.output import note, prepare_streams, show
from edgeq.cli.parser import COMMANDS, build_parser, command_module
from edgeq.errors import EdgeqError

__all__ = ["run_command"]


def run_command(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code; every failure is one line on stderr.

    Raises:
        SystemExit: arguments that make no sense, or ``--help``.
        KeyboardInterrupt: Ctrl-C, or SIGTERM.
    """
    prepare_streams()
    # A polite kill cleans up as Ctrl-C does; SIGKILL is what the staging folder's lock is for.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        try:
            return _dispatch(arguments)
        finally:
            show("")  # argparse prints help without looking whether it arrived
    except EdgeqError as error:
        note(f"edgeq: error: {error}")
        for line in error.details:
            note(f"  {line}")
        return error.exit_code
    except OSError as error:
        where = f"{error.filename}: " if error.filename is not None else ""
        note(f"edgeq: error: {where}{error.strerror or error}. Check the path, its permissions and the disk.")
        return 1


def _dispatch(arguments: Sequence[str]) -> int:
    parser = build_parser(next((a for a in arguments if a in COMMANDS), ""))
    args = parser.parse_args(arguments)
    if args.command is None:
        parser.print_help()
        return 0
    return command_module(args.command).run(args)


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
