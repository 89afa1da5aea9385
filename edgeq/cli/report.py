"""``edgeq report``: print the newest report of a bundle again."""

from __future__ import annotations

import argparse
from pathlib import Path

from edgeq.cli.arguments import add_json_argument

EXAMPLES = """\
edgeq report bundle
edgeq report bundle --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("bundle", type=Path, help="folder that edgeq bench has measured")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Print the report; the exit code is that of the run, so a script can rely on it."""
    from edgeq.bundle import open_bundle
    from edgeq.cli.bench import exit_code, show_report
    from edgeq.report import latest_report

    report = latest_report(open_bundle(args.bundle))
    show_report(report, as_json=args.json)
    return exit_code(report)
