"""Arguments that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgeq.types import Budget

__all__ = [
    "add_budget_arguments",
    "add_json_argument",
    "add_latency_argument",
    "budget_of",
    "positive_int",
    "read_file",
    "read_path",
    "refuse_options",
    "thread_count",
    "whole_number",
]

_LARGEST_SEED = 2**32 - 1


def positive_int(text: str) -> int:
    """A whole number above zero, for argparse."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value <= 0:
        message = f"{text!r} is no whole number above zero"
        raise argparse.ArgumentTypeError(message)
    return value


def whole_number(text: str) -> int:
    """A whole number from zero to what a seed can be, for argparse."""
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not 0 <= value <= _LARGEST_SEED:
        message = f"{text!r} is no whole number from 0 to {_LARGEST_SEED}"
        raise argparse.ArgumentTypeError(message)
    return value


def read_path(text: str) -> Path:
    """A file as `read_file` takes it, or a folder."""
    path = Path(text)
    return path if path.is_dir() else read_file(text)


def read_file(text: str) -> Path:
    """A file that is there and can be read, for argparse: found out before hours of work that need it at their end.

    Devices and pipes, which have no end or can be read but once, are refused.
    """
    path = Path(text)
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            message = f"{text!r} is no regular file"
            raise argparse.ArgumentTypeError(message)
        with path.open("rb"):
            return path
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        message = f"{text!r} cannot be read: {reason}"
        raise argparse.ArgumentTypeError(message) from error


def thread_count(text: str) -> int:
    """A number of threads that llama.cpp can have, for argparse."""
    from edgeq.errors import UsageError
    from edgeq.llama_library import check_threads

    try:
        return check_threads(positive_int(text))
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error).removesuffix(".")) from error


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    """``--json``."""
    parser.add_argument("--json", action="store_true", help="print the result as JSON on stdout")


def add_budget_arguments(parser: argparse.ArgumentParser, overrides: str) -> None:
    """One option for each limit; they override those of ``overrides``, line by line."""
    group = parser.add_argument_group("budget", f"limits; each overrides that of {overrides}")
    group.add_argument("--max-memory", metavar="SIZE", help="peak memory of the serving process, such as 400MiB")
    group.add_argument("--max-itl", metavar="TIME", help="inter-token latency, 99th percentile, such as 60ms")
    group.add_argument("--max-ttft", metavar="TIME", help="time to first token, 95th percentile, such as 1.5s")
    group.add_argument("--min-tps", metavar="RATE", help="decode speed, median, such as 20tok/s")
    group.add_argument("--max-load", metavar="TIME", help="time from process start to ready, median, such as 3s")


def add_latency_argument(group: argparse._ActionsContainer) -> None:
    """The one limit that only models called with arrays have."""
    group.add_argument("--max-latency", metavar="TIME", help="of a call, 99th percentile, such as 33ms")


def refuse_options(args: argparse.Namespace, names: Sequence[str], what: str, whose: str) -> None:
    """Refuse, rather than ignore, options that this kind of model does not have.

    Args:
        args: that were parsed; an option that was not given is None or an empty list.
        names: of the options, as in ``args``.
        what: the model is, for people.
        whose: the options are.

    Raises:
        UsageError: one was given.
    """
    from edgeq.errors import UsageError

    given = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name, None) not in (None, [])]
    if given:
        raise UsageError(f"{what}, and {', '.join(given)} is {whose}", "Leave it out")


def budget_of(args: argparse.Namespace) -> Budget:
    """The budget that `add_budget_arguments` and `add_latency_argument` collected; what was not given is None.

    Raises:
        UsageError: a limit without a number or with a nonsense unit.
    """
    from edgeq.types import Budget
    from edgeq.units import parse_bytes, parse_ms, parse_rate

    latency = getattr(args, "max_latency", None)
    return Budget(
        peak_memory_bytes=None if args.max_memory is None else parse_bytes(args.max_memory),
        itl_ms=None if args.max_itl is None else parse_ms(args.max_itl),
        ttft_ms=None if args.max_ttft is None else parse_ms(args.max_ttft),
        tokens_per_s=None if args.min_tps is None else parse_rate(args.min_tps),
        load_ms=None if args.max_load is None else parse_ms(args.max_load),
        latency_ms=None if latency is None else parse_ms(latency),
    )
