"""Bundles: a folder with ``edgeq.json``, the hashed files that it names, and ``reports/`` beside them.

The manifest is the only contract between converters and runtime. It is untrusted input: its paths must stay inside the
folder, and nothing in it is believed before it was compared with the files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

import msgspec

from edgeq.errors import BundleError, OutputExistsError
from edgeq.tensor_types import TensorManifest
from edgeq.types import BundleFile, Manifest, from_json, to_json

__all__ = [
    "MANIFEST",
    "REPORTS",
    "SCHEMA_VERSION",
    "Bundle",
    "describe_file",
    "hash_file",
    "open_bundle",
    "refuse_strangers",
    "write_manifest",
]

MANIFEST = "edgeq.json"
REPORTS = "reports"
SCHEMA_VERSION = 1
_CHUNK = 1 << 20
_MAX_MANIFEST_BYTES = 64 << 20

Progress = Callable[[int, int, str], None]


@dataclasses.dataclass(frozen=True)
class Bundle:
    """An opened bundle.

    Attributes:
        path: its folder.
        manifest: what it says.
    """

    path: Path
    manifest: Manifest | TensorManifest

    @property
    def llm(self) -> Manifest:
        """The manifest of a language model.

        Raises:
            BundleError: it is another kind of bundle.
        """
        if isinstance(self.manifest, Manifest):
            return self.manifest
        raise BundleError(
            f"{self.path} holds no language model, but one that is called with arrays",
            'Run it with edgeq.load(bundle).run({"input": array})',
        )

    @property
    def tensor(self) -> TensorManifest:
        """The manifest of a model that is called with arrays.

        Raises:
            BundleError: it is another kind of bundle.
        """
        if isinstance(self.manifest, TensorManifest):
            return self.manifest
        raise BundleError(f"{self.path} holds a language model", "Run it with: edgeq run BUNDLE")

    def file(self, role: str) -> Path:
        """The one file of that role.

        Raises:
            BundleError: the bundle has none.
        """
        for entry in self.manifest.files:
            if entry.role == role:
                return self.path / entry.path
        raise BundleError(f"{self.path} has no file with the role {role!r}", "Convert the model again")

    @property
    def all_files(self) -> tuple[BundleFile, ...]:
        """Everything that the manifest names, for other devices too."""
        return _files_of(self.manifest)

    def made_for(self, device: str) -> Bundle:
        """The bundle as if it held the graph for that device alone, one of `TensorManifest.devices`.

        Raises:
            BundleError: it has none, or is another kind of bundle.
        """
        manifest = self.tensor
        if device not in manifest.devices:
            raise BundleError(
                f"{self.path} was not made for {device!r}", f"Choose one of {', '.join(manifest.devices)}"
            )
        return dataclasses.replace(self, manifest=manifest.made_for(device))

    @property
    def reports(self) -> Path:
        """Where reports go; not part of the hashed set, and perhaps not there yet."""
        return self.path / REPORTS

    @property
    def manifest_sha256(self) -> str:
        """Hash of ``edgeq.json``: the identity of a bundle, since it holds the hash of every file."""
        return hash_file(self.path / MANIFEST)


def _files_of(manifest: Manifest | TensorManifest) -> tuple[BundleFile, ...]:
    return manifest.files if isinstance(manifest, Manifest) else manifest.all_files


def hash_file(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file as hexadecimal text; ``progress`` is told the bytes of each piece.

    Raises:
        BundleError: it cannot be read.
    """
    digest = hashlib.sha256()
    for piece in _pieces(path):
        digest.update(piece)
        if progress is not None:
            progress(len(piece))
    return digest.hexdigest()


def _pieces(path: Path) -> Iterator[memoryview]:
    """A file piece by piece, in one buffer; as a generator, so that no error of its caller is taken for the file's."""
    buffer = bytearray(_CHUNK)
    view = memoryview(buffer)
    with _readable(path), path.open("rb", buffering=0) as file:
        while n_read := file.readinto(buffer):
            yield view[:n_read]


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn every refusal of the system inside into a `BundleError`."""
    try:
        yield
    except OSError as error:
        raise BundleError(
            f"{error.filename or path} cannot be read: {error.strerror}", "Check the path and its permissions"
        ) from error


def describe_file(folder: Path, relative: str, role: str) -> BundleFile:
    """The manifest's entry for a file that is already in the folder."""
    path = folder / relative
    return BundleFile(path=relative, role=role, size_bytes=path.stat().st_size, sha256=hash_file(path))


def write_manifest(folder: Path, manifest: Manifest | TensorManifest) -> None:
    """Write ``edgeq.json``; the last step before publishing."""
    (folder / MANIFEST).write_bytes(to_json(manifest))


def open_bundle(path: str | Path, *, verify: bool = False, progress: Progress | None = None) -> Bundle:
    """Read a bundle's manifest and check its files.

    Args:
        path: the bundle's folder.
        verify: also hash every file and look for files that the manifest does not name; otherwise only that each file
            is there with its size. Empty folders count as nothing.
        progress: called with bytes done, bytes in all, and the file's name while hashing.

    Raises:
        BundleError: no bundle, an unreadable or newer manifest, a path that leaves the folder, a missing file, or
            contents that differ from the manifest.
    """
    folder = Path(path)
    with _readable(folder):
        manifest = _read_manifest(folder)
        for entry in _files_of(manifest):
            _check_entry(folder, entry)
    if verify:
        _check_hashes(folder, manifest, progress)
        _check_strangers(folder, manifest)
    return Bundle(folder, manifest)


def refuse_strangers(folder: Path) -> None:
    """Refuse the folder of a bundle that may not be deleted: one that holds more than the bundle and its reports.

    Raises:
        OutputExistsError: it holds some other file, or cannot be judged since it or its manifest cannot be read.
    """
    remedy = "Choose another output with -o, or move it away yourself"
    try:
        with _readable(folder):
            stranger = next(_strangers(folder, _read_manifest(folder)), None)
    except BundleError as error:
        raise OutputExistsError(f"What --force would delete cannot be told: {error.cause}", remedy) from error
    if stranger is not None:
        raise OutputExistsError(f"{stranger} is no part of the bundle there, and --force would delete it", remedy)


class _Head(msgspec.Struct):
    schema_version: Annotated[int, msgspec.Meta(ge=1)]
    kind: Literal["llm", "tensor"] = "llm"


def _read_manifest(folder: Path) -> Manifest | TensorManifest:
    path = folder / MANIFEST
    if not folder.is_dir():
        raise BundleError(f"{folder} is no folder", "Give the folder that edgeq convert wrote")
    if not path.is_file():
        raise BundleError(f"{folder} is no bundle: it has no {MANIFEST}", "Give the folder that edgeq convert wrote")
    try:
        if path.stat().st_size > _MAX_MANIFEST_BYTES:
            raise BundleError(f"{path} is larger than any manifest", "Convert the model again")
        data = path.read_bytes()
        head = from_json(data, _Head)
        if head.schema_version > SCHEMA_VERSION:
            raise BundleError(
                f"{path} has schema version {head.schema_version}; this edgeq reads up to {SCHEMA_VERSION}",
                "Update it with: pip install --upgrade edgeq",
            )
        return from_json(data, Manifest) if head.kind == "llm" else from_json(data, TensorManifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"{path} is no valid manifest: {error}", "Convert the model again") from error


def _check_entry(folder: Path, entry: BundleFile) -> None:
    relative = PurePosixPath(entry.path)
    inside = (
        entry.path
        and not relative.is_absolute()
        and ".." not in relative.parts
        and "\\" not in entry.path
        and "\0" not in entry.path
    )
    path = folder / entry.path
    # realpath, since Path.resolve raises RuntimeError for a loop of links before Python 3.13.
    if not inside or not _real(path).is_relative_to(_real(folder)) or path.is_symlink():
        raise BundleError(
            f"The manifest of {folder} names {entry.path!r}, which leaves the bundle",
            "Do not use this bundle; get it again from where it was made",
        )
    if not path.is_file():
        raise BundleError(f"{path} is missing", "Copy the bundle again, or convert the model again")
    size = path.stat().st_size
    if size != entry.size_bytes:
        raise BundleError(
            f"{path} has {size} bytes, its manifest says {entry.size_bytes}",
            "Copy the bundle again, or convert the model again",
        )


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _check_hashes(folder: Path, manifest: Manifest | TensorManifest, progress: Progress | None) -> None:
    total, done = sum(entry.size_bytes for entry in _files_of(manifest)), 0
    for entry in _files_of(manifest):

        def advance(n_bytes: int, name: str = entry.path) -> None:
            nonlocal done
            done += n_bytes
            if progress is not None:
                progress(done, total, name)

        found = hash_file(folder / entry.path, advance)
        if found != entry.sha256:
            raise BundleError(
                f"{folder / entry.path} was changed: its SHA-256 is {found[:12]}…, the manifest says "
                f"{entry.sha256[:12]}…",
                "Copy the bundle again, or convert the model again",
            )


def _check_strangers(folder: Path, manifest: Manifest | TensorManifest) -> None:
    with _readable(folder):
        for path in _strangers(folder, manifest):
            raise BundleError(f"{path} is not named in the manifest", "Remove it, or convert the model again")


def _strangers(folder: Path, manifest: Manifest | TensorManifest) -> Iterator[Path]:
    """Files and links that are neither in the manifest nor reports; a folder that cannot be searched is an OSError."""
    known = {entry.path for entry in _files_of(manifest)} | {MANIFEST}
    for where, folders, files in os.walk(folder, onerror=_raise):
        here = Path(where)
        if here == folder and REPORTS in folders:
            folders.remove(REPORTS)
        links = [name for name in folders if (here / name).is_symlink()]
        for name in sorted([*files, *links]):
            if (here / name).relative_to(folder).as_posix() not in known:
                yield here / name


def _raise(error: OSError) -> None:
    raise error
