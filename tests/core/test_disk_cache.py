from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeq.disk_cache import DiskCache, cache_root, fingerprint


class _Record(msgspec.Struct, frozen=True):
    name: str
    values: dict[int, float]
    data: bytes = b""


class _Other(msgspec.Struct, frozen=True):
    count: int


RECORD = _Record("x", {32: 0.5}, bytes(range(256)))


def test_the_environment_says_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEQ_CACHE", "/one")
    monkeypatch.setenv("XDG_CACHE_HOME", "/two")
    assert cache_root() == Path("/one")
    monkeypatch.setenv("EDGEQ_CACHE", "")
    assert cache_root() == Path("/two/edgeq")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/robot")
    assert cache_root() == Path("/home/robot/.cache/edgeq")
    monkeypatch.setenv("EDGEQ_CACHE", "~/results")
    assert cache_root() == Path("/home/robot/results")


def test_what_is_put_comes_back_in_another_process_too(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path / "new" / "folder")
    assert cache.get("key", _Record) is None
    cache.put("key", RECORD)
    assert DiskCache(tmp_path / "new" / "folder").get("key", _Record) == RECORD
    assert cache.get("other", _Record) is None
    cache.put("key", msgspec.structs.replace(RECORD, name="y"))
    assert cache.get("key", _Record) == msgspec.structs.replace(RECORD, name="y")
    assert [p.name for p in cache.folder.iterdir()] == ["key.bin"]


@given(st.data())
def test_whatever_happens_to_the_file_nothing_wrong_comes_back(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    cache = DiskCache(tmp_path_factory.mktemp("cache"))
    cache.put("key", RECORD)
    file = cache.folder / "key.bin"
    good = file.read_bytes()
    place = data.draw(st.integers(0, len(good) - 1))
    damage = data.draw(st.sampled_from(["flip", "cut", "grow", "insert"]))
    bad = {
        "flip": good[:place] + bytes([good[place] ^ (1 << data.draw(st.integers(0, 7)))]) + good[place + 1 :],
        "cut": good[:place],
        "grow": good + bytes(1 + place),
        "insert": good[:place] + b"\0" + good[place:],
    }[damage]
    file.write_bytes(bad)
    assert cache.get("key", _Record) is None
    cache.put("key", RECORD)
    assert cache.get("key", _Record) == RECORD


def test_a_record_of_another_kind_is_no_record(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path)
    cache.put("key", RECORD)
    assert cache.get("key", _Other) is None


def test_a_folder_that_cannot_be_written_forgets(
    shared: Path, not_root: Callable[[], AbstractContextManager[None]], tmp_path: Path
) -> None:
    (shared / "cache").mkdir(mode=0o555)
    cache = DiskCache(shared / "cache")
    with not_root():
        cache.put("key", RECORD)
        assert cache.get("key", _Record) is None
    (tmp_path / "file").write_text("in the way")
    behind = DiskCache(tmp_path / "file" / "cache")
    behind.put("key", RECORD)
    assert behind.get("key", _Record) is None


def test_a_full_disk_leaves_the_old_record_and_no_partial_one(small_disk: Callable[[int], Path]) -> None:
    cache = DiskCache(small_disk(1))
    cache.put("key", RECORD)
    cache.put("key", msgspec.structs.replace(RECORD, data=bytes(2 << 20)))
    assert cache.get("key", _Record) == RECORD
    assert [p.name for p in cache.folder.iterdir()] == ["key.bin"]


def test_readers_see_whole_records_while_others_write(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path)
    records = [_Record(str(i), {i: float(i)}, bytes([i]) * 50_000) for i in range(2)]
    cache.put("key", records[0])
    stop = threading.Event()

    def write(record: _Record) -> None:
        while not stop.is_set():
            cache.put("key", record)

    writers = [threading.Thread(target=write, args=(record,)) for record in records]
    for writer in writers:
        writer.start()
    try:
        seen = [cache.get("key", _Record) for _ in range(200)]
    finally:
        stop.set()
        for writer in writers:
            writer.join()
    assert all(record in records for record in seen)
    assert [p.name for p in tmp_path.iterdir()] == ["key.bin"]


_PARTS = st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x1f")), min_size=1)


@given(_PARTS, _PARTS)
def test_different_parts_have_different_names(a: list[str], b: list[str]) -> None:
    names = fingerprint(*a), fingerprint(*b)
    assert (names[0] == names[1]) == (a == b)
    assert len(names[0]) == 24
    assert fingerprint(Path("x"), 1, None) == fingerprint("x", "1", "None")
