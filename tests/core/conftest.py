"""Folders outside of pytest's own, which only its owner may enter, and a way to enter them without root's rights."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

_NOBODY = 65534


@contextlib.contextmanager
def _without_rights() -> Iterator[None]:
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(_NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def not_root() -> Callable[[], AbstractContextManager[None]]:
    """``with not_root():`` lacks root's right to read and write everything, if these tests run as root."""
    return _without_rights


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that every user may write; what is in it may have lost all its permissions by the end."""
    folder = Path(tempfile.mkdtemp(prefix="edgeq-shared-"))
    folder.chmod(0o777)
    yield folder
    folder.chmod(0o777)
    for path in folder.iterdir():
        path.chmod(0o755)
        for inner in path.iterdir():
            inner.chmod(0o755)
    shutil.rmtree(folder)
