"""Engines between runs: whole or not at all, and never one of another key."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import threading
from pathlib import Path

import msgspec
import pytest

from edgeq.errors import BundleError, OutputExistsError, SessionError
from edgeq.runtime.tensorrt.cache import ENGINE, INFO, EngineFolder, EngineStore, describe_engine, put_engine
from edgeq.runtime.tensorrt.records import EngineCheck, EngineInfo, EngineKey

KEY = EngineKey(
    artifact_sha256="a" * 64, flavour="tensorrt", version="10.3.0.30", compute_capability="8.7", sms=8,
    power_mode="15W", l4t="36.4.3", settings="s",
)  # fmt: skip


def _write(out: Path, data: bytes = b"engine") -> EngineInfo:
    out.write_bytes(data)
    return EngineInfo(
        flavour="tensorrt", version="10.3.0.30", compute_capability="8.7", size_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(), build_ms=1.0, layers=3, precisions={"INT8": 2}, shapes=(),
        created_utc="2026-01-01T00:00:00+00:00",
    )  # fmt: skip


def _fail(out: Path) -> EngineInfo:
    out.write_bytes(b"half an eng")
    raise SessionError("no memory", "")


def test_an_engine_is_built_once(tmp_path: Path) -> None:
    store, built = EngineStore(tmp_path / "engines"), []

    def build(out: Path) -> EngineInfo:
        built.append(out)
        return _write(out)

    assert store.find(KEY) is None
    first = store.make(KEY, build)
    assert first.info.key == KEY
    assert store.make(KEY, build) == first == store.find(KEY)
    assert len(built) == 1
    store.make(KEY, build, force=True)
    assert len(built) == 2


def test_another_power_mode_is_another_engine_and_the_reason_is_told(tmp_path: Path) -> None:
    store = EngineStore(tmp_path)
    assert store.why_not(KEY) == "no engine was built of this model yet"
    store.make(KEY, _write)
    other = msgspec.structs.replace(KEY, power_mode="25W")
    assert store.find(other) is None
    assert store.why_not(other) == "the engine that is there is for power mode 15W, now 25W"
    store.make(other, _write)
    nearer = msgspec.structs.replace(other, l4t="36.5.0")
    assert store.why_not(nearer) == "the engine that is there is for Jetson Linux 36.4.3, now 36.5.0"
    assert store.find(KEY) is not None


def test_a_damaged_engine_counts_as_absent(tmp_path: Path) -> None:
    store = EngineStore(tmp_path)
    found = store.make(KEY, _write)
    found.engine.write_bytes(b"enginE")
    assert store.find(KEY) is None
    assert "was changed or damaged" in store.why_not(KEY)
    assert store.make(KEY, _write).engine.read_bytes() == b"engine"


@pytest.mark.parametrize("damage", ["{}", "", "[1]", '{"schema_version": 2}', "\xff"])
def test_a_damaged_description_counts_as_absent(tmp_path: Path, damage: str) -> None:
    store = EngineStore(tmp_path)
    found = store.make(KEY, _write)
    (found.path / INFO).write_bytes(damage.encode("latin-1"))
    assert store.find(KEY) is None
    with pytest.raises(BundleError, match=r"describes no engine|cannot be read"):
        describe_engine(found.path)
    assert store.make(KEY, _write).info == found.info


def test_a_build_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    store = EngineStore(tmp_path)
    with pytest.raises(SessionError):
        store.make(KEY, _fail)
    assert store.find(KEY) is None
    store.make(KEY, _write)
    with pytest.raises(SessionError):
        store.make(KEY, _fail, force=True)
    found = store.find(KEY)
    assert found is not None
    assert found.engine.read_bytes() == b"engine"
    assert [path.name for path in tmp_path.glob(".edgeq-staging-*")] == []


def test_two_builds_of_one_engine_wait_for_each_other(tmp_path: Path) -> None:
    store, built, inside = EngineStore(tmp_path), [], threading.Event()

    def slow(out: Path) -> EngineInfo:
        inside.set()
        built.append(1)
        return _write(out)

    first = threading.Thread(target=lambda: store.make(KEY, slow))
    first.start()
    inside.wait(10)
    store.make(KEY, slow)
    first.join()
    assert built == [1]


def _build_and_die(folder: str) -> None:
    def build(out: Path) -> EngineInfo:
        out.write_bytes(b"half")
        os._exit(9)

    EngineStore(Path(folder)).make(KEY, build)


def test_a_killed_build_leaves_no_engine_and_no_lock(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_build_and_die, args=(str(tmp_path),))
    process.start()
    process.join()
    assert process.exitcode == 9
    store = EngineStore(tmp_path)
    assert store.find(KEY) is None
    store.make(KEY, _write)
    assert [path.name for path in tmp_path.glob(".edgeq-staging-*")] == []  # swept by the later run


def test_a_folder_of_the_user_is_not_replaced(tmp_path: Path) -> None:
    place = tmp_path / "sm_87"
    put_engine(place, KEY, _write)
    (place / "notes.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match=r"notes\.txt is no part of the engine"):
        put_engine(place, KEY, _write)
    assert (place / "notes.txt").read_text() == "mine"
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine").write_text("x")
    with pytest.raises(OutputExistsError):
        put_engine(other, KEY, _write)


def test_comparisons_are_remembered_by_engine_and_gpu(tmp_path: Path) -> None:
    store = EngineStore(tmp_path / "engines")
    found = store.make(KEY, _write)
    check = EngineCheck(inputs=4, min_cosine=0.999, max_error=0.01)
    assert store.check_of(found, 8, "8.7") is None
    store.remember(found, 8, "8.7", check)
    assert store.check_of(found, 8, "8.7") == check
    assert store.check_of(found, 4, "8.7") is None
    again = store.make(KEY, lambda out: _write(out, b"another engine"), force=True)
    assert store.check_of(again, 8, "8.7") is None


def test_only_the_stores_own_engines_are_removed(tmp_path: Path) -> None:
    store = EngineStore(tmp_path / "engines")
    mine = store.make(KEY, _write)
    store.discard(mine)
    assert store.find(KEY) is None
    shipped = put_engine(tmp_path / "bundle" / "sm_87", KEY, _write)
    store.discard(EngineFolder(shipped.path, shipped.info))
    assert (shipped.path / ENGINE).is_file()
