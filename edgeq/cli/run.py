"""``edgeq run``: generate text with a bundle."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from edgeq.cli.arguments import add_json_argument, positive_int, thread_count

if TYPE_CHECKING:
    from edgeq.runtime.generation import Generation, Token

EXAMPLES = """\
edgeq run bundle "What does a robot need to know about doors?"
edgeq run bundle --system "Answer in one word." "The capital of France?" --max-tokens 8
edgeq run bundle --raw "Once upon a time" --temperature 0.8 --seed 7
echo "Summarise: the arm is stuck" | edgeq run bundle -
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("bundle", type=Path, help="folder that edgeq convert wrote")
    parser.add_argument("prompt", help="what to say; - reads it from standard input")
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument("--raw", action="store_true", help="continue the prompt as it is, without the chat template")
    parser.add_argument("--max-tokens", type=positive_int, default=256, metavar="N", help="of the answer (256)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0, the default, is greedy")
    parser.add_argument("--seed", type=int, metavar="N", help="for a temperature above 0")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    parser.add_argument("--deadline", metavar="TIME", help="end by then, prompt included, such as 2s")
    parser.add_argument("--threads", type=thread_count, metavar="N", help="default: what the bundle was planned for")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Load, generate, and show text as it comes; timings go to stderr."""
    import edgeq
    from edgeq.cli.output import ReaderGoneError
    from edgeq.errors import UsageError
    from edgeq.units import parse_ms

    text = _standard_input() if args.prompt == "-" else args.prompt
    if not text.strip():
        raise UsageError("The prompt is empty", "Give some text, or - and text on standard input")
    if args.temperature < 0:
        raise UsageError(f"--temperature {args.temperature:g} is below zero", "Use 0 for greedy decoding, or about 0.7")
    deadline_ms = parse_ms(args.deadline) if args.deadline is not None else None
    with contextlib.suppress(ReaderGoneError), edgeq.load(args.bundle, kind="llm", threads=args.threads) as session:
        chat = session.manifest.artifact.has_chat_template and not args.raw
        system = [{"role": "system", "content": args.system}] if args.system else []
        if system and not chat:
            raise UsageError("--system needs a chat template", "Leave --raw out, or put it into the prompt")
        generation = session.generate(
            [*system, {"role": "user", "content": text}] if chat else text,
            max_tokens=args.max_tokens,
            temperature=args.temperature,
            seed=args.seed,
            stop=args.stop,
            deadline_ms=deadline_ms,
            on_token=None if args.json else _show,
        )
        _finish(generation, session.load_ms, as_json=args.json)
    return 0


def _standard_input() -> str:
    from edgeq.errors import UsageError

    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UsageError(f"Standard input is no text: {error}", "Send text in UTF-8") from error


def _show(token: Token) -> None:
    from edgeq.cli.output import stream

    stream(token.text)


def _finish(generation: Generation, load_ms: float, *, as_json: bool) -> None:
    import dataclasses
    import json

    from edgeq.cli.output import note, show

    if as_json:
        show(json.dumps({**dataclasses.asdict(generation), "load_ms": load_ms}) + "\n")
        return
    show("\n")
    timings = generation.timings
    first = "no first token" if timings.ttft_ms is None else f"first token {timings.ttft_ms:.0f} ms"
    speed = "" if timings.tokens_per_s is None else f" at {timings.tokens_per_s:.1f} tok/s"
    note(
        f"{generation.prompt_tokens} prompt tokens, {first}, {len(generation.token_ids)} tokens{speed}, "
        f"ended by {generation.finish_reason}, load {load_ms:.0f} ms"
    )
