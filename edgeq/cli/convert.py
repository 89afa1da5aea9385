"""``edgeq convert``: a model and a device to a bundle."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgeq.cli.arguments import add_json_argument
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
    from edgeq.bundle import Bundle
    from edgeq.planner.convert import Progress as Tell
    from edgeq.planner.job import Job
    from edgeq.planner.search import Goal
    from edgeq.planner.tensors.job import TensorJob

EXAMPLES = """\
edgeq convert HuggingFaceTB/SmolLM2-135M-Instruct --target jetson-orin -o smollm2
edgeq convert ./model --target laptop-cpu --max-memory 400MiB --max-itl 60ms -o bundle
edgeq convert ./model --profile my-robot.yaml --power-mode 15W -o bundle
edgeq convert ./model --target laptop-cpu --max-size 100MB --max-kld 0.05 -o bundle
edgeq convert ./model --target laptop-cpu --quant q4_k_m --tensor-type 'attn_v=q8_0' -o bundle
edgeq convert ./model --target laptop-cpu --recipe recipe.yaml --imatrix model.imatrix.gguf -o bundle
edgeq convert ./unknown-model --target laptop-cpu --llama-cpp ~/llama.cpp -o bundle
edgeq convert ./resnet-50 --target laptop-cpu --calibration ./photos -o camera
edgeq convert detector.onnx --target jetson-orin --precision int8 --calibration inputs.npz -o detector
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_model_arguments(parser)
    add_tensor_arguments(parser)
    parser.add_argument("-o", "--output", type=Path, metavar="FOLDER", help="the bundle (default: MODEL-DEVICE here)")
    parser.add_argument("--force", action="store_true", help="replace the bundle that is there, and its reports")
    add_json_argument(parser)


def default_output(model: str, target: str) -> Path:
    """``SmolLM2-135M-Instruct-jetson-orin`` for that model and target."""
    name = Path(model.rstrip("/")).name.removesuffix(".gguf").removesuffix(".onnx") or "model"
    return Path(f"{name}-{Path(target).stem}")


def run(args: argparse.Namespace) -> int:
    """Convert, and say what was made."""
    from edgeq.bundle import MANIFEST
    from edgeq.cli.describe import sections
    from edgeq.cli.output import show, show_lines
    from edgeq.cli.progress import Progress
    from edgeq.converters.hub import looked_up_once
    from edgeq.planner.job import profile_of
    from edgeq.planner.output import settled_output

    out = args.output or default_output(args.model, device_of(args))
    refuse_other_kind(args)
    # What makes no sense is refused before a model is looked for, and perhaps downloaded.
    job, tensor_job = job_from(args), tensor_job_from(args, device_of(args))
    settled_output(out, force=args.force)
    profile_of(job)
    with looked_up_once():
        arrays = is_called_with_arrays(args)
        with Progress(sys.stderr) as progress:

            def tell(stage: str, done: int, total: int, detail: str) -> None:
                progress(done, total, stage)

            bundle = _convert(args, tensor_job if arrays else job, out, tell)
    if args.json:
        show((bundle.path / MANIFEST).read_text(encoding="utf-8"))
        return 0
    following = [f"wrote {bundle.path}", f"next: edgeq bench {shlex.quote(str(bundle.path))}"]
    show_lines(sections(*_blocks(bundle, job.goal), following))
    return 0


def _convert(args: argparse.Namespace, job: Job | TensorJob, out: Path, tell: Tell) -> Bundle:
    from edgeq.planner.convert import Job, convert

    if isinstance(job, Job):
        refuse_tensor_options(args)
        return convert(job, out, force=args.force, progress=tell)
    from edgeq.planner.tensors.convert import convert_tensor

    refuse_language_options(args)
    return convert_tensor(job, out, force=args.force, progress=tell)


def _blocks(bundle: Bundle, goal: Goal) -> list[Sequence[str]]:
    """What was decided, and what came of it."""
    from edgeq.cli.describe import plan_lines, prediction_lines, quality_lines, trial_lines
    from edgeq.cli.describe_tensor import tensor_lines
    from edgeq.types import Manifest

    manifest = bundle.manifest
    if not isinstance(manifest, Manifest):
        return [tensor_lines(manifest)]
    plan = manifest.plan
    return [
        plan_lines(plan, manifest.source),
        trial_lines(plan.search),
        prediction_lines(plan, manifest.budget, goal),
        quality_lines(manifest.quality),
    ]
