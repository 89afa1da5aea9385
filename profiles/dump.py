"""A profile as YAML that `edgeq.profiles.loader` reads back to the same record, every quantity with its unit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from edgeq.profiles.device import DeviceProfile

__all__ = ["profile_yaml"]

_NAMED = ("backends", "power_modes")
# Longest suffix first, as the units of `edgeq.profiles.schema`.
_UNITS: tuple[tuple[str, Callable[[float], str]], ...] = (
    ("_bytes_per_s", lambda value: f"{value / 1e9!r}GB/s"),
    ("_flops_per_s", lambda value: f"{value / 1e9!r}GFLOP/s"),
    ("_ops_per_s", lambda value: f"{value / 1e9!r}GOPS"),
    ("_bytes", lambda value: _bytes(int(value))),
    ("_hz", lambda value: f"{value / 1e6!r}MHz"),
    ("_ms", lambda value: f"{value!r}ms"),
    ("_w", lambda value: f"{value!r}W"),
)


def profile_yaml(profile: DeviceProfile, *, comment: str = "") -> str:
    """The profile as a YAML document.

    Args:
        profile: what to write; defaults are left out.
        comment: lines for the top of the file.
    """
    import yaml

    plain: Mapping[str, Any] = msgspec.to_builtins(profile)
    fields = {key: value for key, value in plain.items() if value not in (None, [], {})}
    for key in _NAMED:
        if key in fields:
            fields[key] = {item["name"]: {k: v for k, v in item.items() if k != "name"} for item in fields[key]}
    name = {"name": fields.pop("name")}
    sources = {"sources": fields.pop("sources")}
    text = yaml.safe_dump(
        {**name, **_with_units(fields, ""), **sources},
        sort_keys=False,
        allow_unicode=True,
        width=1 << 16,
        default_flow_style=None,
    )
    lines = "".join(f"# {line}\n" for line in comment.splitlines())
    return lines + text


def _with_units(value: Any, key: str) -> Any:  # noqa: ANN401 - plain data
    if isinstance(value, dict):
        # What was measured is for programs, in the units of its names: thousands of numbers.
        return {
            k: _without_nothing(v) if k == "measured" else _with_units(v, k)
            for k, v in value.items()
            if v is not None and v not in ([], {})
        }
    if isinstance(value, list):
        return [_with_units(item, key) for item in value]
    if isinstance(value, int | float) and not isinstance(value, bool):
        for suffix, write in _UNITS:
            if f"_{key}".endswith(suffix):
                return write(value)
    return value


def _bytes(value: int) -> str:
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value % factor == 0:
            return f"{value // factor}{unit}"
    return f"{value}B"


def _without_nothing(value: Any) -> Any:  # noqa: ANN401 - plain data
    if isinstance(value, dict):
        return {k: _without_nothing(v) for k, v in value.items() if v is not None}
    return [_without_nothing(item) for item in value] if isinstance(value, list) else value
