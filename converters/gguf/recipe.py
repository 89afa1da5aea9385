"""Recipes: which type each tensor shall have, as a base preset and ordered overrides.

A recipe is what ``--tensor-type REGEX=TYPE`` and ``--recipe FILE.yaml`` both become::

    version: 1
    base: q4_k_m
    overrides:
      - match: ffn_down      # regular expression, searched in the tensor's name; the first match wins
        type: q6_k
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import msgspec

from edgeq.errors import UsageError
from edgeq.ggml_types import ggml_type
from edgeq.strict_yaml import load_yaml

__all__ = [
    "Override",
    "Recipe",
    "apply_overrides",
    "parse_override",
    "read_recipe",
    "recipe_yaml",
    "tensor_type_file",
]


class Override(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One rule.

    Attributes:
        match: a Python regular expression, searched anywhere in the tensor's name.
        type: the type of every tensor that it matches first.
    """

    match: str
    type: str


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A base preset and the exceptions from it; see the module's docstring."""

    version: int = 1
    base: str | None = None
    overrides: tuple[Override, ...] = ()


def parse_override(text: str) -> Override:
    """``REGEX=TYPE`` as on the command line; the last ``=`` splits.

    Raises:
        UsageError: no ``=``, an invalid regular expression, or an unknown type.
    """
    match, separator, type_name = text.rpartition("=")
    if not separator or not match:
        raise UsageError(f"{text!r} is not REGEX=TYPE", "Write something like --tensor-type ffn_down=q6_k")
    return _checked(Override(match, type_name))


def _checked(override: Override) -> Override:
    try:
        re.compile(override.match)
    except (re.error, OverflowError, RecursionError) as error:
        raise UsageError(
            f"{override.match!r} is no regular expression: {error}", "Correct it, or escape dots and brackets with \\"
        ) from error
    return Override(override.match, ggml_type(override.type).name)


def read_recipe(path: Path) -> Recipe:
    """Read a recipe.

    Raises:
        UsageError: it cannot be read, is no YAML, has an unknown key, or one of its overrides is wrong.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        if isinstance(error, UnicodeDecodeError):
            raise _no_recipe(
                path, f"byte {error.start} is 0x{error.object[error.start]:02x}, so it is not UTF-8"
            ) from None
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"The recipe {path} cannot be read: {reason}", "Check the path") from error
    if "\0" in text:
        raise _no_recipe(path, f"byte {text.encode().index(0)} is 0x00")
    try:
        recipe = msgspec.convert(load_yaml(text, f"The recipe {path}"), Recipe)
    except msgspec.ValidationError as error:
        raise UsageError(
            f"The recipe {path} is not valid: {error}", "Use the keys version, base and overrides"
        ) from error
    if recipe.version != 1:
        raise UsageError(f"The recipe {path} has version {recipe.version}", "This edgeq reads version 1")
    return msgspec.structs.replace(recipe, overrides=tuple(_checked(o) for o in recipe.overrides))


def _no_recipe(path: Path, why: str) -> UsageError:
    return UsageError(f"{path} is no recipe: {why}", "Give a YAML file with the keys version, base and overrides")


def recipe_yaml(types: Mapping[str, str], base: str | None) -> str:
    """A plan's types as a recipe: every tensor named, anchored and escaped."""
    import yaml

    overrides = [{"match": f"^{re.escape(name)}$", "type": kind} for name, kind in types.items()]
    return yaml.safe_dump({"version": 1, "base": base, "overrides": overrides}, sort_keys=False)


def tensor_type_file(types: Mapping[str, str]) -> str:
    """A plan's types as a file for ``llama-quantize --tensor-type-file``, one line for each tensor.

    llama-quantize splits the file at white space and each entry at its first ``=``, puts the part before it in lower
    case, and searches it in the tensors' names as an ECMAScript expression; the first match wins
    (``tools/quantize/quantize.cpp``, ``src/llama-quant.cpp``). So names are anchored and escaped, and a capital letter
    becomes a dot.

    Raises:
        UsageError: a name that such a file cannot hold, or that it cannot tell from another one.
    """
    lines = []
    for name, kind in types.items():
        pattern = "^" + re.sub(r"([.^$*+?()\[\]{}|\\])", r"\\\1", name) + "$"
        loose = re.sub("[A-Z]", ".", pattern)
        clash = loose != pattern and sum(bool(re.search(loose, other)) for other in types) > 1
        if clash or not name or "=" in name or any(c.isspace() for c in name):
            raise UsageError(
                f"llama-quantize's files of types cannot name the tensor {name!r}", "Export a recipe instead"
            )
        lines.append(f"{loose}={ggml_type(kind).name}\n")
    return "".join(lines)


def apply_overrides(
    base_types: Mapping[str, str],
    overrides: Sequence[Override],
    quantizable: Iterable[str],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    imatrix: bool = False,
) -> dict[str, str]:
    """Types of all tensors after the overrides.

    Args:
        base_types: what the preset gives each tensor.
        overrides: the first that matches a name decides.
        quantizable: tensors whose type llama.cpp lets anyone choose.
        shapes: in ggml's order, row length first.
        imatrix: whether there will be an importance matrix.

    Raises:
        UsageError: an override that matches nothing, a tensor whose rows its type does not divide, a tensor that
            llama.cpp keeps as it is, or a type that needs an importance matrix where there is none.
    """
    free = set(quantizable)
    types = dict(base_types)
    hits = [0] * len(overrides)
    for name in base_types:
        for index, override in enumerate(overrides):
            if re.search(override.match, name):
                hits[index] += 1
                types[name] = _legal(name, override, base_types[name], shapes[name], free=name in free, imatrix=imatrix)
                break
    _refuse_idle(overrides, hits, list(base_types))
    return types


def _legal(name: str, override: Override, base: str, shape: tuple[int, ...], *, free: bool, imatrix: bool) -> str:
    kind = ggml_type(override.type)
    if not free and kind.name != base:
        raise UsageError(
            f"{name} always stays {base} in llama.cpp, but {override.match!r} asks for {kind.name}",
            "Narrow the regular expression, for example to names that end in weight$ of attn_ or ffn_ matrices",
        )
    if kind.needs_imatrix and not imatrix:
        raise UsageError(
            f"The type {kind.name} needs an importance matrix",
            "Give one with --imatrix FILE, have one collected with --search always, or take iq3_s, q3_k or larger",
        )
    if not kind.fits(shape[0]):
        raise UsageError(
            f"{name} has rows of {shape[0]} weights, and {kind.name} needs a multiple of {kind.block_weights}",
            "Choose a type with blocks of 32, such as q4_0, iq4_nl, q5_0, q5_1 or q8_0, for this tensor",
        )
    return kind.name


def _refuse_idle(overrides: Sequence[Override], hits: Sequence[int], names: Sequence[str]) -> None:
    for override, count in zip(overrides, hits, strict=True):
        if count:
            continue
        shadowed = any(re.search(override.match, name) for name in names)
        why = (
            "every tensor that it matches is taken by an earlier override" if shadowed else "no tensor has such a name"
        )
        raise UsageError(
            f"The override {override.match!r} = {override.type} changes nothing: {why}",
            "edgeq plan lists the names by role; correct or remove it",
        )
