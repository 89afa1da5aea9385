"""Reading small files of the system: absence, refusal and odd contents give nothing, and the reason is kept."""

from __future__ import annotations

import os
import platform
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeq import system_files
from edgeq.system_files import NOT_THERE, PERMISSION_DENIED, SystemFiles, cpu_list, fields_of


def test_text_and_number(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/model").write_bytes(b"Board\xff 1\0\n")
    (tmp_path / "a/khz").write_text("1510400\n")
    (tmp_path / "a/empty").write_text("\n")
    files = SystemFiles(tmp_path)
    assert files.text("/a/model") == "Board\N{REPLACEMENT CHARACTER} 1"
    assert files.number("/a/khz") == 1510400
    assert files.text("/a/empty") is None
    assert files.why_unread("/a/empty") == "empty"
    assert files.why_unread("/a/khz") is None


@pytest.mark.parametrize("text", ["n/a", "nan", "inf", "1e999", "12 MHz", "--5"])
def test_number_of_another_form_is_refused_with_its_text(tmp_path: Path, text: str) -> None:
    (tmp_path / "x").write_text(text)
    files = SystemFiles(tmp_path)
    assert files.number("/x") is None
    assert files.why_unread("/x") == f"unknown format: {text!r}"


def test_reason_why_a_file_gave_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("1")
    files = SystemFiles(tmp_path)
    for path, why in [("/none", NOT_THERE), ("/file/below", NOT_THERE), ("/folder", "is a directory")]:
        assert files.text(path) is None
        assert files.why_unread(path) == why
    assert files.names("/none") == []
    assert files.why_unread("/none") == NOT_THERE
    assert (files.exists("/file"), files.exists("/none")) == (True, False)
    (tmp_path / "none").write_text("now")
    assert files.text("/none") == "now"
    assert files.why_unread("/none") is None


def test_permission_denied_by_the_kernel_is_kept_as_the_reason() -> None:
    # pytest's folders are closed to others, so that this one lies beside them.
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        root.chmod(0o755)
        (root / "secret").write_text("1")
        (root / "secret").chmod(0)
        (root / "closed").mkdir(mode=0)
        files = SystemFiles(root)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            assert files.number("/secret") is None
            assert files.text("/closed/rate") is None
            assert files.names("/closed") == []
            assert not files.exists("/closed/rate")
        finally:
            os.seteuid(user)
        for path in ("/secret", "/closed", "/closed/rate"):
            assert files.why_unread(path) == PERMISSION_DENIED


def test_names_are_in_natural_order(tmp_path: Path) -> None:
    for name in ("policy10", "policy2", "policy0", "boost"):
        (tmp_path / name).mkdir()
    assert SystemFiles(tmp_path).names("/", "policy*") == ["policy0", "policy2", "policy10"]


def test_file_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system_files, "_MAX_BYTES", 1 << 20)
    (tmp_path / "x").write_bytes(b"x" * ((1 << 20) + 1))
    files = SystemFiles(tmp_path)
    assert files.text("/x") is None
    assert files.why_unread("/x") == "unknown format: larger than 1 MiB"


def test_files_of_this_kernel() -> None:
    files = SystemFiles()
    # /proc/sys answers ENOMEM to reads of megabytes.
    assert files.text("/proc/sys/kernel/osrelease") == platform.release()
    assert files.fields("/proc/self/status")["Pid"] == str(os.getpid())


@pytest.mark.parametrize(
    ("text", "cpus"),
    [
        ("0-3,5", (0, 1, 2, 3, 5)),
        ("0 1 2", (0, 1, 2)),
        ("7", (7,)),
        ("", ()),
        (None, ()),
        ("0-", ()),
        ("a", ()),
        ("3-1", ()),
    ],
)
def test_cpu_list(text: str | None, cpus: tuple[int, ...]) -> None:
    assert cpu_list(text) == cpus


@given(st.text())
def test_any_text_is_read_or_refused(text: str) -> None:
    assert all(0 <= cpu <= 8192 for cpu in cpu_list(text))
    assert all("\n" not in key for key in fields_of(text))


def test_of_repeated_fields_the_first_counts() -> None:
    assert fields_of("a: 1\nb:2\n: 3\nno\na: 4") == {"a": "1", "b": "2", "": "3"}


@given(st.lists(st.text(alphabet="0123456789a²", min_size=1, max_size=30), max_size=5))
def test_natural_order_is_total(names: list[str]) -> None:
    ordered = sorted(names, key=system_files._natural)
    assert sorted(ordered) == sorted(names)
