from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgeq.bundle import MANIFEST, REPORTS, hash_file, open_bundle
from edgeq.errors import BundleError


@pytest.fixture
def bundle(tmp_path: Path, make_bundle: Callable[[Path], Path]) -> Path:
    (tmp_path / "weights").write_bytes(b"weights" * 1000)
    return make_bundle(tmp_path / "weights")


def _edit(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads((bundle / MANIFEST).read_text())
    change(manifest)
    (bundle / MANIFEST).write_text(json.dumps(manifest))


def test_a_good_bundle_opens_and_verifies(bundle: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    opened = open_bundle(bundle, verify=True, progress=lambda *args: seen.append(args))
    assert opened.file("model").read_bytes() == b"weights" * 1000
    assert seen[-1][0] == seen[-1][1] == 7000
    assert opened.manifest_sha256 == hash_file(bundle / MANIFEST)
    with pytest.raises(BundleError, match="role 'engine'"):
        opened.file("engine")


def test_a_flipped_byte_is_found(bundle: Path) -> None:
    data = bytearray((bundle / "model.gguf").read_bytes())
    data[3500] ^= 1
    (bundle / "model.gguf").write_bytes(data)
    open_bundle(bundle)
    with pytest.raises(BundleError, match="was changed"):
        open_bundle(bundle, verify=True)


def test_a_truncated_or_missing_file_is_found_without_hashing(bundle: Path) -> None:
    (bundle / "model.gguf").write_bytes(b"weights")
    with pytest.raises(BundleError, match="7 bytes, its manifest says 7000"):
        open_bundle(bundle)
    (bundle / "model.gguf").unlink()
    with pytest.raises(BundleError, match="is missing"):
        open_bundle(bundle)


def test_reports_are_welcome_and_strangers_are_not(bundle: Path) -> None:
    (bundle / REPORTS).mkdir()
    (bundle / REPORTS / "report.json").write_text("{}")
    open_bundle(bundle, verify=True)
    (bundle / "payload.so").write_bytes(b"x")
    with pytest.raises(BundleError, match="not named in the manifest"):
        open_bundle(bundle, verify=True)


@pytest.mark.parametrize(
    "path", ["../secret", "/etc/passwd", "a/../../secret", "", "..", "model.gguf\\..\\x", "link", "linked/secret"]
)
def test_paths_that_leave_the_bundle_are_refused(bundle: Path, path: str) -> None:
    outside = bundle.parent / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"weights" * 1000)
    (bundle.parent / "secret").write_bytes(b"weights" * 1000)
    (bundle / "link").symlink_to(outside / "secret")
    (bundle / "linked").symlink_to(outside)
    _edit(bundle, lambda manifest: manifest["files"][0].update(path=path))
    with pytest.raises(BundleError, match="leaves the bundle"):
        open_bundle(bundle)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(schema_version=99), "schema version 99"),
        (lambda m: m.update(surprise=1), "surprise"),
        (lambda m: m.pop("files"), "files"),
        (lambda m: m["plan"].update(context_tokens="many"), r"plan.context_tokens"),
    ],
)
def test_a_manifest_that_is_not_ours_is_refused(
    bundle: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    _edit(bundle, change)
    with pytest.raises(BundleError, match=message):
        open_bundle(bundle)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[]"])
def test_a_manifest_that_is_no_json_is_refused(bundle: Path, data: bytes) -> None:
    (bundle / MANIFEST).write_bytes(data)
    with pytest.raises(BundleError, match=MANIFEST):
        open_bundle(bundle)


def test_folders_that_are_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is no folder"):
        open_bundle(tmp_path / "nowhere")
    with pytest.raises(BundleError, match="is no bundle"):
        open_bundle(tmp_path)
