from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from edgeq.errors import ConversionError, DiskFullError, OutputExistsError
from edgeq.staging import PREFIX, disk_full_is_one_line, publish, refuse_occupied, staging_folder, sweep

MARKER = "edgeq.json"

_HOLDER = """
import sys, time
from pathlib import Path
from edgeq.staging import staging_folder
with staging_folder(Path(sys.argv[1])) as folder:
    (folder / "weights").write_bytes(b"x" * 1000)
    print(folder, flush=True)
    time.sleep(60)
"""


def _finished(work: Path, text: str = "new") -> Path:
    folder = work / "bundle"
    folder.mkdir()
    (folder / MARKER).write_text(text)
    return folder


def _holder(target: Path) -> subprocess.Popen[str]:
    child = subprocess.Popen([sys.executable, "-c", _HOLDER, str(target)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert PREFIX in child.stdout.readline()
    return child


def _staged(parent: Path) -> list[Path]:
    return list(parent.glob(f"{PREFIX}*"))


def test_a_published_folder_appears_whole_and_nothing_else_stays(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "bundle"
    with staging_folder(target) as work:
        assert work.parent == target.parent
        publish(_finished(work), target, force=False, marker=MARKER)
    assert (target / MARKER).read_text() == "new"
    assert [p.name for p in target.parent.iterdir()] == ["bundle"]


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), staging_folder(tmp_path / "bundle") as work:
        _finished(work)
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_the_next_run_removes_the_folder_of_a_killed_one_but_not_of_a_living_one(tmp_path: Path) -> None:
    dead, alive = _holder(tmp_path / "bundle"), _holder(tmp_path / "bundle")
    try:
        assert len(_staged(tmp_path)) == 2
        dead.send_signal(signal.SIGKILL)
        dead.communicate()
        with staging_folder(tmp_path / "other"):
            assert len(_staged(tmp_path)) == 2  # its own, and the living one's
        assert [folder.exists() for folder in _staged(tmp_path)] == [True]
        assert sweep(tmp_path) == []
    finally:
        alive.kill()
        alive.communicate()
    assert len(sweep(tmp_path)) == 1
    assert _staged(tmp_path) == []


def test_an_existing_bundle_is_refused_and_exchanged_with_force(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    for text, force in (("old", False), ("new", True)):
        with staging_folder(target) as work:
            publish(_finished(work, text), target, force=force, marker=MARKER)
    assert (target / MARKER).read_text() == "new"
    with pytest.raises(OutputExistsError, match="--force"):
        refuse_occupied(target, force=False, marker=MARKER)
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_what_is_no_bundle_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "home")
    for name in ("home", "file", "link"):
        with pytest.raises(OutputExistsError, match="-o"):
            refuse_occupied(tmp_path / name, force=True, marker=MARKER)
    (tmp_path / "empty").mkdir()
    refuse_occupied(tmp_path / "empty", force=False, marker=MARKER)
    with staging_folder(tmp_path / "empty") as work:
        publish(_finished(work), tmp_path / "empty", force=False, marker=MARKER)
    assert (tmp_path / "empty" / MARKER).exists()


def test_two_runs_to_one_target_give_one_bundle_and_one_error(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    with staging_folder(target) as first, staging_folder(target) as second:
        publish(_finished(first, "first"), target, force=False, marker=MARKER)
        with pytest.raises(OutputExistsError):
            publish(_finished(second, "second"), target, force=False, marker=MARKER)
    assert (target / MARKER).read_text() == "first"


def test_an_unwritable_parent_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConversionError, match="-o"), staging_folder(tmp_path / "file" / "bundle"):
        pass


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_or_quota_is_one_line(tmp_path: Path, code: int) -> None:
    with pytest.raises(DiskFullError, match="Free some space"), disk_full_is_one_line(tmp_path):
        raise OSError(code, os.strerror(code))
    with pytest.raises(FileNotFoundError), disk_full_is_one_line(tmp_path):
        raise FileNotFoundError
