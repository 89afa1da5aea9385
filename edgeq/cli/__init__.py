"""The command line. Only this package prints; each command is a module that is imported when it is called.

Exit codes: 0 success, 1 a failure, 2 wrong usage, 3 a budget that is missed or undecided, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import textwrap
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn, Protocol, cast

from edgeq._version import __version__
from edgeq.errors import EdgeqError

__all__ = ["build_parser", "main"]

COMMANDS: dict[str, str] = {
    "convert": "turn a model into a bundle that fits a device",
    "plan": "show what convert would decide, and write nothing",
    "bench": "measure a bundle on this machine against its budget",
    "report": "show the latest measurement of a bundle again",
    "run": "generate text with a bundle",
    "inspect": "show what a bundle holds and how it was made",
    "verify": "check every byte of a bundle against its manifest",
    "completion": "print tab completion for a shell",
}

_EXAMPLES = """examples:
  edgeq convert HuggingFaceTB/SmolLM2-135M-Instruct --target jetson-orin -o smollm2
  edgeq convert ./model --target laptop-cpu --max-memory 400MiB --max-itl 60ms -o bundle
  edgeq bench bundle
  edgeq run bundle "What does a robot need to know about doors?"

Every command explains itself: edgeq COMMAND --help
"""


class _Command(Protocol):
    """What every module of a command has."""

    EXAMPLES: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, args: argparse.Namespace) -> int: ...


class _Parser(argparse.ArgumentParser):
    """argparse, with errors of one line."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {message}. See: {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)


def _command(name: str) -> _Command:
    return cast("_Command", importlib.import_module(f"edgeq.cli.{name}"))


def build_parser(only: str | None = None) -> argparse.ArgumentParser:
    """The parser of all commands, or with the arguments of one of them, so that ``edgeq --help`` imports none."""
    parser = _Parser(
        prog="edgeq",
        description="Put models onto robot hardware: converted, measured on the target, held to their budgets.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"edgeq {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", parser_class=_Parser)
    for name, summary in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if only is None or only == name:
            module = _command(name)
            module.add_arguments(sub)
            sub.epilog = "examples:\n" + textwrap.indent(module.EXAMPLES, "  ")
    return parser


def _asked_for(arguments: Sequence[str]) -> str:
    """The command among the arguments, or an empty string."""
    return next((a for a in arguments if a in COMMANDS), "")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        # A polite kill cleans up as Ctrl-C does; SIGKILL is what the staging folder's lock is for.
        signal.signal(signal.SIGTERM, _interrupt)
        parser = build_parser(_asked_for(given))
        args = parser.parse_args(given)
        if args.command is None:
            parser.print_help()
            return 0
        return _command(args.command).run(args)
    except EdgeqError as error:
        print(f"edgeq: error: {error}", file=sys.stderr)
        for line in error.details:
            print(f"  {line}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("edgeq: interrupted; nothing was published", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output is gone (edgeq … | head); what is still buffered has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
