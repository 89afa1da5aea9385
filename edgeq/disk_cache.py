"""Results that took minutes, kept between runs: small records in files, each with a hash of its own contents.

An entry that is damaged counts as absent and is made again. Nothing that is wrong if it is missing belongs here.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from pathlib import Path
from typing import TypeVar

import msgspec

__all__ = ["DiskCache", "cache_root", "fingerprint"]

T = TypeVar("T")

_HASH_BYTES = 32


def cache_root() -> Path:
    """``$EDGEQ_CACHE``, or ``edgeq`` in the user's cache folder (``$XDG_CACHE_HOME``, ``~/.cache``)."""
    if own := os.environ.get("EDGEQ_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "edgeq"


def fingerprint(*parts: object) -> str:
    """A short name for everything that a result depends on: 24 hexadecimal digits of a SHA-256."""
    text = "\x1f".join(str(part) for part in parts)
    return hashlib.sha256(text.encode("utf-8", errors="surrogateescape")).hexdigest()[:24]


class DiskCache:
    """Records by key in one folder. Several processes may use it at once.

    Args:
        folder: made when something is put; a folder that cannot be written makes a cache that forgets.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, key: str, kind: type[T]) -> T | None:
        """What was put under that key, or None if there is nothing, or nothing that can be trusted."""
        try:
            data = self._path(key).read_bytes()
        except OSError:
            return None
        body = data[_HASH_BYTES:]
        if hashlib.sha256(body).digest() != data[:_HASH_BYTES]:
            return None
        try:
            return msgspec.msgpack.decode(body, type=kind)
        except msgspec.MsgspecError:
            return None

    def put(self, key: str, record: object) -> None:
        """Keep a record; readers see the old one or the new one, never a part. A full or read-only disk is ignored."""
        body = msgspec.msgpack.encode(record)
        path = self._path(key)
        partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(hashlib.sha256(body).digest() + body)
            partial.replace(path)
        except OSError:  # it is a cache: without it the work is only done again
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.bin"
