"""Small files of /proc, /sys and /etc below a root, read without raising; why a file gave nothing is remembered.

The root lets a machine of another kind be laid out in a folder. Nothing here knows what the files mean.
"""

from __future__ import annotations

import errno
import fnmatch
import math
import re
from pathlib import Path

__all__ = ["NOT_THERE", "PERMISSION_DENIED", "UNKNOWN_FORMAT", "SystemFiles", "cpu_list", "fields_of"]

ROOT = Path("/")
NOT_THERE = "not there"
PERMISSION_DENIED = "permission denied"
UNKNOWN_FORMAT = "unknown format"
_MAX_BYTES = 64 << 20
_CHUNK_BYTES = 64 << 10
_MAX_CPUS = 8192  # the most that Linux is built for on x86-64
_NATURAL = re.compile(r"([0-9]+)")


class SystemFiles:
    """Reads files below ``root`` by the absolute paths they have on the machine itself.

    A file that cannot be read gives None or nothing; `why_unread` then says ``"not there"``, ``"permission denied"``,
    ``"unknown format: …"`` or what else the kernel answered.
    """

    def __init__(self, root: Path = ROOT) -> None:
        self.root = root
        self._unread: dict[str, str] = {}

    def why_unread(self, path: str) -> str | None:
        """Why the last reading of ``path`` gave nothing; None if it gave something or was never tried."""
        return self._unread.get(path)

    def refuse(self, path: str, text: str) -> None:
        """Note that ``path`` was read but not understood."""
        self._unread[path] = f"{UNKNOWN_FORMAT}: {text[:60]!r}"

    def text(self, path: str) -> str | None:
        """Contents without the NULs, spaces and line ends around them; None if there are none."""
        try:
            data = _read_bytes(self._place(path))
        except OSError as error:
            self._unread[path] = _reason(error)
            return None
        if len(data) > _MAX_BYTES:
            self._unread[path] = f"{UNKNOWN_FORMAT}: larger than {_MAX_BYTES >> 20} MiB"
            return None
        text = data.decode("utf-8", errors="replace").strip("\0\n ")
        if not text:
            self._unread[path] = "empty"
            return None
        self._unread.pop(path, None)
        return text

    def number(self, path: str) -> float | None:
        """A file that holds one finite number."""
        text = self.text(path)
        if text is None:
            return None
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if math.isfinite(value):
            return value
        self.refuse(path, text)
        return None

    def fields(self, path: str) -> dict[str, str]:
        """A file of ``key: value`` lines; see `fields_of`."""
        return fields_of(self.text(path))

    def names(self, folder: str, pattern: str = "*") -> list[str]:
        """Names in a folder that match, in natural order (``policy2`` before ``policy10``)."""
        try:
            found = [entry.name for entry in self._place(folder).iterdir()]
        except OSError as error:
            self._unread[folder] = _reason(error)
            return []
        self._unread.pop(folder, None)
        return sorted(fnmatch.filter(found, pattern), key=_natural)

    def exists(self, path: str) -> bool:
        """Whether there is such a file or folder, as far as this process may see."""
        try:
            self._place(path).stat()
        except OSError as error:
            self._unread[path] = _reason(error)
            return False
        return True

    def _place(self, path: str) -> Path:
        return self.root / path.lstrip("/")


def fields_of(text: str | None) -> dict[str, str]:
    """``key: value`` lines; of a repeated key the first."""
    found: dict[str, str] = {}
    for line in (text or "").splitlines():
        key, separator, value = line.partition(":")
        if separator:
            found.setdefault(key.strip(), value.strip())
    return found


def cpu_list(text: str | None) -> tuple[int, ...]:
    """``"0-3,5"`` or ``"0 1 2"`` to CPU numbers, ascending; empty for a text of another form."""
    found: set[int] = set()
    for part in re.split(r"[,\s]+", (text or "").strip()):
        match = re.fullmatch(r"([0-9]{1,5})(?:-([0-9]{1,5}))?", part)
        if match is None:
            return ()
        first, last = int(match[1]), int(match[2] or match[1])
        found.update(range(first, min(last, _MAX_CPUS) + 1))
    return tuple(sorted(found))


def _read_bytes(path: Path) -> bytes:
    data = bytearray()
    with path.open("rb") as file:
        # /proc/sys refuses one read of megabytes with ENOMEM, whatever the file holds.
        while len(data) <= _MAX_BYTES and (chunk := file.read(_CHUNK_BYTES)):
            data += chunk
    return bytes(data)


def _reason(error: OSError) -> str:
    if error.errno in (errno.EACCES, errno.EPERM):
        return PERMISSION_DENIED
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return NOT_THERE
    return (error.strerror or str(error)).lower()


def _natural(name: str) -> list[tuple[int, str]]:
    # Digits are every second part; zeros before them do not count, then the longer number is the larger one.
    parts = enumerate(_NATURAL.split(name))
    return [(len(part.lstrip("0")), part.lstrip("0")) if i % 2 else (0, part) for i, part in parts]
