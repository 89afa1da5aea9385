"""The parser of the command line. Each command is a module that is imported when it is asked for."""

from __future__ import annotations

import argparse
import importlib
import textwrap
from typing import NoReturn, Protocol, cast

from edgeq._version import __version__
from edgeq.cli.output import note

__all__ = ["COMMANDS", "build_parser", "command_module"]

COMMANDS: dict[str, str] = {
    "convert": "turn a model into a bundle that fits a device",
    "plan": "show what convert would decide, and write nothing",
    "imatrix": "collect an importance matrix for quantizers",
    "build": "build the TensorRT engines of a bundle, for this machine or for others",
    "bench": "measure a bundle on this machine against its budget",
    "report": "show the latest measurement of a bundle again",
    "run": "generate text with a bundle",
    "devices": "list the devices that plans can be made for, and show what is known of each",
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
    """argparse, with errors of one line, whatever the arguments hold."""

    def error(self, message: str) -> NoReturn:
        note(f"{self.prog}: error: {' '.join(message.split())}. See: {self.prog} --help")
        raise SystemExit(2)


def command_module(name: str) -> _Command:
    """The module of a command."""
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
            module = command_module(name)
            module.add_arguments(sub)
            sub.epilog = "examples:\n" + textwrap.indent(module.EXAMPLES, "  ")
    return parser
