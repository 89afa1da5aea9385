"""From a profile's YAML to its records: units, unknown keys, sources, and numbers that contradict each other."""

from __future__ import annotations

import functools
import math
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from types import UnionType
from typing import Any

import msgspec

from edgeq.errors import ProfileError, UsageError
from edgeq.profiles.contradictions import contradictions
from edgeq.profiles.device import Backend, DeviceProfile, PowerMode, nearest_source
from edgeq.registry import nearest
from edgeq.units import (
    parse_bandwidth,
    parse_bytes,
    parse_flops,
    parse_hertz,
    parse_ms,
    parse_operations,
    parse_rate,
    parse_watts,
)

__all__ = ["check_sources", "check_units", "check_words", "parse_fields", "profile_from", "sources_of"]

Raw = Mapping[str, Any]

# Keys that hold a mapping of names in YAML and a list in the records, so that a profile that extends another can change
# one number of one power mode.
_NAMED: dict[str, type[msgspec.Struct]] = {"backends": Backend, "power_modes": PowerMode}
# What a profile has beside the fields of its record.
_OWN_KEYS = ("extends",)
# Numbers that need no source of their own: they are measured, and say how.
_UNSOURCED = ("sources", "measured")
# Suffix of a key, how its quantity is read, and an example.
_Unit = tuple[str, Callable[[str], float], str]
# Longest suffix first: "_bytes_per_s" also ends like a rate, but never like "_bytes".
_UNITS: tuple[_Unit, ...] = (
    ("tokens_per_s", parse_rate, "20tok/s"),
    ("_bytes_per_s", parse_bandwidth, "102.4GB/s"),
    ("_flops_per_s", parse_flops, "60GFLOP/s"),
    ("_ops_per_s", parse_operations, "33TOPS"),
    ("_bytes", parse_bytes, "8GiB"),
    ("_hz", parse_hertz, "1020MHz"),
    ("_ms", parse_ms, "60ms"),
    ("_w", parse_watts, "15W"),
)
_ZERO = re.compile(r"\s*0+(?:\.0*)?\s*(?P<unit>[a-zµ/]*)\s*", re.IGNORECASE)
_DEEPEST = 16  # levels of mappings and lists; a profile has 6
_MOST_NAMED = 5  # paths in one message
# msgspec's messages end with the path: "Expected `int`, got `str` - at `$.cpu.cores`".
_MSGSPEC = re.compile(r"(?P<what>.*?)(?: - at `\$\.?(?P<path>[^`]*)`)?", re.DOTALL)
_PATTERN = re.compile(r" matching regex .*", re.DOTALL)
_BOUND = re.compile(r"(?P<sign>[<>]=?) (?P<limit>-?[\d.e+]+)$")
_KINDS = {
    "Expected `int": "Write a whole number",
    "Expected `float": "Write a number",
    "Expected `bool": "Write true or false",
    "Expected `array": "Write a list, such as [a, b]",
    "Expected `object": "Write its keys below it",
}
_MISSING = re.compile(r"Object missing required field `(\w+)`")


def check_words(raw: Raw, where: str) -> None:
    """Refuse a key that no profile has, with the nearest that one has.

    Args:
        raw: plain YAML data of one file.
        where: its file, for messages.

    Raises:
        ProfileError: an unknown key, or one that is no text, or something else where a mapping belongs.
    """
    for cause, remedy in _wrong_words(raw, DeviceProfile, "", 0):
        raise ProfileError(f"{where} {cause}", remedy)


@functools.cache
def _hints(record: type[msgspec.Struct]) -> dict[str, Any]:
    return typing.get_type_hints(record)


def _wrong_words(raw: Any, kind: Any, path: str, depth: int) -> Iterator[tuple[str, str]]:  # noqa: ANN401 - YAML
    if depth > _DEEPEST:
        yield "is nested too deeply", "Correct it"
        return
    kinds = typing.get_args(kind) if isinstance(kind, UnionType) else (kind,)
    if str in kinds and raw is not None and not isinstance(raw, str | list | dict):
        yield f"has {path.removesuffix('.')} that is no text", "Put it in quotes"
    record = next((k for k in kinds if isinstance(k, type) and issubclass(k, msgspec.Struct)), None)
    items = next((typing.get_args(k)[0] for k in kinds if typing.get_origin(k) is tuple), None)
    if path.removesuffix(".") in _NAMED:
        yield from _wrong_named(raw, items, path, depth)
    elif record is not None and isinstance(raw, dict):
        own = _OWN_KEYS if record is DeviceProfile else ()
        yield from _wrong_keys(raw, _hints(record), own, path, depth)
    elif isinstance(raw, list | dict):
        for key, value in raw.items() if isinstance(raw, dict) else enumerate(raw):
            yield from _wrong_words(value, items, f"{path}{key}.", depth + 1)


def _wrong_named(raw: Any, kind: Any, path: str, depth: int) -> Iterator[tuple[str, str]]:  # noqa: ANN401 - YAML
    """Of a mapping from names to records."""
    name = path.removesuffix(".")
    if raw is not None and not isinstance(raw, dict):
        yield f"has {name} that are no mapping", f"Write under {name} each name, a colon, and its keys below"
        return
    hints = {key: value for key, value in _hints(kind).items() if key != "name"}
    for key, value in (raw or {}).items():
        if not isinstance(key, str):
            yield _no_text(key, path)
        elif value is not None and not isinstance(value, dict):
            yield f"has {path}{key} that is no mapping", f"Write its keys below, such as {', '.join(list(hints)[:2])}"
        elif value is not None:
            yield from _wrong_keys(value, hints, (), f"{path}{key}.", depth + 1)


def _wrong_keys(
    raw: Mapping[Any, Any], hints: dict[str, Any], own: tuple[str, ...], path: str, depth: int
) -> Iterator[tuple[str, str]]:
    known = (*hints, *own)
    for key, value in raw.items():
        if not isinstance(key, str):
            yield _no_text(key, path)
        elif key not in known:
            close = nearest(key, list(known))
            hint = f"Perhaps {close[0]} is meant" if close else f"Known keys: {', '.join(sorted(known))}"
            yield f"has the unknown key {path}{key}", hint
        elif key in own and value is not None and not isinstance(value, str):
            yield f"has {path}{key} that is no name", "Write one name or file"
        elif key in hints:
            yield from _wrong_words(value, hints[key], f"{path}{key}.", depth + 1)


def _no_text(key: object, path: str) -> tuple[str, str]:
    return f"has the key {path}{key}, which is no text", "Put it in quotes"


def parse_fields(raw: Any, path: str = "") -> Any:  # noqa: ANN401 - YAML holds anything
    """Plain YAML data with every quantity turned into a number of its base unit.

    What stands under ``measured`` was written by the probe, in base units; there a number may stand without one.

    Raises:
        UsageError: a quantity without its unit, with another's, or negative; the message names its path.
    """
    if path == "sources":
        return raw
    if isinstance(raw, dict):
        return {key: parse_fields(item, f"{path}.{key}" if path else str(key)) for key, item in raw.items()}
    if isinstance(raw, list):
        return [parse_fields(item, f"{path}.{index}") for index, item in enumerate(raw)]
    unit = _unit(path)
    if unit is not None and raw is not None:
        return _quantity(raw, path, unit)
    if isinstance(raw, float) and not math.isfinite(raw):
        raise UsageError(f"{path} {_no_amount(raw)}", "Write a number")
    return raw


def _no_amount(raw: float) -> str:
    return "is not a number" if math.isnan(raw) else "cannot be infinite"


def _unit(path: str) -> _Unit | None:
    """Of the quantity at a path, by its key."""
    key = f"_{path.rpartition('.')[2]}"
    return next((entry for entry in _UNITS if key.endswith(entry[0])), None)


def _quantity(raw: Any, path: str, unit: _Unit) -> float:  # noqa: ANN401 - YAML holds anything
    suffix, parse, example = unit
    if isinstance(raw, str):
        try:
            return _amount(raw, parse)
        except UsageError as error:
            raise UsageError(f"{path}: {error.cause}", error.remedy) from error
    remedy = f"Write a number and a unit, such as {example}"
    if not isinstance(raw, int | float) or isinstance(raw, bool):
        raise UsageError(f"{path}: {raw!r} is no amount", remedy)
    if isinstance(raw, float) and not math.isfinite(raw):
        raise UsageError(f"{path} {_no_amount(raw)}", remedy)
    if path.startswith("measured."):
        return raw
    if raw < 0:
        raise UsageError(f"{path}: {raw!r} is not a positive amount", remedy)
    if suffix != "tokens_per_s" and raw != 0:
        raise UsageError(f"{path}: {raw!r} has no unit", remedy)
    return raw


def _amount(text: str, parse: Callable[[str], float]) -> float:
    """A quantity; nothing is nothing in every unit, and a unit beside it must be one all the same."""
    zero = _ZERO.fullmatch(text)
    if zero is None:
        return parse(text)
    if zero["unit"]:
        parse(f"1{zero['unit']}")
    return 0


def check_units(raw: Raw, where: str) -> None:
    """Refuse a quantity without its unit, or with another's, in one file; what was measured is left to `profile_from`.

    Args:
        raw: plain YAML data that `check_words` passed.
        where: its file, for messages.

    Raises:
        ProfileError: such a quantity, one that is negative, or a number that is not finite.
    """
    _parsed({key: value for key, value in raw.items() if key != "measured"}, where)


def _parsed(raw: Raw, where: str) -> dict[str, Any]:
    try:
        fields: dict[str, Any] = parse_fields({key: value for key, value in raw.items() if key not in _OWN_KEYS})
    except UsageError as error:
        raise ProfileError(f"{where}: {error.cause}", error.remedy) from error
    return fields


def check_sources(raw: Raw, where: str) -> None:
    """Refuse a number that the file gives without saying where it comes from.

    A source is for the path that it names and for all below it.

    Args:
        raw: plain YAML data of one file, before it is merged with what it extends.
        where: its file, for messages.

    Raises:
        ProfileError: numbers without a source, or a source for something that is not there.
    """
    sources = raw.get("sources", {})
    texts = [text for entry in sources.items() for text in entry] if isinstance(sources, dict) else [None]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise ProfileError(
            f"{where} has sources that are no texts", "Write under sources each path, a colon, and where it comes from"
        )
    paths = list(_paths(raw, ""))
    idle = [source for source in sources if source not in paths]
    if idle:
        close = nearest(idle[0], paths)
        hint = f"Perhaps {close[0]} is meant" if close else "Remove it; what is inherited keeps its own source"
        raise ProfileError(f"{where} has a source for {idle[0]}, which it does not hold", hint)
    missing = [path for path in _numbers(raw) if nearest_source(path, sources) is None]
    if missing:
        more = len(missing) - _MOST_NAMED
        rest = f" and {more} more" if more > 0 else ""
        raise ProfileError(
            f"{where} has no source for {', '.join(missing[:_MOST_NAMED])}{rest}",
            "Write under sources where each comes from, such as: a data sheet's title, a measurement, an allowance",
        )


def sources_of(raw: Raw) -> dict[str, str]:
    """Where each value of one file comes from that is no mapping: the nearest source at it or above it.

    Args:
        raw: plain YAML data of one file that `check_sources` passed.
    """
    sources = raw.get("sources", {})
    found = {path: nearest_source(path, sources) for path, value in _values(raw, "") if value is not None}
    return {path: source for path, source in found.items() if source is not None}


def _values(value: Any, path: str) -> Iterator[tuple[str, Any]]:  # noqa: ANN401 - YAML holds anything
    """Dotted path and value of everything that is no mapping."""
    for key, item in value.items():
        inner = f"{path}.{key}" if path else str(key)
        if inner in _UNSOURCED:
            continue
        if isinstance(item, dict):
            yield from _values(item, inner)
        else:
            yield inner, item


def _paths(value: Any, path: str) -> Iterator[str]:  # noqa: ANN401 - YAML holds anything
    """Dotted paths of everything that a source can be for."""
    if path in _UNSOURCED:
        return
    if path:
        yield path
    for key, item in value.items() if isinstance(value, dict) else ():
        yield from _paths(item, f"{path}.{key}" if path else str(key))


def _numbers(raw: Raw) -> Iterator[str]:
    """Dotted paths of all quantities: numbers, texts under keys that carry a unit, and lists that hold such."""
    for path, value in _values(raw, ""):
        if value is not None and (_unit(path) is not None or _holds_number(value)):
            yield path


def _holds_number(value: Any) -> bool:  # noqa: ANN401 - YAML holds anything
    if isinstance(value, list | dict):
        return any(_holds_number(item) for item in (value.values() if isinstance(value, dict) else value))
    return isinstance(value, int | float) and not isinstance(value, bool)


def profile_from(raw: Raw, where: str) -> DeviceProfile:
    """A profile from plain YAML data that is merged with all that it extends.

    Args:
        raw: plain YAML data whose files `check_words` and `check_sources` passed.
        where: its file, for messages.

    Raises:
        ProfileError: a missing key, a value of the wrong kind, or numbers that contradict each other.
    """
    fields = _parsed(raw, where)
    for key, kind in _NAMED.items():
        # Each by itself first, so that a message has its name and not its number.
        items = [{"name": name, **item} for name, item in fields.get(key, {}).items()]
        for item in items:
            _convert(item, kind, where, f"{key}.{item['name']}")
        fields[key] = items
    profile = _convert(fields, DeviceProfile, where, "")
    for cause, remedy in contradictions(profile):
        raise ProfileError(f"{where}: {cause}", remedy)
    return profile


T = typing.TypeVar("T")


def _convert(fields: Any, kind: type[T], where: str, prefix: str) -> T:  # noqa: ANN401 - YAML holds anything
    try:
        return msgspec.convert(fields, kind)
    except msgspec.ValidationError as error:
        match = _MSGSPEC.fullmatch(str(error))
        what, inner = (str(error), "") if match is None else (match["what"], match["path"] or "")
    path = ".".join(part for part in (prefix, inner) if part)
    missing = _MISSING.fullmatch(what)
    if missing is not None:
        lacking = f"{path}.{missing[1]}" if path else missing[1]
        raise ProfileError(f"{where} lacks {lacking}", "Add it")
    reason = _PATTERN.sub(" of another form", what[:1].lower() + what[1:])
    raise ProfileError(f"{where} has no valid {path or 'mapping'}: {reason}", _remedy(path, what))


def _remedy(path: str, what: str) -> str:
    key = path.rpartition(".")[2]
    if path == "name" or path.startswith("aliases"):
        return "Use up to 64 lower-case letters, digits, dots, dashes and underscores"
    if re.match("Expected `str[^,]*, got `(?:int|float|date)", what):
        return "Put it in quotes"
    if key == "compute_capability":
        return 'Write it in quotes, such as "8.7" for sm_87'
    if key.endswith("_efficiency"):
        return "Write a share above 0 and up to 1, such as 0.5 for 50 %"
    choices = typing.get_args(_hints(DeviceProfile).get(path))
    if choices and all(isinstance(choice, str) for choice in choices):
        return f"Choose one of {', '.join(choices)}"
    return _bound(what) or next((remedy for start, remedy in _KINDS.items() if what.startswith(start)), "Correct it")


def _bound(what: str) -> str | None:
    """What to do about a number beyond the bound that msgspec names."""
    match = _BOUND.search(what)
    if match is None:
        return None
    limit = f"{float(match['limit']):g}"
    return {
        ">": f"Write a number above {limit}",
        "<": f"Write a number below {limit}",
        ">=": f"Write {limit} or more",
        "<=": f"Write {limit} or less",
    }[match["sign"]]
