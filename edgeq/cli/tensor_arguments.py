"""The arguments of ``edgeq convert`` for models that are called with arrays."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeq.cli.arguments import add_latency_argument, budget_of, positive_int, refuse_options

if TYPE_CHECKING:
    from edgeq.planner.tensors.job import TensorJob

__all__ = [
    "add_tensor_arguments",
    "is_called_with_arrays",
    "refuse_language_options",
    "refuse_other_kind",
    "refuse_tensor_options",
    "tensor_job_from",
]

_FLOATS = ("fp32", "fp16", "bf16")
_PRECISIONS = ("auto", *_FLOATS, "int8", "int8-static", "int8-dynamic", "int8-weights", "int4-weights", "fp8")
_METHODS = ("auto", "minmax", "percentile", "entropy", "mse")
_TENSOR_ONLY = (
    "task",
    "shape",
    "precision",
    "backend",
    "held_out",
    "samples",
    "calibration_method",
    "percentile",
    "min_cosine",
    "min_detection_map",
    "min_coverage",
    "keep_float",
    "also_for",
    "max_latency",
)
_LANGUAGE_ONLY = (
    "quant",
    "tensor_type",
    "recipe",
    "context",
    "kv_type",
    "ubatch",
    "prompt_tokens",
    "max_itl",
    "max_ttft",
    "min_tps",
    "max_size",
    "max_kld",
    "minimize",
    "estimator",
    "calibration_tokens",
    "imatrix",
    "seed",
    "trials",
    "decode_costs",
    "eval_text",
    "eval_tokens",
    "llama_cpp",
)


def add_tensor_arguments(parser: argparse.ArgumentParser) -> None:
    """Everything that only models called with arrays have."""
    group = parser.add_argument_group(
        "arrays", "for perception, embedding and policy models, which are called with arrays: ONNX bundles"
    )
    group.add_argument("--task", metavar="TASK", help="such as image-classification; default: what config.json says")
    group.add_argument(
        "--shape",
        metavar="INPUT=AxBxC",
        action="append",
        default=[],
        help="fixed sizes of an input, such as pixel_values=1x3x224x224; repeatable. Engines and CPUs like them",
    )
    group.add_argument(
        "--precision",
        choices=_PRECISIONS,
        help="auto (default): the fastest that keeps --min-cosine; the float model, if nothing is faster",
    )
    add_latency_argument(group)
    group.add_argument(
        "--also-for",
        metavar="DEVICE",
        action="append",
        default=[],
        help="a second device, with a graph of its own in the bundle; repeatable",
    )
    group.add_argument("--backend", metavar="NAME", help="default: the device's first that runs ONNX models")
    group.add_argument(
        "--held-out", type=Path, metavar="PATH", help="inputs to judge on; default: part of --calibration"
    )
    group.add_argument("--samples", type=positive_int, metavar="N", help="inputs that ranges are taken from (64)")
    group.add_argument(
        "--calibration-method", choices=_METHODS, help="auto (default) takes the one nearest in its outputs"
    )
    group.add_argument("--percentile", metavar="P", help="of that method (99.99)")
    group.add_argument("--min-cosine", metavar="C", help="mean cosine of every output to the float model's (0.995)")
    group.add_argument(
        "--min-detection-map",
        metavar="SHARE",
        help="of detectors, instead: mean average precision with the float model's detections as the truth (0.8)",
    )
    group.add_argument(
        "--min-coverage", metavar="SHARE", help="of the multiply-adds that must truly be quantized: 0.9 or 90%%"
    )
    group.add_argument(
        "--keep-float", metavar="REGEX", action="append", default=[], help="nodes that stay in floats; repeatable"
    )


def is_called_with_arrays(args: argparse.Namespace) -> bool:
    """Whether the model that is named is not one that writes text; downloads what is not here yet."""
    from edgeq.cli.progress import Progress
    from edgeq.converters.source import resolve
    from edgeq.planner import kinds

    with Progress(sys.stderr) as progress:
        source = resolve(args.model, revision=args.revision, progress=lambda d, t, name: progress(d, t, "download"))
    return kinds.is_called_with_arrays(source, task=args.task)


def refuse_language_options(args: argparse.Namespace) -> None:
    """Refuse, rather than ignore, what a model that is called with arrays does not have."""
    refuse_options(args, _LANGUAGE_ONLY, f"{args.model} is called with arrays", "for language models")


def refuse_other_kind(args: argparse.Namespace) -> None:
    """Refuse options of the other kind before they are looked into, where the model lies on this disk.

    Raises:
        EdgeqError: such an option was given, or the model cannot be read.
    """
    given = [name for name in (*_TENSOR_ONLY, *_LANGUAGE_ONLY) if getattr(args, name, None) not in (None, [])]
    if not given or not _lies_here(args.model):
        return
    if is_called_with_arrays(args):
        refuse_language_options(args)
    else:
        _refuse_arrays_only(args)


def _lies_here(model: str) -> bool:
    path = Path(model)
    try:
        return (path.suffix.lower() == ".onnx" and path.is_file()) or (path / "config.json").is_file()
    except OSError:  # what is wrong is said where the model is looked for
        return False


def refuse_tensor_options(args: argparse.Namespace) -> None:
    """Refuse, rather than ignore, what a language model does not have; calibration inputs that are no text among it."""
    from edgeq.converters.calibration.texts import check_text_file

    _refuse_arrays_only(args)
    if args.calibration is not None:
        check_text_file(args.calibration)


def _refuse_arrays_only(args: argparse.Namespace) -> None:
    refuse_options(args, _TENSOR_ONLY, f"{args.model} is a language model", "for others")


def tensor_job_from(args: argparse.Namespace, target: str) -> TensorJob:
    """What was collected.

    Raises:
        UsageError: a number, shape, share or regular expression that makes no sense.
    """
    from edgeq.planner.tensors.job import Calibration, Gate, TensorJob, check_patterns

    calibration = Calibration(
        inputs=args.calibration,
        held_out=args.held_out,
        samples=args.samples or Calibration().samples,
        method=args.calibration_method or "auto",
        percentile=_number(args.percentile, "--percentile", 50.0, 100.0, Calibration().percentile),
    )
    gate = Gate(
        min_cosine=_number(args.min_cosine, "--min-cosine", 0.0, 1.0, Gate().min_cosine),
        min_top1=None if args.min_top1 is None else _number(args.min_top1, "--min-top1", 0.0, 1.0, 0.0),
        min_detection_map=_number(args.min_detection_map, "--min-detection-map", 0.0, 1.0, Gate().min_detection_map),
        min_coverage=_number(args.min_coverage, "--min-coverage", 0.0, 1.0, Gate().min_coverage),
    )
    check_patterns(args.keep_float)
    return TensorJob(
        model=args.model,
        target=target,
        budget=budget_of(args),
        task=args.task,
        shapes=dict(_shape(text) for text in args.shape),
        precision=args.precision or "auto",
        backend=args.backend,
        calibration=calibration,
        gate=gate,
        keep_float=tuple(args.keep_float),
        threads=args.threads,
        revision=args.revision,
        power_mode=args.power_mode,
        also_for=tuple(args.also_for),
    )


def _number(text: str | None, option: str, low: float, high: float, default: float) -> float:
    """A number or a percentage within limits, the lower one excluded."""
    from edgeq.errors import UsageError

    if text is None:
        return default
    stripped = text.strip()
    try:
        value = float(stripped.removesuffix("%")) / (100.0 if stripped.endswith("%") and high <= 1.0 else 1.0)
    except ValueError:
        value = float("nan")
    if not low < value <= high:
        raise UsageError(
            f"{option} {text} is not above {low:g} and at most {high:g}", f"Write something like {default:g}"
        )
    return value


def _shape(text: str) -> tuple[str, tuple[int, ...]]:
    from edgeq.errors import UsageError

    name, equals, sizes = text.partition("=")
    parts: list[Any] = sizes.lower().replace(",", "x").split("x")
    if not name or not equals or not all(part.strip().isascii() and part.strip().isdigit() for part in parts):
        raise UsageError(f"--shape {text!r} is not INPUT=AxBxC", "Write something like pixel_values=1x3x224x224")
    found = tuple(int(part) for part in parts)
    if not all(0 < size < 2**31 for size in found):
        raise UsageError(f"--shape {text!r} has a size that no array has", "Write sizes from 1 on")
    return name, found
