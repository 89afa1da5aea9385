"""``edgeq completion``: tab completion for shells."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from typing import Any

EXAMPLES = """\
edgeq completion bash > ~/.local/share/bash-completion/completions/edgeq
edgeq completion zsh > ~/.zfunc/_edgeq
"""

# What an argument stands for, by its metavar.
_DEVICES = "DEVICE"
_DEVICES_OR_FILES = "NAME|FILE"
_FILES = ("FILE", "FOLDER", "DIR")
_POWER_MODES = "power_mode"
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")  # what a shell would read as more than a word is left out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("shell", choices=["bash", "zsh", "tcsh"], help="the shell to print completion for")


def run(args: argparse.Namespace) -> int:
    """Print the script; it knows the devices that there are now."""
    import shtab

    from edgeq.cli.output import show
    from edgeq.cli.parser import build_parser

    parser = build_parser()
    _add_choices(parser)
    show(shtab.complete(parser, shell=args.shell) + "\n")
    return 0


def _add_choices(parser: argparse.ArgumentParser) -> None:
    """Tell the completion, and it alone, which devices and power modes can be named, and what is a file."""
    import shtab

    from edgeq.profiles.loader import known_profiles, profile_names

    devices = sorted(filter(_PLAIN.fullmatch, profile_names()))
    profiles = [known.profile for known in known_profiles() if known.profile is not None]
    modes = sorted(filter(_PLAIN.fullmatch, {mode.name for profile in profiles for mode in profile.power_modes}))
    for action in _actions(parser):
        if action.metavar == _DEVICES:
            action.choices = devices
        elif action.metavar == _DEVICES_OR_FILES:
            setattr(action, "complete", _either(devices))  # noqa: B010 - as below
        elif action.dest == _POWER_MODES:
            action.choices = modes
        elif action.metavar in _FILES:
            setattr(action, "complete", shtab.FILE)  # noqa: B010 - shtab's protocol, unknown to argparse's types


def _either(words: list[str]) -> dict[str, Any]:
    """For shtab: one of the words or a file. tcsh, which has no functions, knows the words alone."""
    joined = " ".join(words)
    name = "_edgeq_words_or_files"
    return {
        "bash": name,
        "zsh": name,
        "tcsh": f"({joined})",
        "preamble": {
            "bash": f'{name}() {{\n  compgen -W "{joined}" -- "$1"\n  compgen -f -- "$1"\n}}',
            "zsh": f"{name}() {{\n  _alternative 'words:device:({joined})' 'files:file:_files'\n}}",
        },
    }


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Every argument of a parser and of its commands."""
    for action in parser._actions:  # noqa: SLF001 - argparse has no other way to its arguments
        yield action
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001 - and none to its commands
            for sub in action.choices.values():
                yield from _actions(sub)
