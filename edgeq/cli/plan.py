"""``edgeq plan``: what convert would decide."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from edgeq.cli.arguments import add_json_argument
from edgeq.cli.model_arguments import add_model_arguments, job_from

EXAMPLES = """\
edgeq plan ./model --target laptop-cpu --max-memory 400MiB
edgeq plan ./model --target jetson-orin --quant q4_k_m --context 8192 --kv-type q8_0 --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_model_arguments(parser)
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Plan, and show every decision."""
    from edgeq.cli.describe import plan_lines, prediction_lines, type_lines
    from edgeq.cli.output import show, show_lines
    from edgeq.cli.progress import Progress
    from edgeq.planner.convert import plan_only
    from edgeq.types import merge_budgets, to_json

    job = job_from(args)
    with Progress(sys.stderr) as progress, tempfile.TemporaryDirectory(prefix="edgeq-plan-") as folder:
        source, profile, plan = plan_only(
            job,
            Path(folder) / "plan",
            progress=lambda stage, done, total, detail: progress(done, total, stage),
        )
    if args.json:
        show(to_json(plan).decode())
        return 0
    budget = merge_budgets(profile.budget, job.budget)
    lines = [*plan_lines(plan, source), "", *type_lines(plan), "", *prediction_lines(plan, budget)]
    show_lines(lines)
    return 0
