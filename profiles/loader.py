"""Find device profiles: the shipped ones, those in the user's folders, and files; follow what they extend.

A profile is YAML with the fields of `edgeq.profiles.device.DeviceProfile`. Quantities carry their unit (``8GiB``,
``102.4GB/s``, ``15W``): a bare number where bytes are meant is an error, and so is a number without a source.
``extends: NAME`` takes everything from another profile that this one does not say; mappings are merged key by key
(backends and power modes by their names), lists are replaced, and ``null`` takes a thing away.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from edgeq.errors import ProfileError
from edgeq.profiles.device import DeviceProfile
from edgeq.profiles.profile_files import Candidate, ProfileFile, candidates, is_path, read_file, shipped_files
from edgeq.profiles.schema import check_sources, check_units, check_words, profile_from, sources_of
from edgeq.registry import nearest

__all__ = ["Known", "known_profiles", "load_profile", "parse_profile", "profile_names"]

# These belong to one profile alone.
_NOT_INHERITED = ("name", "aliases", "extends", "measured", "sources")
# What a profile may say of its own and still be the machine that was measured.
_NOT_MEASURED = {"name", "aliases", "extends", "summary", "budgets", "sources"}
_LONGEST_CHAIN = 16  # of profiles that extend each other


@dataclasses.dataclass(frozen=True)
class Known:
    """A profile that can be named.

    Attributes:
        name: its own; the file's, if the file is not valid.
        origin: ``"edgeq"``, or the file.
        profile: None if the file is not valid.
        error: why it is not, or why its name does not lead to it.
    """

    name: str
    origin: str
    profile: DeviceProfile | None
    error: ProfileError | None = None


def profile_names() -> dict[str, str]:
    """Every name and alias of a profile that can be read, with the name of the profile that it means."""
    names: dict[str, str] = {}
    for file in _files():
        for name in file.names:
            names.setdefault(name, file.names[0])
    return names


def known_profiles() -> list[Known]:
    """Every profile that can be named, the shipped ones first; a user's file that is not valid is told, not raised."""
    found = candidates()
    return [_known(candidate, found[:index]) for index, candidate in enumerate(found)]


def _known(candidate: Candidate, earlier: list[Candidate]) -> Known:
    file, error = candidate.file, candidate.error
    if file is None:
        return Known(candidate.name, candidate.origin, None, error)
    try:
        profile = _resolve(file)
    except ProfileError as problem:
        return Known(file.names[0] if file.names else candidate.name, candidate.origin, None, problem)
    for other in earlier:
        shared = set() if other.file is None else set(file.names).intersection(other.file.names)
        if other.file is not None and shared:
            return Known(profile.name, candidate.origin, None, _two(min(shared), file, other.file))
    return Known(profile.name, candidate.origin, profile)


def load_profile(name: str) -> DeviceProfile:
    """The profile of that name or alias, or from that YAML file.

    Args:
        name: a name or an alias in upper or lower case, or a path that ends in ``.yaml`` or ``.yml`` or holds a slash.

    Raises:
        ProfileError: there is none, with the nearest names; two profiles share the name; or it is not valid.
    """
    return _resolve(read_file(name) if is_path(name) else _find(name, _files()))


def parse_profile(text: str, where: str) -> DeviceProfile:
    """Read a profile from YAML.

    Args:
        text: the YAML.
        where: its file, for messages, and for what it extends beside it.

    Raises:
        ProfileError: no YAML, an unknown or missing key, a quantity without its unit, numbers that contradict each
            other, a number without a source, or a loop of profiles that extend each other.
    """
    return _resolve(ProfileFile(where, text))


def _resolve(file: ProfileFile) -> DeviceProfile:
    return profile_from(_merged(file, ()), file.where)


def _merged(file: ProfileFile, below: tuple[ProfileFile, ...]) -> dict[str, Any]:
    """One file over all that it extends. Each file's numbers need its own sources, and keep them."""
    raw = file.raw
    check_words(raw, file.where)
    check_units(raw, file.where)
    check_sources(raw, file.where)
    if raw.get("extends") is None:
        return _merge({}, raw)
    parent = _parent(file)
    chain = (*below, file)
    if parent.identity in [entry.identity for entry in chain]:
        start = [entry.identity for entry in chain].index(parent.identity)
        loop = " extends ".join(entry.where for entry in (*chain[start:], parent))
        raise ProfileError(f"The profiles extend each other: {loop}", "Remove one extends")
    if len(chain) >= _LONGEST_CHAIN:
        raise ProfileError(f"{chain[0].where} extends more than {_LONGEST_CHAIN} profiles in a row", "Extend fewer")
    base = _merged(parent, chain)
    inherited = {key: value for key, value in base.items() if key not in _NOT_INHERITED}
    if _is_the_same_machine(raw) and "measured" in base:
        inherited["measured"] = base["measured"]
    elif "measured" not in raw:
        inherited["provenance"] = "datasheet"
    _refuse_idle_nulls(raw, inherited, "", file.where)
    merged = _merge(inherited, raw)
    # By value, since a source for a whole part of one file would cover values of the other.
    kept = set(_leaves(merged, "")) - set(_leaves(raw, ""))
    merged["sources"] = {path: source for path, source in sources_of(base).items() if path in kept} | sources_of(raw)
    return merged


def _is_the_same_machine(raw: Mapping[str, Any]) -> bool:
    """Whether a profile changes nothing of what it extends that a probe has measured."""
    memory = raw.get("memory", {})
    left_free = isinstance(memory, dict) and memory.keys() <= {"reserved_bytes"}
    return raw.keys() - {"memory"} <= _NOT_MEASURED and left_free


def _parent(file: ProfileFile) -> ProfileFile:
    name: str = file.raw["extends"]
    try:
        if is_path(name):
            return read_file(name, beside=file)
        # What edgeq ships stands on what edgeq ships, whatever the user's files are called.
        files = list(shipped_files()) if file.shipped else _files()
        wanted = name.lower()
        if wanted in file.names and not any(f.identity != file.identity for f in files if wanted in f.names):
            return file
        return _find(name, files, besides=file)
    except ProfileError as error:
        raise ProfileError(f"{file.where} extends {name!r}: {error.cause}", error.remedy) from error


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings key by key; whatever else is replaced, and what is null taken away."""
    merged = dict(base)
    for key, value in over.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict):
            under = merged.get(key)
            merged[key] = _merge(under if isinstance(under, dict) else {}, value)
        else:
            merged[key] = value
    return merged


def _refuse_idle_nulls(own: Mapping[str, Any], base: Mapping[str, Any], path: str, where: str) -> None:
    """Refuse to take away what is not there: a name that is misspelt would leave the thing in place."""
    for key, value in own.items():
        if value is None and key not in base and key not in _NOT_INHERITED:
            close = nearest(key, list(base))
            hint = f"Perhaps {close[0]} is meant" if close else "Remove that line"
            raise ProfileError(f"{where} takes away {path}{key}, which is not inherited", hint)
        if isinstance(value, dict):
            under = base.get(key)
            _refuse_idle_nulls(value, under if isinstance(under, dict) else {}, f"{path}{key}.", where)


def _leaves(value: Mapping[str, Any], path: str) -> list[str]:
    found = []
    for key, item in value.items():
        found += _leaves(item, f"{path}{key}.") if isinstance(item, dict) else [f"{path}{key}"]
    return found


def _files() -> list[ProfileFile]:
    return [candidate.file for candidate in candidates() if candidate.file is not None]


def _find(name: str, files: Sequence[ProfileFile], besides: ProfileFile | None = None) -> ProfileFile:
    """The one of the files whose name or alias that is; ``besides`` may have the name of what it extends."""
    wanted = name.lower()
    found = [file for file in files if wanted in file.names and (besides is None or file.identity != besides.identity)]
    if len(found) > 1:
        raise _two(wanted, found[1], found[0])
    if not found:
        known = sorted({alias for file in files for alias in file.names})
        close = nearest(name, known)
        hint = f"Choose one of {', '.join(close)}" if close else "See edgeq devices for what there is"
        raise ProfileError(f"There is no device {name!r}", f"{hint}, or give a YAML file")
    return found[0]


def _two(name: str, file: ProfileFile, earlier: ProfileFile) -> ProfileError:
    other, change = ("the one that edgeq ships", file.where) if earlier.shipped else (earlier.where, "one of them")
    return ProfileError(
        f"Two profiles are called {name!r}: {file.where} and {other}", f"Write another name or alias in {change}"
    )
