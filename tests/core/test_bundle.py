from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from edgeq.bundle import (
    MANIFEST,
    REPORTS,
    describe_file,
    hash_file,
    open_bundle,
    refuse_strangers,
    write_manifest,
)
from edgeq.errors import BundleError, OutputExistsError
from edgeq.tensor_types import (
    AxisRange,
    TensorArtifact,
    TensorManifest,
    TensorPlan,
    TensorPrediction,
    TensorSpec,
)
from edgeq.types import Budget, ModelSource, Target

NotRoot = Callable[[], AbstractContextManager[None]]


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
        (lambda m: m.update(schema_version=0), "schema_version"),
        (lambda m: m.update(schema_version=-1), "schema_version"),
        (lambda m: m.pop("schema_version"), "schema_version"),
        (lambda m: m.update(surprise=1), "surprise"),
        (lambda m: m.pop("files"), "files"),
        (lambda m: m["plan"].update(context_tokens="many"), r"plan.context_tokens"),
        (lambda m: m["plan"].update(context_tokens=2**40), r"plan.context_tokens"),
        (lambda m: m["plan"].update(ubatch_tokens=-1), r"plan.ubatch_tokens"),
        (lambda m: m["plan"].update(threads=0), r"plan.threads"),
        (lambda m: m["plan"].update(threads=100_000), r"plan.threads"),
        (lambda m: m["plan"].update(gpu_layers=-2), r"plan.gpu_layers"),
        (lambda m: m["plan"]["predicted"].update(file_bytes=10**400), r"predicted.file_bytes"),
        (lambda m: m["files"].append(m["files"][0]), "twice"),
        (lambda m: m["files"].append({**m["files"][0], "path": "./model.gguf"}), "twice"),
        (lambda m: m["files"][0].update(sha256="\x1b[2Jok"), "sha256"),
    ],
)
def test_a_manifest_that_is_not_ours_is_refused(
    bundle: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    _edit(bundle, change)
    with pytest.raises(BundleError, match=message):
        open_bundle(bundle)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b'{"a":' * 100_000,
        b"[" * 100_000,
        b'{"schema_version":1,"name":"\xff"}',
        b'{"schema_version":' + b"9" * 5000 + b"}",
    ],
)
def test_a_manifest_that_is_no_json_is_refused(bundle: Path, data: bytes) -> None:
    (bundle / MANIFEST).write_bytes(data)
    with pytest.raises(BundleError, match=MANIFEST):
        open_bundle(bundle)


def test_folders_that_are_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is no folder"):
        open_bundle(tmp_path / "nowhere")
    with pytest.raises(BundleError, match="is no bundle"):
        open_bundle(tmp_path)


def test_paths_that_the_system_refuses(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="too long"):
        open_bundle(tmp_path / ("x" * 5000))
    _edit(bundle, lambda manifest: manifest["files"][0].update(path="x" * 5000))
    with pytest.raises(BundleError, match="too long"):
        open_bundle(bundle)
    (bundle / "loop").symlink_to(bundle / "loop")
    _edit(bundle, lambda manifest: manifest["files"][0].update(path="loop/model.gguf"))
    with pytest.raises(BundleError, match=r"missing|cannot be read"):
        open_bundle(bundle)


@pytest.fixture
def public_bundle(bundle: Path, shared: Path) -> Path:
    return shutil.copytree(bundle, shared / "bundle")


@pytest.mark.parametrize(("locked", "verify"), [("..", False), (".", False), (MANIFEST, False), ("model.gguf", True)])
def test_what_may_not_be_read_is_one_line(public_bundle: Path, not_root: NotRoot, locked: str, verify: bool) -> None:
    (public_bundle / locked).chmod(0)
    with not_root(), pytest.raises(BundleError, match="Permission denied"):
        open_bundle(public_bundle, verify=verify)


def test_a_folder_that_may_not_be_searched_is_not_called_clean(public_bundle: Path, not_root: NotRoot) -> None:
    (public_bundle / "hidden").mkdir(mode=0)
    with not_root(), pytest.raises(BundleError, match="Permission denied"):
        open_bundle(public_bundle, verify=True)
    with not_root(), pytest.raises(OutputExistsError, match="Permission denied"):
        refuse_strangers(public_bundle)


def test_an_error_of_the_listener_is_not_taken_for_one_of_the_bundle(bundle: Path) -> None:
    def listener(done: int, total: int, name: str) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        open_bundle(bundle, verify=True, progress=listener)


def test_only_a_bundle_and_its_reports_may_be_replaced(bundle: Path) -> None:
    (bundle / REPORTS).mkdir()
    (bundle / REPORTS / "report.json").write_text("{}")
    refuse_strangers(bundle)
    (bundle / "model.gguf").unlink()
    refuse_strangers(bundle)  # a broken bundle is what one wants to replace
    (bundle / ".git").mkdir()
    (bundle / ".git" / "HEAD").write_text("x")
    with pytest.raises(OutputExistsError, match=r"\.git/HEAD .*--force would delete it"):
        refuse_strangers(bundle)
    shutil.rmtree(bundle / ".git")
    (bundle / "data").symlink_to(bundle.parent)
    with pytest.raises(OutputExistsError, match="data"):
        refuse_strangers(bundle)


def test_a_folder_whose_manifest_is_not_ours_may_not_be_replaced(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text("{}")
    with pytest.raises(OutputExistsError, match="schema_version"):
        refuse_strangers(tmp_path)


def _tensor_manifest(folder: Path) -> TensorManifest:
    (folder / "model.onnx").write_bytes(b"graph")
    return TensorManifest(
        name="camera",
        source=ModelSource(id="m", path="m", format="onnx", architecture="onnx", n_params=3, dtype="f32"),
        artifact=TensorArtifact(
            architecture="onnx",
            task="tensor",
            opset=20,
            inputs=(TensorSpec(name="images", dtype="float32", shape=("batch", 3, 8, 8)),),
            outputs=(TensorSpec(name="y", dtype="float32", shape=("batch", 2)),),
        ),
        plan=TensorPlan(
            backend="onnxruntime-cpu",
            scheme="int8-static",
            activations="u8",
            axes={"batch": AxisRange(least=1, usual=1, most=4)},
            predicted=TensorPrediction(
                file_bytes=5, weights_bytes=5, activation_bytes=0, runtime_bytes=1, peak_memory_bytes=6
            ),
        ),
        files=(describe_file(folder, "model.onnx", "model"),),
        budget=Budget(latency_ms=33.0),
        built_for="laptop-cpu",
        target=Target(arch="x86_64", accelerator="cpu"),
        tools={},
        created_utc="2026-11-22T00:00:00+00:00",
    )


def test_a_bundle_says_which_kind_it_is(bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "camera"
    folder.mkdir()
    manifest = _tensor_manifest(folder)
    write_manifest(folder, manifest)
    opened = open_bundle(folder, verify=True)
    assert opened.tensor == manifest
    with pytest.raises(BundleError, match="holds no language model"):
        _ = opened.llm
    with pytest.raises(BundleError, match="holds a language model"):
        _ = open_bundle(bundle).tensor


def test_sizes_of_an_axis_out_of_order_are_refused(tmp_path: Path) -> None:
    write_manifest(tmp_path, _tensor_manifest(tmp_path))
    _edit(tmp_path, lambda manifest: manifest["plan"]["axes"]["batch"].update(most=0))
    with pytest.raises(BundleError, match="no valid manifest"):
        open_bundle(tmp_path)
    _edit(tmp_path, lambda manifest: manifest["plan"]["axes"]["batch"].update(most=4, usual=5))
    with pytest.raises(BundleError, match="out of order"):
        open_bundle(tmp_path)
