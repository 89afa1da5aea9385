"""Find, read and check device profiles.

A profile is YAML with the fields of `edgeq.types.DeviceProfile`. Quantities carry their unit (``8GiB``, ``102.4GB/s``,
``15W``): a bare number where bytes are meant is an error, and so is a number without a source.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec

from edgeq.errors import EdgeqError, ProfileError, UsageError
from edgeq.registry import nearest
from edgeq.strict_yaml import load_yaml
from edgeq.types import DeviceProfile
from edgeq.units import parse_bandwidth, parse_bytes, parse_flops, parse_ms, parse_watts

__all__ = ["load_profile", "parse_profile", "profile_names"]

_ARCHITECTURES = ("x86_64", "aarch64", "any")
_ACCELERATOR = re.compile(r"cpu|cuda:sm_\d{2,3}")
_MAX_THREADS = 512  # GGML_MAX_N_THREADS

# Longest suffix first: "_bytes_per_s" also ends like a rate, but never like "_bytes".
_UNITS: tuple[tuple[str, Callable[[str], float]], ...] = (
    ("_bytes_per_s", parse_bandwidth),
    ("_flops_per_s", parse_flops),
    ("_bytes", parse_bytes),
    ("_ms", parse_ms),
    ("_w", parse_watts),
)


@functools.cache
def _builtin() -> Mapping[str, DeviceProfile]:
    """The shipped profiles by name."""
    profiles: dict[str, DeviceProfile] = {}
    for item in sorted(resources.files("edgeq.profiles").iterdir(), key=lambda i: i.name):
        if item.name.endswith(".yaml"):
            profile = parse_profile(item.read_text(encoding="utf-8"), item.name)
            profiles[profile.name] = profile
    return profiles


def profile_names() -> dict[str, str]:
    """Every name and alias that `load_profile` knows, with the profile that it means."""
    names = {name: name for name in _builtin()}
    for profile in _builtin().values():
        for alias in profile.aliases:
            if alias in names:
                raise ProfileError(f"The name {alias!r} belongs to two profiles", "Report this as a bug of edgeq")
            names[alias] = profile.name
    return names


def load_profile(name: str) -> DeviceProfile:
    """The profile of that name or alias, or from that YAML file.

    Raises:
        ProfileError: there is none, with the nearest names; or it is not valid.
    """
    if name.endswith((".yaml", ".yml")) or "/" in name:
        try:
            return parse_profile(Path(name).read_text(encoding="utf-8"), name)
        except (OSError, UnicodeDecodeError) as error:
            raise ProfileError(f"The profile {name} cannot be read: {error}", "Check the path") from error
    known = profile_names()
    if name not in known:
        close = nearest(name, list(known)) or sorted(known)
        raise ProfileError(f"There is no device {name!r}", f"Choose one of {', '.join(close)}, or give a YAML file")
    return _builtin()[known[name]]


def parse_profile(text: str, where: str) -> DeviceProfile:
    """Read a profile from YAML.

    Args:
        text: the YAML.
        where: its file, for messages.

    Raises:
        ProfileError: no YAML, an unknown or missing key, a quantity without its unit, numbers that contradict each
            other, or a number without a source.
    """
    try:
        raw = load_yaml(text, where)
    except UsageError as error:
        raise ProfileError(error.cause, error.remedy) from error
    if not isinstance(raw, dict):
        raise ProfileError(f"{where} holds no mapping", "Write keys such as name and memory")
    try:
        profile = msgspec.convert(_with_units(raw, ""), DeviceProfile)
    except msgspec.ValidationError as error:
        raise ProfileError(f"{where} is no valid profile: {error}", "Correct that key") from error
    except EdgeqError as error:
        raise ProfileError(f"{where} is no valid profile: {error.cause}", error.remedy) from error
    _check(profile, raw, where)
    return profile


def _with_units(value: Any, path: str) -> Any:  # noqa: ANN401 - YAML holds anything
    """Plain YAML data with every quantity turned into a number of its base unit."""
    if isinstance(value, dict):
        return {key: _with_units(item, f"{path}.{key}" if path else str(key)) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_units(item, f"{path}.{index}") for index, item in enumerate(value)]
    for suffix, parse in _UNITS:
        if path.endswith(suffix) and value is not None and not path.startswith("sources."):
            if not isinstance(value, str):
                raise UsageError(f"{path} is {value!r} without a unit", "Write the unit, such as 8GiB, 68GB/s or 15W")
            return parse(value) if value != "0" else 0
    return value


def _check(profile: DeviceProfile, raw: Mapping[str, Any], where: str) -> None:
    if profile.arch not in _ARCHITECTURES:
        raise ProfileError(f"{where} has the arch {profile.arch!r}", f"Use one of {', '.join(_ARCHITECTURES)}")
    if not _ACCELERATOR.fullmatch(profile.accelerator):
        raise ProfileError(
            f"{where} has the accelerator {profile.accelerator!r}", "Use cpu, or cuda:sm_87 and its like"
        )
    if not profile.backends:
        raise ProfileError(f"{where} names no backend", "Add one under backends")
    _check_range(profile, where)
    memory = profile.memory
    if memory.reserved_bytes >= memory.total_bytes:
        raise ProfileError(f"{where} reserves all of the device's memory", "Correct memory.reserved_bytes")
    limit = profile.budget.peak_memory_bytes
    if limit is not None and limit > memory.usable_bytes:
        raise ProfileError(f"The budget of {where} is larger than its usable memory", "Lower peak_memory_bytes")
    missing = [path for path in _numbers(raw, "") if path not in profile.sources]
    if missing:
        raise ProfileError(f"{where} has no source for {', '.join(missing)}", "Name each under sources")


def _check_range(profile: DeviceProfile, where: str) -> None:
    """Every number is finite and above zero; what is reserved or overhead may be zero, shares end at 1."""
    numbers: dict[str, float | None] = {
        "threads": profile.threads,
        **{f"memory.{name}": value for name, value in msgspec.structs.asdict(profile.memory).items()},
        **{f"budget.{name}": value for name, value in msgspec.structs.asdict(profile.budget).items()},
    }
    for index, backend in enumerate(profile.backends):
        numbers |= {
            f"backends.{index}.{name}": v for name, v in msgspec.structs.asdict(backend).items() if name != "name"
        }
    for path, value in numbers.items():
        if value is None or isinstance(value, bool):
            continue
        may_be_zero = path.endswith(("reserved_bytes", "overhead_ms", "overhead_bytes"))
        highest = 1 if path.endswith("efficiency") else _MAX_THREADS if path == "threads" else math.inf
        if not (value >= 0 if may_be_zero else value > 0) or value > highest or math.isinf(value):
            raise ProfileError(f"{path} in {where} is {value:g}, which cannot be", "Correct it")


def _numbers(value: Any, path: str) -> list[str]:  # noqa: ANN401 - YAML holds anything
    """Dotted paths of all quantities: numbers, and strings under keys that carry a unit."""
    if path == "sources":
        return []
    if isinstance(value, dict):
        return [p for key, item in value.items() for p in _numbers(item, f"{path}.{key}" if path else str(key))]
    if isinstance(value, list):
        return [p for index, item in enumerate(value) for p in _numbers(item, f"{path}.{index}")]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return [path] if is_number or path.endswith(tuple(suffix for suffix, _ in _UNITS)) else []
