from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
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


def _anything(_folder: Path) -> None:
    """A check that lets every folder be replaced."""


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
        publish(_finished(work), target, force=False, marker=MARKER, check=_anything)
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
            publish(_finished(work, text), target, force=force, marker=MARKER, check=_anything)
    assert (target / MARKER).read_text() == "new"
    with pytest.raises(OutputExistsError, match="--force"):
        refuse_occupied(target, force=False, marker=MARKER, check=_anything)
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_what_is_no_bundle_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "home")
    for name in ("home", "file", "link"):
        with pytest.raises(OutputExistsError, match="-o"):
            refuse_occupied(tmp_path / name, force=True, marker=MARKER, check=_anything)
    (tmp_path / "empty").mkdir()
    refuse_occupied(tmp_path / "empty", force=False, marker=MARKER, check=_anything)
    with staging_folder(tmp_path / "empty") as work:
        publish(_finished(work), tmp_path / "empty", force=False, marker=MARKER, check=_anything)
    assert (tmp_path / "empty" / MARKER).exists()


def test_two_runs_to_one_target_give_one_bundle_and_one_error(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    with staging_folder(target) as first, staging_folder(target) as second:
        publish(_finished(first, "first"), target, force=False, marker=MARKER, check=_anything)
        with pytest.raises(OutputExistsError):
            publish(_finished(second, "second"), target, force=False, marker=MARKER, check=_anything)
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


def test_force_asks_before_it_replaces(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / MARKER).write_text("old")

    def refuse(folder: Path) -> None:
        raise OutputExistsError(f"{folder} holds a thesis")

    with pytest.raises(OutputExistsError, match="thesis"):
        refuse_occupied(tmp_path / "bundle", force=True, marker=MARKER, check=refuse)
    with staging_folder(tmp_path / "bundle") as work, pytest.raises(OutputExistsError, match="thesis"):
        publish(_finished(work), tmp_path / "bundle", force=True, marker=MARKER, check=refuse)
    assert (tmp_path / "bundle" / MARKER).read_text() == "old"


@pytest.mark.parametrize("output", ["", ".", "..", "../here", "../link"])
def test_the_current_folder_is_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(OutputExistsError, match=r"-o"):
        refuse_occupied(Path(output), force=True, marker=MARKER, check=_anything)


def test_a_mount_point_is_refused_before_the_work_and_not_after() -> None:
    with pytest.raises(OutputExistsError, match="mount point"):
        refuse_occupied(Path("/proc"), force=True, marker=MARKER, check=_anything)


def test_folders_made_for_a_deep_output_go_when_nothing_was_published(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), staging_folder(tmp_path / "new" / "sub" / "deep") as work:
        assert work.parent == tmp_path / "new" / "sub"
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    with staging_folder(tmp_path / "mine" / "new" / "bundle"):
        pass
    assert [p.name for p in tmp_path.rglob("*")] == ["mine"]


def test_half_made_parents_go_too(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="too long"), staging_folder(tmp_path / "new" / ("x" * 300) / "bundle"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_parent_of_two_runs_stays_for_the_one_that_publishes(tmp_path: Path) -> None:
    target = tmp_path / "new" / "second"
    with contextlib.ExitStack() as outlives:
        with staging_folder(tmp_path / "new" / "first"):
            work = outlives.enter_context(staging_folder(target))
        publish(_finished(work), target, force=False, marker=MARKER, check=_anything)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["second"]


def test_runs_that_make_and_remove_the_same_parent_do_not_fail_each_other(tmp_path: Path) -> None:
    failures: list[BaseException] = []

    def many() -> None:
        try:
            for number in range(50):
                with staging_folder(tmp_path / "new" / str(number)):
                    pass
        except ConversionError as error:
            failures.append(error)

    threads = [threading.Thread(target=many) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_what_a_stranger_left_in_a_shared_folder_is_passed_over(
    shared: Path, not_root: Callable[[], AbstractContextManager[None]]
) -> None:
    for name, mode in (("closed", 0o000), ("open", 0o555)):
        folder = shared / f"{PREFIX}{name}"
        folder.mkdir()
        (folder / "weights").write_text("x")
        folder.chmod(mode)
    with not_root():
        with staging_folder(shared / "bundle") as work:
            publish(_finished(work), shared / "bundle", force=False, marker=MARKER, check=_anything)
        assert sweep(shared) == []
    assert (shared / "bundle" / MARKER).exists()
    assert len(_staged(shared)) == 2
