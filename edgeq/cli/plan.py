"""``edgeq plan``: what convert would decide."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from edgeq.cli.arguments import add_json_argument
from edgeq.cli.files import add_export_arguments, check_export, check_output, export_types, refuse_same, write_output
from edgeq.cli.model_arguments import add_model_arguments, device_of, job_from
from edgeq.cli.tensor_arguments import (
    add_tensor_arguments,
    is_called_with_arrays,
    refuse_language_options,
    refuse_other_kind,
    refuse_tensor_options,
    tensor_job_from,
)

if TYPE_CHECKING:
    from edgeq.planner.convert import Job
    from edgeq.planner.front import Front
    from edgeq.planner.problem import Problem
    from edgeq.planner.search import Demand
    from edgeq.planner.tensors.job import TensorJob
    from edgeq.profiles.device import DeviceProfile
    from edgeq.types import ModelSource, Plan

EXAMPLES = """\
edgeq plan ./model --target laptop-cpu --max-memory 400MiB
edgeq plan ./model --target jetson-orin --quant q4_k_m --context 8192 --kv-type q8_0 --json
edgeq plan ./model --target jetson-orin --power-mode 15W
edgeq plan ./model --target laptop-cpu --max-size 100MB --front pareto.svg
edgeq plan ./model --target laptop-cpu --max-kld 0.05 --export types.txt --format llama.cpp
edgeq plan ./resnet-50 --target jetson-orin --shape pixel_values=1x3x224x224
edgeq plan detector.onnx --target laptop-cpu --calibration inputs.npz --json
"""

_PICTURES = (".svg", ".png")
_PICTURED = ("front", "export", "format")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_model_arguments(parser)
    add_tensor_arguments(parser)
    front = parser.add_argument_group("picture")
    front.add_argument(
        "--front",
        nargs="?",
        type=_picture,
        const=Path(),
        metavar="FILE",
        help="draw predicted KL divergence against bytes: the best mixes, the plan and llama.cpp's presets; here, and "
        "into a .svg or .png (needs matplotlib: pip install 'edgeq[plot]')",
    )
    add_export_arguments(parser)
    add_json_argument(parser)


def _picture(text: str) -> Path:
    if not text.lower().endswith(_PICTURES):
        message = f"{text!r} ends in neither .svg nor .png; a model's name stands before --front"
        raise argparse.ArgumentTypeError(message)
    return Path(text)


def run(args: argparse.Namespace) -> int:
    """Plan, and show every decision."""
    from edgeq.converters.hub import looked_up_once
    from edgeq.planner.job import profile_of

    refuse_other_kind(args)
    job, tensor_job = job_from(args), tensor_job_from(args, device_of(args))
    _check_front(job, args)
    check_export(args)
    refuse_same(("--front", args.front if args.front != Path() else None), ("--export", args.export))
    profile_of(job)
    with looked_up_once():
        return _plan_tensor(args, tensor_job) if is_called_with_arrays(args) else _plan_language(args, job)


def _plan_language(args: argparse.Namespace, job: Job) -> int:
    from edgeq.cli.output import show, show_lines
    from edgeq.cli.progress import Progress
    from edgeq.planner.convert import plan_only
    from edgeq.types import to_json

    refuse_tensor_options(args)
    fronts: list[Front] = []

    def look(problem: Problem, demand: Demand, plan: Plan) -> None:
        from edgeq.planner.front import look_at_front

        fronts.append(look_at_front(problem, demand, plan, job.request.overrides))

    with Progress(sys.stderr) as progress, tempfile.TemporaryDirectory(prefix="edgeq-plan-") as folder:
        source, profile, plan = plan_only(
            job,
            Path(folder) / "plan",
            look=None if args.front is None else look,
            progress=lambda stage, done, total, detail: progress(done, total, stage),
        )
    front = fronts[0] if fronts else None
    wrote = export_types(args, plan.tensor_types, plan.preset)
    if front is not None:
        wrote += _draw(front, f"{source.id} on {profile.name}", args)
    if args.json:
        show(to_json(_document(plan, front)).decode())
        return 0
    show_lines(_lines(job, source, profile, plan))
    _show_front(front)
    show_lines(wrote)
    return 0


def _plan_tensor(args: argparse.Namespace, job: TensorJob) -> int:
    """Count, or with inputs or if it is asked for decide, as ``edgeq convert`` does."""
    from edgeq.cli.arguments import refuse_options
    from edgeq.cli.describe_tensor_plan import preview_lines
    from edgeq.cli.output import show, show_lines
    from edgeq.cli.progress import Progress
    from edgeq.planner.tensors.plan_only import plan_tensor
    from edgeq.types import to_json

    refuse_language_options(args)
    refuse_options(args, _PICTURED, f"{args.model} is called with arrays", "for language models")
    with Progress(sys.stderr) as progress, tempfile.TemporaryDirectory(prefix="edgeq-plan-") as folder:
        preview = plan_tensor(
            job,
            Path(folder) / "plan",
            decide=args.calibration is not None or args.held_out is not None or args.search == "always",
            progress=lambda stage, done, total, detail: progress(done, total, stage),
        )
    if args.json:
        show(to_json(preview).decode())
    else:
        show_lines(preview_lines(preview))
    return 0


def _check_front(job: Job, args: argparse.Namespace) -> None:
    """A picture needs what a search stands on, and a file that can be written; both are settled before any work."""
    from edgeq.errors import UsageError

    if args.front is None:
        return
    reasons = {"--quant": args.quant, "--recipe": job.request.from_recipe, "--search never": args.search == "never"}
    given = next((option for option, reason in reasons.items() if reason), None)
    if given is not None:
        raise UsageError(f"--front draws what a search can find, and {given} leaves none", f"Leave out {given}")
    if args.front != Path():
        from edgeq.cli.picture import check_picture

        check_picture(args.front)
        check_output(args.front, force=args.force)


def _draw(front: Front, title: str, args: argparse.Namespace) -> list[str]:
    """Write the picture, if a file is named for it; the line that says so."""
    from edgeq.cli.picture import draw

    if args.front == Path():
        return []
    write_output(args.front, draw(front, title, args.front.suffix), force=args.force)
    return [f"wrote {args.front}"]


def _document(plan: Plan, front: Front | None) -> object:
    """The plan, with the points of the picture under ``front`` where one was asked for."""
    import msgspec

    return plan if front is None else {**msgspec.to_builtins(plan), "front": front}


def _lines(job: Job, source: ModelSource, profile: DeviceProfile, plan: Plan) -> list[str]:
    from edgeq.cli.describe import plan_lines, prediction_lines, sections, type_lines
    from edgeq.types import merge_budgets

    budget = merge_budgets(profile.budget, job.budget)
    lines = sections(plan_lines(plan, source), type_lines(plan), prediction_lines(plan, budget, job.goal))
    if job.goal.max_kld is not None or job.goal.min_top1 is not None:
        lines.append("edgeq convert measures quality, and publishes nothing that misses its limit")
    return lines


def _show_front(front: Front | None) -> None:
    from edgeq.cli.front import front_text
    from edgeq.cli.output import show
    from edgeq.cli.tables import wants_colour

    if front is not None:
        show(f"\n{front_text(front, colour=wants_colour())}")
