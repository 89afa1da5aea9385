"""``edgeq completion``: tab completion for shells."""

from __future__ import annotations

import argparse

EXAMPLES = """\
edgeq completion bash > ~/.local/share/bash-completion/completions/edgeq
edgeq completion zsh > ~/.zfunc/_edgeq
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("shell", choices=["bash", "zsh", "tcsh"], help="the shell to print completion for")


def run(args: argparse.Namespace) -> int:
    """Print the script."""
    import shtab

    from edgeq.cli.output import show
    from edgeq.cli.parser import build_parser

    show(shtab.complete(build_parser(), shell=args.shell) + "\n")
    return 0
