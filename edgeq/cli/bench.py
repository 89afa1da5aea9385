"""``edgeq bench``: measure a bundle on this machine and judge it against its budget."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeq.cli.arguments import (
    add_budget_arguments,
    add_json_argument,
    add_latency_argument,
    budget_of,
    positive_int,
    read_path,
    refuse_options,
    thread_count,
)

if TYPE_CHECKING:
    from edgeq.bundle import Bundle
    from edgeq.report import Report, Workload

EXAMPLES = """\
edgeq bench bundle
edgeq bench bundle --max-memory 400MiB --max-itl 60ms
edgeq bench bundle --prompt-tokens 512 --repetitions 20 --json > report.json
edgeq bench camera --max-latency 33ms --max-memory 300MiB
edgeq bench embedder --inputs sentences.txt
edgeq bench embedder --size largest --axis batch=4
edgeq bench camera --device laptop-cpu
"""

_LANGUAGE_ONLY = ("prompt_tokens", "output_tokens", "context", "max_itl", "max_ttft", "min_tps")
_TENSOR_ONLY = ("inputs", "device", "size", "axis", "max_latency")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("bundle", type=Path, help="folder that edgeq convert wrote")
    language = parser.add_argument_group("language models")
    language.add_argument("--prompt-tokens", type=positive_int, metavar="N", help="length of each prompt (128)")
    language.add_argument("--output-tokens", type=positive_int, metavar="N", help="length of each answer (32)")
    language.add_argument("--context", type=positive_int, metavar="N", help="default: what the bundle was planned for")
    arrays = parser.add_argument_group("models that are called with arrays")
    arrays.add_argument(
        "--inputs",
        type=read_path,
        metavar="PATH",
        help="a folder of images, a .txt with a text a line, or .npz files; default: what the bundle brings, or else "
        "random numbers",
    )
    arrays.add_argument(
        "--device",
        metavar="NAME",
        help="of a bundle that was made for several, the one whose graph is measured; default: the first that this "
        "machine can run",
    )
    arrays.add_argument(
        "--size", choices=["usual", "largest"], help="of the axes of random inputs, as the bundle was planned (usual)"
    )
    arrays.add_argument(
        "--axis", metavar="NAME=N", action="append", default=[], help="size of one axis, such as batch=4; repeatable"
    )
    add_latency_argument(arrays)
    parser.add_argument("--warmup", type=int, metavar="N", help="answers (3) or calls (10) that are not counted")
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--repetitions", type=positive_int, metavar="N", help="default: as many as the budget's lines need"
    )
    length.add_argument("--seconds", type=float, metavar="S", help="take samples for this long")
    parser.add_argument("--max-seconds", type=float, default=120.0, metavar="S", help="end by then (120)")
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
    from edgeq.report import LATEST, check_writable, publish_report, write_report
    from edgeq.runtime.bench import run_bench

    budget = budget_of(args)
    opened = open_bundle(args.bundle)
    workload = _workload(args, opened)
    check_writable(args.output or opened.reports / LATEST)
    with Progress(sys.stderr) as progress:
        report = run_bench(
            args.bundle,
            workload,
            inputs=args.inputs,
            device=args.device,
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


def _workload(args: argparse.Namespace, opened: Bundle) -> Workload:
    """What was asked for, with the defaults of the bundle's kind for the rest.

    Raises:
        UsageError: an option that is for the other kind of bundle, or an axis without a size.
    """
    from edgeq.report import LanguageWorkload, TensorWorkload

    pace = {
        "warmup": args.warmup,
        "repetitions": args.repetitions,
        "seconds": args.seconds,
        "max_seconds": args.max_seconds,
        "threads": args.threads,
    }
    if opened.manifest.kind == "llm":
        refuse_options(args, _TENSOR_ONLY, f"{opened.path} is a language model", "for others")
        own = {
            "prompt_tokens": args.prompt_tokens,
            "output_tokens": args.output_tokens,
            "context_tokens": args.context,
        }
        return LanguageWorkload(**_given(pace | own))
    refuse_options(args, _LANGUAGE_ONLY, f"{opened.path} is called with arrays", "for language models")
    return TensorWorkload(**_given(pace | {"size": args.size, "axes": dict(_axis(text) for text in args.axis)}))


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _axis(text: str) -> tuple[str, int]:
    from edgeq.errors import UsageError

    name, equals, size = text.partition("=")
    if not name or not equals or not size.isascii() or not size.isdigit():
        raise UsageError(f"--axis {text!r} is not NAME=N", "Write something like batch=4")
    return name, int(size)


def show_report(report: Report, *, as_json: bool) -> None:
    """Print a report to stdout, for people or for machines."""
    from edgeq.cli.output import show
    from edgeq.cli.tables import render_report, wants_colour
    from edgeq.types import to_json

    show(to_json(report).decode() if as_json else render_report(report, colour=wants_colour()))


def exit_code(report: Report) -> int:
    """0 if every constrained line passes or none is constrained, 3 if one is missed or undecided."""
    return 0 if report.result in (None, "PASS") else 3
