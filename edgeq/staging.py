"""Work in a temporary folder beside the target, publish by one rename, clean up after killed runs.

A staging folder is locked by ``flock`` for as long as its process lives, so a later run can tell the folder of a killed
run (unlocked) from that of a running one. Creating and sweeping happen under a lock of the parent folder, so that no
sweep sees a folder between its creation and its locking.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from edgeq.errors import ConversionError, DiskFullError, OutputExistsError

__all__ = ["PREFIX", "disk_full_is_one_line", "publish", "refuse_occupied", "staging_folder", "sweep"]

PREFIX = ".edgeq-staging-"
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_ATTEMPTS = 9

Check = Callable[[Path], None]


@contextlib.contextmanager
def _locked(folder: Path, *, wait: bool) -> Iterator[bool]:
    """Hold an exclusive lock on a folder; yields False if another process has it and ``wait`` is off."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(handle)


def sweep(parent: Path) -> list[Path]:
    """Remove the staging folders in ``parent`` whose process is gone; returns what was removed.

    What may not be opened or removed is passed over: in a shared folder it is some other user's.
    """
    removed = []
    for folder in sorted(parent.glob(f"{PREFIX}*")):
        with contextlib.suppress(OSError):
            if folder.is_symlink() or not folder.is_dir():
                continue
            with _locked(folder, wait=False) as ours:
                if ours:
                    shutil.rmtree(folder)
                    removed.append(folder)
    return removed


@contextlib.contextmanager
def staging_folder(target: Path) -> Iterator[Path]:
    """A locked temporary folder on the same file system as ``target``, removed at the end whatever happens.

    Missing parents of ``target`` are made, and removed again if nothing was published into them.

    Raises:
        ConversionError: the parent folder cannot be made or written.
    """
    parent = target.absolute().parent
    made: list[Path] = []
    try:
        try:
            folder, handle = _enter(parent, made)
        except OSError as error:
            raise _as_error(error, parent) from error
        try:
            with disk_full_is_one_line(parent):
                yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(handle)
    finally:
        for empty in reversed(made):
            # Not empty: a bundle was published there, or another run works there.
            with contextlib.suppress(OSError):
                empty.rmdir()


def _enter(parent: Path, made: list[Path]) -> tuple[Path, int]:
    """Make a staging folder; another run may remove the parent that it made before ours is in it."""
    for _ in range(_ATTEMPTS):
        with contextlib.suppress(FileNotFoundError):
            _make_parents(parent, made)
            return _make_staging(parent)
    _make_parents(parent, made)
    return _make_staging(parent)


def _make_parents(parent: Path, made: list[Path]) -> None:
    """Make what is missing of ``parent`` and add it to ``made``, outermost first."""
    missing = []
    while not parent.exists():
        missing.append(parent)
        parent = parent.parent
    for folder in reversed(missing):
        with contextlib.suppress(FileExistsError):  # made by another run meanwhile; a file is an error one step later
            folder.mkdir()
            made.append(folder)


def _make_staging(parent: Path) -> tuple[Path, int]:
    """A new staging folder and the open handle that holds its lock."""
    with _locked(parent, wait=True):
        sweep(parent)
        folder = parent / f"{PREFIX}{os.getpid()}-{secrets.token_hex(4)}"
        folder.mkdir(mode=0o755)
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(handle, fcntl.LOCK_EX)
    return folder, handle


def _as_error(error: OSError, path: Path) -> ConversionError:
    if error.errno in _DISK_FULL:
        return _disk_full(path)
    return ConversionError(f"{path} cannot be written: {error.strerror}", "Choose another folder with -o")


def _disk_full(parent: Path) -> DiskFullError:
    try:
        free = f"{shutil.disk_usage(parent).free / 2**20:.0f} MiB free"
    except OSError:
        free = "free space unknown"
    return DiskFullError(
        f"No space left on the disk of {parent} ({free})", "Free some space or choose another disk with -o"
    )


@contextlib.contextmanager
def disk_full_is_one_line(parent: Path) -> Iterator[None]:
    """Turn ENOSPC and EDQUOT from anywhere inside into a `DiskFullError`."""
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise _disk_full(parent) from error
        raise


def refuse_occupied(target: Path, *, force: bool, marker: str, check: Check) -> None:
    """Refuse a target that holds something, before any work is done.

    Args:
        target: where a bundle will be published.
        force: replace an existing bundle; never anything else.
        marker: the file that makes a folder a bundle.
        check: raises an `EdgeqError` if the folder of a bundle holds more than may be deleted with it.

    Raises:
        OutputExistsError: it holds a bundle and ``force`` is off, or something that is no bundle; or it is a folder
            that cannot be replaced: the current one, one above it, or a mount point.
        ConversionError: the system refuses the path.
    """
    try:
        _refuse_occupied(target, force=force, marker=marker, check=check)
    except OSError as error:
        raise _as_error(error, target) from error


def _refuse_occupied(target: Path, *, force: bool, marker: str, check: Check) -> None:
    if not os.path.lexists(target):
        return
    # A bundle is published by replacing the folder itself, which would leave its shell in a deleted one.
    if Path(os.path.realpath(".")).is_relative_to(os.path.realpath(target)):
        raise OutputExistsError(
            f"{target.absolute()} is the current folder, or one that holds it", "Name a folder in it with -o"
        )
    if target.is_symlink() or not target.is_dir():
        raise OutputExistsError(f"{target} exists and is no folder", "Choose another output with -o")
    if target.is_mount():
        raise OutputExistsError(f"{target} is a mount point and cannot be replaced", "Name a folder in it with -o")
    if (target / marker).is_file():
        if not force:
            raise OutputExistsError(f"{target} already holds a bundle", "Add --force to replace it")
        check(target)
        return
    if any(target.iterdir()):
        raise OutputExistsError(f"{target} holds files that are no bundle", "Choose another output with -o")


def publish(finished: Path, target: Path, *, force: bool, marker: str, check: Check) -> None:
    """Make ``finished`` appear as ``target`` in one step; an old bundle is exchanged, then removed with its reports.

    Raises:
        OutputExistsError: as `refuse_occupied`, judged again at this moment.
        ConversionError: the system refuses the rename.
    """
    target = target.absolute()
    _sync_tree(finished)
    refuse_occupied(target, force=force, marker=marker, check=check)
    try:
        if target.exists() and any(target.iterdir()):
            _exchange(finished, target)
        else:
            finished.rename(target)
        _sync(target.parent)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise OutputExistsError(
                f"{target} was filled by another run meanwhile", "Run again or choose another output with -o"
            ) from error
        raise _as_error(error, target.parent) from error


def _exchange(new: Path, old: Path) -> None:
    """Swap two folders: atomically with renameat2, else by two renames."""
    libc = ctypes.CDLL(None, use_errno=True)
    renameat2 = getattr(libc, "renameat2", None)
    if renameat2 is not None:
        done = renameat2(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _RENAME_EXCHANGE)
        if done == 0:
            return
        if ctypes.get_errno() not in (errno.EINVAL, errno.ENOSYS):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(old))
    aside = new.with_name(f"{new.name}-replaced")
    old.rename(aside)
    new.rename(old)


def _sync_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
