"""Files that a command writes beside what it prints: never over another one unasked, and whole or not at all."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from edgeq.errors import ConversionError, OutputExistsError, UsageError

__all__ = ["add_export_arguments", "check_export", "check_output", "export_types", "refuse_same", "write_output"]

_FORMATS = ("recipe", "llama.cpp")


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """``--export``, ``--format`` and ``--force``."""
    group = parser.add_argument_group(
        "export",
        "The type of every tensor as a file: a recipe for edgeq's --recipe, or the file of\n"
        "llama-quantize --imatrix M.gguf --tensor-type-file FILE IN.gguf OUT.gguf q8_0, which then\n"
        "gives the same types, but rounds without edgeq's compensation of errors.",
    )
    group.add_argument("--export", type=Path, metavar="FILE", help="write the types there")
    group.add_argument("--format", choices=_FORMATS, help="of that file: recipe (default) or llama.cpp")
    group.add_argument("--force", action="store_true", help="overwrite files that are there")


def check_export(args: argparse.Namespace) -> None:
    """Find out before any work whether `export_types` will be able to write.

    Raises:
        UsageError: a format without a file.
        OutputExistsError: the file is there.
        ConversionError: it cannot be written.
    """
    if args.export is not None:
        check_output(args.export, force=args.force)
    elif args.format is not None:
        raise UsageError("--format says how to write a file, and none is named", "Add --export FILE")


def export_types(args: argparse.Namespace, types: Mapping[str, str], preset: str | None) -> list[str]:
    """Write what ``--export`` asks for; the line that says so, if it does.

    Raises:
        UsageError: a name that the format cannot hold.
        ConversionError: it cannot be written.
    """
    from edgeq.converters.gguf.recipe import recipe_yaml, tensor_type_file

    if args.export is None:
        return []
    text = tensor_type_file(types) if args.format == "llama.cpp" else recipe_yaml(types, preset)
    write_output(args.export, text.encode("utf-8", errors="surrogateescape"), force=args.force)
    return [f"wrote {args.export}"]


def check_output(path: Path, *, force: bool) -> None:
    """Find out whether `write_output` will be able to write.

    Raises:
        OutputExistsError: something is there, and ``force`` is off or it is no file.
        ConversionError: it cannot be written.
    """
    try:
        with contextlib.suppress(FileNotFoundError):
            path.lstat()  # `lexists` takes a name that is too long for one that is not there
        if os.path.lexists(path) and not (force and path.is_file()):
            remedy = "Add --force to overwrite it" if path.is_file() else "Choose another file"
            raise OutputExistsError(f"{path} exists", remedy)
        if not path.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, "its folder is not there")
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except (OSError, ValueError) as error:
        raise _not_writable(path, error) from error


def refuse_same(*outputs: tuple[str, Path | None]) -> None:
    """Refuse that two options name one file, of which only the later one would be left.

    Args:
        outputs: each option with its file, or None where it names none.

    Raises:
        UsageError: two are the same.
    """
    taken: dict[Path, str] = {}
    for option, path in outputs:
        if path is None:
            continue
        # A link itself would be replaced, so only what leads to it is followed.
        place = Path(os.path.realpath(path.parent)) / path.name
        if place in taken:
            raise UsageError(f"{taken[place]} and {option} both name {path}", "Give each a file of its own")
        taken[place] = option


def write_output(path: Path, data: bytes, *, force: bool) -> None:
    """Write a file in one step: a reader sees the old one or the new one, never a part.

    Raises:
        OutputExistsError: something is there, and ``force`` is off.
        ConversionError: it cannot be written.
    """
    check_output(path, force=force)
    partial = path.with_name(f".{path.name[:200]}-{secrets.token_hex(4)}")
    try:
        try:
            partial.write_bytes(data)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise _not_writable(path, error) from error


def _not_writable(path: Path, error: OSError | ValueError) -> ConversionError:
    reason = error.strerror if isinstance(error, OSError) else error
    return ConversionError(f"{path} cannot be written: {reason}", "Choose another file, or free some space")
