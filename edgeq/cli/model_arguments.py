"""The arguments of ``edgeq convert`` and ``edgeq plan``: a model, a device, and everything that shapes a plan."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from edgeq.cli.arguments import add_budget_arguments, budget_of, positive_int, thread_count

if TYPE_CHECKING:
    from edgeq.planner.convert import Job
    from edgeq.planner.plan import Request

__all__ = ["add_model_arguments", "job_from"]


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the target, and everything that shapes a plan; `job_from` reads them."""
    parser.add_argument("model", help="Hugging Face id, a folder with config.json and safetensors, or a float GGUF")
    parser.add_argument("--target", required=True, metavar="DEVICE", help="device profile, or a profile's YAML file")
    parser.add_argument("--revision", help="branch, tag or commit of a Hugging Face id")
    parser.add_argument(
        "--llama-cpp", type=Path, metavar="DIR", help="use the convert_hf_to_gguf.py of this llama.cpp checkout"
    )
    plan = parser.add_argument_group("plan", "What is not given is chosen: the largest preset that the budget allows.")
    plan.add_argument("--quant", metavar="PRESET", help="uniform preset: f16, q8_0, q6_k, q5_k_m, q4_k_m, q4_0, …")
    plan.add_argument(
        "--tensor-type",
        metavar="REGEX=TYPE",
        action="append",
        default=[],
        help="type of the tensors whose name matches, such as ffn_down=q6_k; repeatable, the first match wins",
    )
    plan.add_argument("--recipe", type=Path, metavar="FILE", help="YAML with a base preset and overrides")
    plan.add_argument("--context", type=positive_int, metavar="N", help="tokens of prompt and answer (4096)")
    plan.add_argument("--kv-type", metavar="TYPE", help="type of the KV cache: f16 (default), q8_0, q4_0, …")
    plan.add_argument("--ubatch", type=positive_int, metavar="N", help="prompt tokens at once (CPU 128, GPU 512)")
    plan.add_argument("--threads", type=thread_count, metavar="N", help="of a session and of the conversion")
    plan.add_argument("--prompt-tokens", type=positive_int, metavar="N", help="prompt that TTFT is predicted for (128)")
    add_budget_arguments(parser, "the profile")


def job_from(args: argparse.Namespace) -> Job:
    """What `add_model_arguments` collected.

    Raises:
        UsageError: a limit, override or recipe that makes no sense, or ``--quant`` against a recipe's base.
    """
    from edgeq.planner.convert import Job

    return Job(
        model=args.model,
        target=args.target,
        budget=budget_of(args),
        request=_request(args),
        revision=args.revision,
        llama_cpp=args.llama_cpp,
        threads=args.threads or 0,
    )


def _request(args: argparse.Namespace) -> Request:
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
    )
