"""The arguments of ``edgeq convert`` and ``edgeq plan``: a model, a device, and everything that shapes a plan."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeq.cli.arguments import (
    add_budget_arguments,
    budget_of,
    positive_int,
    read_file,
    read_path,
    thread_count,
    whole_number,
)

if TYPE_CHECKING:
    from edgeq.planner.convert import Job
    from edgeq.planner.inspection import QualityOptions
    from edgeq.planner.knapsack import Objective
    from edgeq.planner.plan import Request
    from edgeq.planner.problem import SearchOptions
    from edgeq.planner.search import Goal

__all__ = ["add_model_arguments", "device_of", "job_from"]

_MINIMIZE: dict[str, Objective] = {"quality": "kld", "bytes": "file_bytes", "memory": "memory_bytes", "latency": "ns"}
_FEWEST_EVAL_TOKENS = 16  # a text with less cannot be compared with the calibration's
_LARGEST_KLD = 10.0  # nats; a model that knows nothing of the language is about that far away
# What only a search reads: refused, rather than ignored, where the types are given.
_SEARCH_ONLY = ("minimize", "estimator", "calibration", "calibration_tokens", "seed", "trials", "decode_costs")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the target, and everything that shapes a plan; `job_from` reads them."""
    parser.add_argument(
        "model", help="Hugging Face id, a folder with config.json and safetensors, a float GGUF, or an ONNX file"
    )
    _add_device_arguments(parser)
    parser.add_argument("--revision", help="branch, tag or commit of a Hugging Face id")
    parser.add_argument(
        "--llama-cpp", type=Path, metavar="DIR", help="use the convert_hf_to_gguf.py of this llama.cpp checkout"
    )
    _add_plan_arguments(parser)
    add_budget_arguments(parser, "the profile")
    _add_goal_arguments(parser)
    _add_search_arguments(parser)
    _add_quality_arguments(parser)


def _add_device_arguments(parser: argparse.ArgumentParser) -> None:
    device = parser.add_mutually_exclusive_group(required=True)
    device.add_argument("--target", metavar="DEVICE", help="name of a device profile: see edgeq devices")
    device.add_argument(
        "--profile", metavar="FILE", help="a device profile of your own: YAML, as edgeq devices probe writes it"
    )
    parser.add_argument(
        "--power-mode", metavar="NAME", help="nvpmodel's name for it, such as 15W; default: the profile's own"
    )


def _add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    plan = parser.add_argument_group(
        "plan", "What is not given is chosen: f16 or q8_0 where the budget allows it, else the best mix of types."
    )
    plan.add_argument("--quant", metavar="PRESET", help="uniform preset: f16, q8_0, q6_k, q5_k_m, q4_k_m, q4_0, …")
    plan.add_argument(
        "--tensor-type",
        metavar="REGEX=TYPE",
        action="append",
        default=[],
        help="type of the tensors whose name matches, such as ffn_down=q6_k; repeatable, the first match wins; "
        "a search keeps it",
    )
    plan.add_argument(
        "--recipe",
        type=Path,
        metavar="FILE",
        help="YAML with a base preset and overrides, as bundles and --export have it; with --search always the types "
        "that it leaves open are searched for, and errors are compensated as in a search",
    )
    plan.add_argument("--context", type=positive_int, metavar="N", help="tokens of prompt and answer (4096)")
    plan.add_argument("--kv-type", metavar="TYPE", help="type of the KV cache: f16 (default), q8_0, q4_0, …")
    plan.add_argument("--ubatch", type=positive_int, metavar="N", help="prompt tokens at once (CPU 128, GPU 512)")
    plan.add_argument("--threads", type=thread_count, metavar="N", help="of a session and of the conversion")
    plan.add_argument("--prompt-tokens", type=positive_int, metavar="N", help="prompt that TTFT is predicted for (128)")


def _add_goal_arguments(parser: argparse.ArgumentParser) -> None:
    goal = parser.add_argument_group(
        "goal", "beside the budget: limits on the file and on quality, and what to make least"
    )
    goal.add_argument("--max-size", metavar="SIZE", help="of the GGUF, such as 100MB")
    goal.add_argument(
        "--max-kld",
        metavar="NATS",
        help="mean KL divergence from the unquantized model, such as 0.05; measured before anything is published",
    )
    goal.add_argument(
        "--min-top1",
        metavar="SHARE",
        help="share of positions with the unquantized model's most likely token: 0.9 or 90%%; measured like --max-kld",
    )
    goal.add_argument(
        "--minimize",
        choices=[*_MINIMIZE],
        help="what a mix makes least within the limits (quality means its loss; bytes, if --max-kld is the only limit)",
    )


def _add_search_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "search", "how the best mix of types is found; what it measures is kept on disk for the next budget"
    )
    group.add_argument(
        "--search",
        choices=["auto", "always", "never"],
        default="auto",
        help="auto (default): where neither f16 nor q8_0 fits, or a goal is given; never: presets only",
    )
    group.add_argument(
        "--estimator",
        choices=["auto", "fisher", "imatrix"],
        help="of sensitivities: gradients (fisher, needs torch and a Hugging Face model) or measured probes (imatrix)",
    )
    group.add_argument(
        "--calibration",
        type=read_path,
        metavar="PATH",
        help="text; default: the model writes its own. For models called with arrays a folder of images, a text file "
        "with a text a line, a .npz file or a folder of them; default: random inputs, with a warning",
    )
    group.add_argument("--calibration-tokens", type=positive_int, metavar="N", help="of calibration text (10240)")
    group.add_argument(
        "--imatrix",
        type=read_file,
        metavar="FILE",
        help="importance matrix for rounding, as llama-imatrix writes it; presets use it too",
    )
    group.add_argument("--seed", type=whole_number, metavar="N", help="of everything that is drawn at random (0)")
    group.add_argument(
        "--trials", type=positive_int, metavar="N", help="mixes that convert really makes and compares (4)"
    )
    group.add_argument(
        "--decode-costs",
        choices=["auto", "profile"],
        help="times of types: kernels timed here if the target is a CPU like this (auto), or the profile's bandwidth",
    )


def _add_quality_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "quality", "what convert judges the finished model on, against the unquantized one"
    )
    group.add_argument("--eval-text", type=read_file, metavar="FILE", help="text; default: the one inside Python")
    group.add_argument(
        "--eval-tokens",
        type=whole_number,
        metavar="N",
        help="of that text (4096; 1024 for a preset without limits on quality); 0 leaves the judgement out",
    )


def job_from(args: argparse.Namespace) -> Job:
    """What `add_model_arguments` collected.

    Raises:
        UsageError: a limit, override or recipe that makes no sense, or options that contradict each other.
    """
    from edgeq.planner.convert import Job

    goal = _goal(args)
    return Job(
        model=args.model,
        target=device_of(args),
        power_mode=args.power_mode,
        budget=budget_of(args),
        request=_request(args, goal),
        revision=args.revision,
        llama_cpp=args.llama_cpp,
        threads=args.threads or 0,
        goal=goal,
        search=_search(args),
        quality=_quality(args, goal),
        search_given=tuple(_option(name) for name in _SEARCH_ONLY if getattr(args, name) is not None),
    )


def device_of(args: argparse.Namespace) -> str:
    """What ``--target`` or ``--profile`` said, as `edgeq.profiles.loader.load_profile` takes it.

    Raises:
        UsageError: ``--profile`` names a device, and there is no such file.
    """
    if args.profile is None:
        target: str = args.target
        return target
    file: str = args.profile
    if "/" in file:
        return file
    from edgeq.errors import UsageError
    from edgeq.profiles.loader import profile_names

    if file.lower() in profile_names() and not Path(file).is_file():
        raise UsageError(f"--profile takes a file, and {file} is a device's name", f"Use --target {file}")
    return f"./{file}"


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _goal(args: argparse.Namespace) -> Goal:
    from edgeq.errors import UsageError
    from edgeq.planner.search import Goal
    from edgeq.units import parse_bytes

    minimize = None if args.minimize is None else _MINIMIZE[args.minimize]
    if minimize not in (None, "kld") and args.max_kld is None:
        raise UsageError(
            f"--minimize {args.minimize} alone would take the smallest types, whatever they cost in quality",
            "Say with --max-kld how much they may cost, such as --max-kld 0.05",
        )
    return Goal(
        max_file_bytes=None if args.max_size is None else parse_bytes(args.max_size),
        max_kld=None if args.max_kld is None else _nats(args.max_kld),
        min_top1=None if args.min_top1 is None else _share(args.min_top1),
        minimize=minimize,
    )


def _nats(text: str) -> float:
    from edgeq.errors import UsageError

    value = _number(text.strip().removesuffix("nats").strip())
    if value is None or not 0.0 < value <= _LARGEST_KLD:
        raise UsageError(
            f"--max-kld {text} is no KL divergence from above 0 to {_LARGEST_KLD:g} nats", "Write something like 0.05"
        )
    return value


def _share(text: str) -> float:
    from edgeq.errors import UsageError

    bare = text.strip()
    value = _number(bare.removesuffix("%"))
    share = None if value is None else value / 100 if bare.endswith("%") else value
    if share is None or not 0.0 < share <= 1.0:
        raise UsageError(f"--min-top1 {text} is no share from above 0 to 1", "Write something like 0.9 or 90%")
    return share


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _request(args: argparse.Namespace, goal: Goal) -> Request:
    from edgeq.converters.gguf.recipe import parse_override, read_recipe
    from edgeq.errors import UsageError
    from edgeq.planner.plan import DEFAULT_PROMPT_TOKENS, Request

    overrides = tuple(parse_override(text) for text in args.tensor_type)
    preset = args.quant
    if args.recipe is not None:
        recipe = read_recipe(args.recipe)
        if recipe.base and preset and recipe.base.lower() != preset.lower():
            raise UsageError(
                f"--quant {preset} contradicts the base {recipe.base} of {args.recipe}", "Leave one of them out"
            )
        if recipe.base and args.search == "always":
            raise UsageError(
                f"--search always finds the types, and {args.recipe} has the base {recipe.base} for all of them",
                "Remove the base from it, or leave out --search always",
            )
        preset = preset or recipe.base
        overrides = (*overrides, *recipe.overrides)
    return Request(
        preset=preset,
        overrides=overrides,
        context_tokens=args.context,
        kv_type=args.kv_type,
        ubatch_tokens=args.ubatch,
        prompt_tokens=args.prompt_tokens or DEFAULT_PROMPT_TOKENS,
        threads=args.threads,
        from_recipe=args.recipe is not None and args.search != "always",
        max_file_bytes=goal.max_file_bytes,
    )


def _search(args: argparse.Namespace) -> SearchOptions:
    import dataclasses

    from edgeq.converters.calibration.texts import CHUNK_TOKENS
    from edgeq.converters.gguf.sensitivity.evidence import EvidenceRequest
    from edgeq.errors import UsageError
    from edgeq.planner.problem import SearchOptions

    _refuse_idle(args)
    if args.calibration_tokens is not None and args.calibration_tokens < CHUNK_TOKENS:
        raise UsageError(
            f"--calibration-tokens {args.calibration_tokens} is less than one chunk of {CHUNK_TOKENS}",
            "Use 2048 or more; sensitivities need thousands of tokens",
        )
    evidence = _given(
        estimator=args.estimator,
        calibration=args.calibration,
        imatrix=args.imatrix,
        tokens=args.calibration_tokens,
        seed=args.seed,
    )
    options = _given(trials=args.trials, decode_costs=args.decode_costs)
    base = SearchOptions(when=args.search, evidence=dataclasses.replace(EvidenceRequest(), **evidence))
    return dataclasses.replace(base, **options)


def _given(**options: Any) -> dict[str, Any]:  # noqa: ANN401 - options of any type
    """Without what the user left to the default."""
    return {name: value for name, value in options.items() if value is not None}


def _refuse_idle(args: argparse.Namespace) -> None:
    """Refuse options of a search that will not be."""
    from edgeq.errors import UsageError

    reasons = {
        "--quant": args.quant is not None,
        "--recipe": args.recipe is not None and args.search != "always",
        "--search never": args.search == "never",
    }
    against = next((option for option, given in reasons.items() if given), None)
    idle = next((name for name in _SEARCH_ONLY if getattr(args, name) is not None), None)
    if against == "--quant" and args.search == "always":
        raise UsageError("--search always finds the types, and --quant gives them", "Leave out one of them")
    if against is not None and idle is not None:
        option = _option(idle)
        raise UsageError(f"{option} is for a search, and {against} leaves none", f"Leave out {option} or {against}")


def _check_texts(args: argparse.Namespace) -> None:
    """Look at the texts before a model is even looked for."""
    from edgeq.converters.calibration.texts import check_text_file
    from edgeq.errors import UsageError

    given = [path for path in (args.calibration, args.eval_text) if path is not None]
    for path in given:
        # Folders and arrays are for models called with arrays; a language model refuses them later.
        if not (path is args.calibration and (path.is_dir() or path.suffix.lower() == ".npz")):
            check_text_file(path)
    if len(given) == 2 and given[0].samefile(given[1]):
        raise UsageError(
            f"--calibration and --eval-text are the same text, {args.eval_text}: a model would be judged by what it "
            "was calibrated on",
            "Give another text to one of them",
        )


def _quality(args: argparse.Namespace, goal: Goal) -> QualityOptions:
    from edgeq.errors import UsageError
    from edgeq.planner.inspection import QualityOptions

    if args.eval_tokens == 0 and (goal.max_kld is not None or goal.min_top1 is not None):
        raise UsageError(
            "--eval-tokens 0 measures nothing, and quality is limited", "Leave it out, or the limit on quality"
        )
    if args.eval_tokens == 0 and args.eval_text is not None:
        raise UsageError("--eval-tokens 0 reads nothing of --eval-text", "Leave out one of them")
    if args.eval_tokens is not None and 0 < args.eval_tokens < _FEWEST_EVAL_TOKENS:
        raise UsageError(
            f"--eval-tokens {args.eval_tokens} is less than {_FEWEST_EVAL_TOKENS}, too few to judge anything by",
            "Use 1024 or more, or 0 to leave the judgement out",
        )
    _check_texts(args)
    return QualityOptions(**_given(text=args.eval_text, tokens=args.eval_tokens))
