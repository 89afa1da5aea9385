"""Files of device profiles: which there are, what they are called, and their YAML as plain data."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import stat
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from edgeq.errors import ProfileError, UsageError
from edgeq.strict_yaml import load_yaml

__all__ = ["Candidate", "ProfileFile", "candidates", "is_path", "profile_folders", "read_file", "shipped_files"]

_FOLDERS = "EDGEQ_PROFILES"
_SUFFIXES = (".yaml", ".yml")
_LARGEST_BYTES = 4 << 20  # of a profile: the probe's largest are below 1 MB
_NAME_LINE = re.compile(r"^name:[ \t]*([a-z0-9][a-z0-9._-]*)[ \t\r]*$", re.MULTILINE)
_ALIASES_LINE = re.compile(r"^aliases:[ \t]*\[([a-z0-9._, -]*)\][ \t\r]*$", re.MULTILINE)
_NAMING_LINES = re.compile(r"""^["']?(?:name|aliases)["']?[ \t]*:|^[{?]""", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class ProfileFile:
    """One YAML file by itself.

    Attributes:
        where: its path, for messages.
        text: the YAML.
        shipped: whether it is one of edgeq's own, whose ``where`` is no path.
    """

    where: str
    text: str
    shipped: bool = False

    @functools.cached_property
    def raw(self) -> Mapping[str, Any]:
        """Plain data. Raises ProfileError if it is no YAML, or no mapping."""
        try:
            raw = load_yaml(self.text, self.where)
        except UsageError as error:
            raise ProfileError(error.cause, error.remedy) from error
        if not isinstance(raw, dict):
            raise ProfileError(f"{self.where} holds no mapping", "Write keys such as name and memory")
        return raw

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """Its own name first, then its aliases. Raises ProfileError as `raw` does, where it must be read for that.

        Names in their usual form are found without reading the YAML, which takes a hundred times as long.
        """
        name, aliases = _NAME_LINE.findall(self.text), _ALIASES_LINE.findall(self.text)
        if len(name) == 1 and len(_NAMING_LINES.findall(self.text)) == 1 + len(aliases) <= 2:
            listed = [part.strip() for part in aliases[0].split(",")] if aliases else []
            return (name[0], *(part for part in listed if part))
        given = self.raw.get("aliases")
        every = [self.raw.get("name"), *(given if isinstance(given, list) else [])]
        return tuple(entry for entry in every if isinstance(entry, str) and entry)

    @functools.cached_property
    def identity(self) -> str:
        """The same for every path to one file."""
        return f"edgeq:{self.where}" if self.shipped else os.path.realpath(self.where)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A file that should hold a profile.

    Attributes:
        name: of the file.
        origin: ``"edgeq"``, or the file.
        file: None if it cannot be read.
        error: why it cannot.
    """

    name: str
    origin: str
    file: ProfileFile | None
    error: ProfileError | None = None


def profile_folders() -> list[Path]:
    """Where users keep profiles: ``$EDGEQ_PROFILES``, folders separated as in ``$PATH``, else edgeq's config folder."""
    chosen = os.environ.get(_FOLDERS)
    if chosen is not None:
        return [_expanded(part) for part in chosen.split(os.pathsep) if part]
    config = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return [_expanded(config) / "edgeq" / "profiles"]


def candidates() -> list[Candidate]:
    """Every file that should hold a profile, the shipped ones first; a folder that cannot be read is one, with why."""
    found = [Candidate(file.where, "edgeq", file) for file in shipped_files()]
    seen: set[str] = set()
    for folder in profile_folders():
        try:
            paths = sorted(folder.iterdir())
        except OSError as error:
            if _FOLDERS in os.environ or not isinstance(error, FileNotFoundError):
                found.append(Candidate(folder.name, str(folder), None, _unreadable(folder, error)))
            continue
        for path in [path for path in paths if path.name.lower().endswith(_SUFFIXES)]:
            identity = os.path.realpath(path)
            if identity not in seen:
                seen.add(identity)
                found.append(_candidate(path))
    return found


def _unreadable(folder: Path, error: OSError) -> ProfileError:
    """For the user's folder of profiles; that there is none is no error where none was named."""
    whose, remedy = "your profiles", "Make it a folder that you can read"
    if _FOLDERS in os.environ:
        whose, remedy = f"${_FOLDERS}", f"Correct ${_FOLDERS}"
    return ProfileError(f"The folder {folder} of {whose} cannot be read: {error.strerror}", remedy)


def _candidate(path: Path) -> Candidate:
    try:
        file = _read(path)
        if file.names:
            return Candidate(path.name, str(path), file)
        problem = ProfileError(f"{path} has no name", "Write name: and a name of your own")
    except ProfileError as error:
        problem = error
    return Candidate(path.name, str(path), None, problem)


@functools.cache
def shipped_files() -> tuple[ProfileFile, ...]:
    """Edgeq's own."""
    named = [item for item in resources.files("edgeq.profiles").iterdir() if item.name.endswith(_SUFFIXES)]
    named.sort(key=lambda item: [(len(part), part) if part.isdigit() else (0, part) for part in _parts(item.name)])
    return tuple(ProfileFile(f"edgeq's {i.name}", i.read_text(encoding="utf-8"), shipped=True) for i in named)


def _parts(name: str) -> list[str]:
    """``["jetson-orin-nx-", "16", "gb"]``, so that 8 comes before 16."""
    return re.findall(r"\d+|\D+", Path(name).stem)


def is_path(name: str) -> bool:
    """Whether that means a file, and not a name: it ends as YAML does, or holds a slash."""
    return name.lower().endswith(_SUFFIXES) or "/" in name or os.sep in name


def read_file(path: str, beside: ProfileFile | None = None) -> ProfileFile:
    """The file at a path.

    Args:
        path: ``~`` is the home folder.
        beside: a path that is not absolute starts where this file lies; None for the current folder.

    Raises:
        ProfileError: it cannot be read, is no regular file, is no UTF-8, or is larger than any profile.
    """
    folder = Path() if beside is None or beside.shipped else Path(beside.where).parent
    return _read(folder / _expanded(path))


def _read(path: Path) -> ProfileFile:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ProfileError(f"The profile {path} is no regular file", "Check the path")
        with path.open("rb") as file:
            data = file.read(_LARGEST_BYTES + 1)
        text = data.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        if isinstance(error, OSError):
            reason = error.strerror or str(error)
        else:
            reason = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
        raise ProfileError(f"The profile {path} cannot be read: {reason}", "Check the path") from error
    if len(data) > _LARGEST_BYTES:
        raise ProfileError(f"The profile {path} is larger than any profile", "Check the path")
    return ProfileFile(str(path), text)


def _expanded(path: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError:  # no home folder is known; what is named with it cannot be there
        return Path(path)
