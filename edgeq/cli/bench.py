"""``edgeq bench``: measure a bundle on this machine and judge it against its budget."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from edgeq.cli.arguments import add_budget_arguments, add_json_argument, budget_of, positive_int, thread_count

if TYPE_CHECKING:
    from edgeq.report import Report

EXAMPLES = """examples:
  edgeq bench bundle
  edgeq bench bundle --max-memory 400MiB --max-itl 60ms
  edgeq bench bundle --prompt-tokens 512 --repetitions 20 --json > report.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("bundle", type=Path, help="folder that edgeq convert wrote")
    parser.add_argument(
        "--prompt-tokens", type=positive_int, default=128, metavar="N", help="length of each prompt (128)"
    )
    parser.add_argument(
        "--output-tokens", type=positive_int, default=32, metavar="N", help="length of each answer (32)"
    )
    parser.add_argument("--warmup", type=int, default=3, metavar="N", help="repetitions that are not counted (3)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--repetitions", type=positive_int, metavar="N", help="default: as many as the budget's lines need"
    )
    length.add_argument("--seconds", type=float, metavar="S", help="take samples for this long")
    parser.add_argument("--max-seconds", type=float, default=120.0, metavar="S", help="end by then (120)")
    parser.add_argument("--context", type=positive_int, metavar="N", help="default: what the bundle was planned for")
    parser.add_argument("--threads", type=thread_count, metavar="N", help="default: what the bundle was planned for")
    parser.add_argument("--confidence", type=float, default=0.95, metavar="C", help="of each verdict (0.95)")
    parser.add_argument(
        "--max-host-load",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="CPU share of other processes above which a run is invalid (0.1); 1 switches the check off",
    )
    add_budget_arguments(parser, "the bundle")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the report there, not into the bundle")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, write the report, print it; 0 if every line passes or none is constrained, else 3."""
    from edgeq.bundle import open_bundle
    from edgeq.cli.output import note
    from edgeq.cli.progress import Progress
    from edgeq.report import LATEST, Workload, check_writable, publish_report, write_report
    from edgeq.runtime.bench import run_bench

    budget = budget_of(args)
    opened = open_bundle(args.bundle)
    check_writable(args.output or opened.reports / LATEST)
    workload = Workload(
        prompt_tokens=args.prompt_tokens,
        output_tokens=args.output_tokens,
        warmup=args.warmup,
        repetitions=args.repetitions,
        seconds=args.seconds,
        max_seconds=args.max_seconds,
        context_tokens=args.context,
        threads=args.threads,
    )
    with Progress(sys.stderr) as progress:
        report = run_bench(
            args.bundle,
            workload,
            budget=budget,
            confidence=args.confidence,
            max_host_load=args.max_host_load,
            progress=progress,
        )
    if args.output is not None:
        write_report(report, args.output)
        written = args.output
    else:
        written = publish_report(report, opened)
    show_report(report, as_json=args.json)
    note(f"report written to {written}")
    return exit_code(report)


def show_report(report: Report, *, as_json: bool) -> None:
    """Print a report to stdout, for people or for machines."""
    from edgeq.cli.output import show
    from edgeq.cli.tables import render_report, wants_colour
    from edgeq.types import to_json

    show(to_json(report).decode() if as_json else render_report(report, colour=wants_colour()))


def exit_code(report: Report) -> int:
    """0 if every constrained line passes or none is constrained, 3 if one is missed or undecided."""
    return 0 if report.result in (None, "PASS") else 3
