"""Quantities as people write them: ``400MiB``, ``60ms``, ``102.4GB/s``. A bare number is refused, never guessed."""

from __future__ import annotations

import math
import re

from edgeq.errors import UsageError

__all__ = [
    "format_bytes",
    "format_ms",
    "format_quantity",
    "parse_bandwidth",
    "parse_bytes",
    "parse_flops",
    "parse_hertz",
    "parse_ms",
    "parse_operations",
    "parse_rate",
    "parse_watts",
]

_BYTES = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_MS = {"us": 1e-3, "µs": 1e-3, "ms": 1.0, "s": 1e3, "min": 6e4}
_NUMBER_UNIT = re.compile(r"\s*([+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:e[+-]?\d+)?)\s*([a-zµ/]*)\s*", re.IGNORECASE)


# In bytes, milliseconds or operations a second: beyond all machines, and exact in every integer and float that follows.
_LARGEST = 10**18
# Letters may be large or small, but where that makes another unit: "Mb" is a megabit, and "MW" a megawatt.
_BITS = re.compile(r"[KMGT][iI]?b(?=/|$)")
_MEGAWATTS = re.compile(r"M[wW]")
_PREFIXES = {"k": "kilo", "m": "mega", "g": "giga", "t": "tera", "ki": "kibi", "mi": "mebi", "gi": "gibi", "ti": "tebi"}


def _refuse_other(text: str, written: str, units: dict[str, float] | dict[str, int]) -> None:
    """Refuse a unit that has its own meaning as it is written, and is one of ``units`` in other letters."""
    if _BITS.match(written) is not None and written.lower() in units:
        prefix, rest = written.partition("b")[0], written.partition("b")[2]
        means, instead = f"{_PREFIXES[prefix.lower()]}bits", f"{prefix[0].upper()}{prefix[1:].lower()}B{rest}"
    elif _MEGAWATTS.fullmatch(written) is not None and "mw" in units:
        means, instead = "megawatts", "W or mW"
    else:
        return
    raise UsageError(f"{text!r}: {written!r} means {means}", f"If that is not meant, write {instead}")


def _parse(text: str, units: dict[str, float] | dict[str, int], what: str, example: str) -> float:
    match = _NUMBER_UNIT.fullmatch(text)
    choices = ", ".join(units)
    if match is None:
        raise UsageError(f"{text!r} is not {what}", f"Write a number and a unit, such as {example}")
    number, unit = float(match[1]), match[2].lower()
    if not unit:
        raise UsageError(f"{text!r} has no unit, so it could mean anything", f"Write a unit, such as {example}")
    if unit not in units:
        raise UsageError(f"{text!r} has the unit {match[2]!r}, which is not one of {choices}", f"Write {example}")
    _refuse_other(text, match[2], units)
    value = number * units[unit]
    if not math.isfinite(value) or value <= 0:
        raise UsageError(f"{text!r} is not a positive amount", f"Write something like {example}")
    if value > _LARGEST:
        raise UsageError(f"{text!r} is more than any machine has", f"Write something like {example}")
    return value


def parse_bytes(text: str) -> int:
    """``"400MiB"`` to 419430400; decimal (MB) and binary (MiB) units in any case but that of bits (Mb); whole bytes.

    Raises:
        UsageError: no number, no unit, an unknown unit or one of bits, or not positive.
    """
    return max(1, round(_parse(text, _BYTES, "an amount of memory", "400MiB")))


def parse_ms(text: str) -> float:
    """``"60ms"`` or ``"0.5s"`` to milliseconds. Raises UsageError as `parse_bytes` does."""
    return _parse(text, _MS, "a duration", "60ms")


def parse_rate(text: str) -> float:
    """``"20"``, ``"20tok/s"`` or ``"20/s"`` to tokens a second; the one quantity that needs no unit."""
    units = {"": 1.0, "/s": 1.0, "tok/s": 1.0, "t/s": 1.0, "tps": 1.0, "tokens/s": 1.0}
    bare = text.strip()
    return _parse(bare + "/s" if re.fullmatch(r"[\d.eE+-]+", bare) else bare, units, "a rate", "20tok/s")


def parse_bandwidth(text: str) -> float:
    """``"102.4GB/s"`` to bytes a second. Raises UsageError as `parse_bytes` does."""
    units = {f"{unit}/s": float(factor) for unit, factor in _BYTES.items()}
    return _parse(text, units, "a bandwidth", "102.4GB/s")


def parse_flops(text: str) -> float:
    """``"60GFLOP/s"`` to floating-point operations a second. Raises UsageError as `parse_bytes` does."""
    return _parse(text, {"gflop/s": 1e9, "tflop/s": 1e12}, "a compute rate", "60GFLOP/s")


def parse_operations(text: str) -> float:
    """``"33TOPS"`` to operations a second. Raises UsageError as `parse_bytes` does."""
    return _parse(text, {"gops": 1e9, "tops": 1e12}, "a compute rate", "33TOPS")


def parse_hertz(text: str) -> float:
    """``"1020MHz"`` to hertz. Raises UsageError as `parse_bytes` does."""
    return _parse(text, {"khz": 1e3, "mhz": 1e6, "ghz": 1e9}, "a frequency", "1020MHz")


def parse_watts(text: str) -> float:
    """``"15W"`` to watts; ``"15MW"`` is refused. Raises UsageError as `parse_bytes` does."""
    return _parse(text, {"mw": 1e-3, "w": 1.0}, "a power", "15W")


def format_bytes(value: float) -> str:
    """Binary units with three significant digits: ``98.9 MiB``."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(value) >= factor:
            scaled = value / factor
            digits = 0 if abs(scaled) >= 1000 else 1 if abs(scaled) >= 100 else 2 if abs(scaled) < 10 else 1
            return f"{scaled:.{digits}f} {unit}"
    return f"{value:.0f} B"


def format_ms(value: float) -> str:
    """Milliseconds with the digits that matter: ``8.31 ms``, ``412 ms``, ``12.4 s``, ``0.0001 ms``."""
    if value >= 10_000:
        return f"{value / 1000:.1f} s"
    if value >= 100:
        return f"{value:.0f} ms"
    if 0 < value < 0.1:
        return f"{value:.2g} ms"
    return f"{value:.2f} ms" if value < 10 else f"{value:.1f} ms"


def format_quantity(value: float, unit: str) -> str:
    """A value in one of edgeq's base units (``bytes``, ``ms``, ``tok/s``, ``W``) for people."""
    if unit == "bytes":
        return format_bytes(value)
    if unit == "ms":
        return format_ms(value)
    return f"{value:.2g} {unit}" if 0 < value < 1 else f"{value:.1f} {unit}"
