"""Engines between runs: each in a folder of its own, ``model.engine`` with ``engine.json`` beside it.

A folder appears, or is exchanged for a newer one, by one rename: readers see an engine with its own description or
none. What does not fit its description counts as absent and is built again, with the reason told.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec

from edgeq.bundle import Bundle, hash_file
from edgeq.disk_cache import DiskCache, cache_root, fingerprint
from edgeq.errors import BundleError, ConversionError, OutputExistsError
from edgeq.runtime.tensorrt.engine_key import differences, key_name
from edgeq.runtime.tensorrt.records import EngineCheck, EngineInfo, EngineKey
from edgeq.staging import publish, staging_folder
from edgeq.types import from_json, to_json

__all__ = [
    "ENGINE",
    "INFO",
    "INFO_ROLE",
    "EngineFolder",
    "EngineStore",
    "describe_engine",
    "put_engine",
    "shipped_engines",
]

ENGINE = "model.engine"
INFO = "engine.json"
INFO_ROLE = "engine-info"
ENGINE_ROLE = "engine"
_MOST_INFO_BYTES = 1 << 20

Build = Callable[[Path], EngineInfo]


@dataclasses.dataclass(frozen=True)
class EngineFolder:
    """An engine that is there.

    Attributes:
        path: its folder.
        info: what is known of it.
    """

    path: Path
    info: EngineInfo

    @property
    def engine(self) -> Path:
        """The file."""
        return self.path / ENGINE


def describe_engine(folder: Path) -> EngineInfo:
    """The description in an engine's folder; the engine is compared with it.

    Raises:
        BundleError: there is none, or the engine is not the one that it describes.
    """
    path = folder / INFO
    remedy = "Build the engine again"
    try:
        if path.stat().st_size > _MOST_INFO_BYTES:
            raise BundleError(f"{path} is larger than any description of an engine", remedy)
        info = from_json(path.read_bytes(), EngineInfo)
        size = (folder / ENGINE).stat().st_size
    except OSError as error:
        raise BundleError(f"{error.filename or path} cannot be read: {error.strerror}", remedy) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"{path} describes no engine: {error}", remedy) from error
    if size != info.size_bytes or hash_file(folder / ENGINE) != info.sha256:
        raise BundleError(f"{folder / ENGINE} was changed or damaged since it was built", remedy)
    return info


def shipped_engines(bundle: Bundle) -> tuple[EngineFolder, ...]:
    """The engines that a bundle brings, by its files of the role ``"engine-info"``.

    Raises:
        BundleError: one of them was changed.
    """
    folders = [(bundle.path / entry.path).parent for entry in bundle.manifest.files if entry.role == INFO_ROLE]
    return tuple(EngineFolder(folder, describe_engine(folder)) for folder in folders)


class EngineStore:
    """A folder of engines, by key. Several processes may use it at once.

    Args:
        folder: made when an engine is put; the user's cache by default.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = cache_root() / "engines" if folder is None else folder
        self._checks = DiskCache(self.folder / "checks")

    def place(self, key: EngineKey) -> Path:
        """The folder of an engine with that key."""
        return self.folder / f"{key.artifact_sha256[:12]}-{key_name(key)}"

    def timing_cache(self, key: EngineKey) -> Path:
        """The file with times of kernels, which all models share on one GPU with one library."""
        parts = (key.flavour, key.version, f"sm{key.compute_capability}", key.sms, key.power_mode, key.l4t)
        name = "-".join(str(part).replace(os.sep, "_") for part in parts if part is not None)
        return self.folder / f"{name}.timing"

    def runtime_cache(self, found: EngineFolder, sms: int | None, capability: str) -> Path:
        """Where TensorRT-RTX keeps the kernels that it compiled for an engine on a GPU."""
        return self.folder / f"{found.info.sha256[:24]}-sm{capability}-{sms}.kernels"

    def find(self, key: EngineKey) -> EngineFolder | None:
        """The engine with exactly that key, whole; None if there is none."""
        place = self.place(key)
        try:
            info = describe_engine(place)
        except BundleError:
            return None
        return EngineFolder(place, info) if info.key == key else None

    def why_not(self, key: EngineKey, others: Sequence[EngineFolder] = ()) -> str:
        """Why there is no engine with that key: it was damaged, none was built, or how the nearest differs.

        Args:
            key: that is wanted.
            others: engines from elsewhere, such as a bundle's own.
        """
        place = self.place(key)
        if place.is_dir():
            try:
                describe_engine(place)
            except BundleError as error:
                return error.cause
        known = [other.info.key for other in others] + self._keys(key.artifact_sha256[:12])
        told = sorted((differences(other, key) for other in known if other is not None), key=len)
        if not told:
            return "no engine was built of this model yet"
        return f"the engine that is there is for {'; '.join(told[0])}"

    def _keys(self, prefix: str) -> list[EngineKey | None]:
        keys: list[EngineKey | None] = []
        for path in sorted(self.folder.glob(f"{prefix}-*/{INFO}")):
            with contextlib.suppress(OSError, msgspec.DecodeError, UnicodeDecodeError):
                keys.append(from_json(path.read_bytes(), EngineInfo).key)
        return keys

    def check_of(self, found: EngineFolder, sms: int | None, capability: str) -> EngineCheck | None:
        """How an engine compared with its graph on such a GPU; None if it was not compared there."""
        return self._checks.get(_check_key(found, sms, capability), EngineCheck)

    def remember(self, found: EngineFolder, sms: int | None, capability: str, check: EngineCheck) -> None:
        """Keep the result of a comparison that went well."""
        self._checks.put(_check_key(found, sms, capability), check)

    def discard(self, found: EngineFolder) -> None:
        """Remove an engine that is wrong; one from elsewhere is left alone."""
        if found.path.parent == self.folder:
            shutil.rmtree(found.path, ignore_errors=True)

    def make(self, key: EngineKey, build: Build, *, force: bool = False) -> EngineFolder:
        """The engine with that key, built if it is not there; one that another process builds is waited for.

        Args:
            key: of the engine.
            build: writes the engine to the path that it is given, and describes it.
            force: build it again.

        Raises:
            ConversionError: the folder cannot be written.
            EdgeqError: what building raises; the old engine is then still there.
        """
        place = self.place(key)
        with self._building(place):
            found = None if force else self.find(key)
            return found if found is not None else put_engine(place, key, build)

    @contextlib.contextmanager
    def _building(self, place: Path) -> Iterator[None]:
        """Let one process at a time build what belongs there."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(place.with_name(f".{place.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise ConversionError(
                f"{self.folder} cannot be written: {error.strerror}",
                "Set EDGEQ_CACHE to a folder that can be, or name one with -o",
            ) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)


def put_engine(place: Path, key: EngineKey, build: Build) -> EngineFolder:
    """Build an engine and make its folder appear in one step, over an older one if there is one.

    Raises:
        ConversionError: the folder cannot be written, or holds something else.
        EdgeqError: what building raises; what was there is then still there.
    """
    with staging_folder(place) as work:
        folder = work / "engine"
        folder.mkdir()
        info = msgspec.structs.replace(build(folder / ENGINE), key=key)
        (folder / INFO).write_bytes(to_json(info))
        publish(folder, place, force=True, marker=INFO, check=_refuse_strangers)
    return EngineFolder(place, info)


def _refuse_strangers(folder: Path) -> None:
    """Refuse to replace a folder that holds more than an engine."""
    strangers = sorted(path.name for path in folder.iterdir() if path.name not in {ENGINE, INFO})
    if strangers:
        raise OutputExistsError(
            f"{folder / strangers[0]} is no part of the engine there, and building would delete it",
            "Choose another folder with -o, or move it away yourself",
        )


def _check_key(found: EngineFolder, sms: int | None, capability: str) -> str:
    return fingerprint(found.info.sha256, capability, sms)
