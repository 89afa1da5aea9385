"""``edgeq inspect`` on models that are called with arrays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from edgeq.bundle import describe_file, open_bundle, write_manifest
from edgeq.converters.onnx.layers import LayerError
from edgeq.tensor_types import TensorManifest, TensorPrediction, TensorVariant
from edgeq.types import Budget, to_json

if TYPE_CHECKING:
    from tests.fixtures.command import Cli
else:
    Cli = object

pytest.importorskip("onnxruntime")

SIZES: dict[str, Any] = dict.fromkeys(
    ("file_bytes", "weights_bytes", "activation_bytes", "runtime_bytes", "peak_memory_bytes"), 1 << 20
)
FLOOR = TensorPrediction(**SIZES, latency_ms=0.0123, latency_is_floor=True)
OTHER = "jetson-orin-nano-8gb"


def _write_layers(folder: Path, path: str, name: str) -> None:
    figures = {"cosine": 0.999, "noise": 0.002, "alone": 0.001, "max_error": 0.1}
    layer = LayerError(name=name, node=name, op_type="MatMul", quantized=True, **figures)
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    (folder / path).write_bytes(to_json([layer]))


def _manifest(folder: Path) -> TensorManifest:
    return open_bundle(folder).tensor


@pytest.fixture
def bundle(linear_onnx: Path, make_tensor_bundle: Any) -> Path:
    """With layers."""
    plan = {"scheme": "int8-dynamic", "predicted": FLOOR}
    folder: Path = make_tensor_bundle(linear_onnx, plan=plan, budget=Budget(latency_ms=33.0))
    _write_layers(folder, "layers.json", "here")
    manifest = _manifest(folder)
    files = (*manifest.files, describe_file(folder, "layers.json", "layers"))
    write_manifest(folder, msgspec.structs.replace(manifest, files=files))
    return folder


@pytest.fixture
def two(bundle: Path) -> Path:
    """For a second device too."""
    manifest = _manifest(bundle)
    place = f"devices/{OTHER}"
    _write_layers(bundle, f"{place}/layers.json", "there")
    (bundle / place / "model.onnx").write_bytes((bundle / "model.onnx").read_bytes())
    roles = {"model": "model.onnx", "layers": "layers.json"}
    other = TensorVariant(
        built_for=OTHER,
        target=manifest.target,
        plan=msgspec.structs.replace(manifest.plan, scheme="int8-static"),
        files=tuple(describe_file(bundle, f"{place}/{name}", role) for role, name in roles.items()),
        budget=Budget(),
    )
    write_manifest(bundle, msgspec.structs.replace(manifest, others=(other,)))
    return bundle


def test_what_a_bundle_says_of_itself(bundle: Path, cli: Cli) -> None:
    (bundle / "reports").mkdir()
    (bundle / "reports" / "1-bench.json").write_text("{}")
    done = cli("inspect", bundle)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "bundle   linear (tensor), built for laptop-cpu on 2026-01-01T00:00:00Z"
    assert "source   linear, licence not stated, sha256 None" in lines
    assert "made by  edgeq 0" in lines
    assert "threads  1" in lines
    assert "budget: latency p99 ≤ 33.0 ms" in lines
    assert f"reports  1; edgeq report {bundle} shows the latest" in lines
    for entry in _manifest(bundle).files:
        assert any(line.startswith(f"file     {entry.path} ({entry.role}), ") for line in lines)
        assert entry.sha256 in done.stdout


def test_a_floor_is_no_prediction(bundle: Path, cli: Cli) -> None:
    assert "≳ 0.012 ms a call" in cli("inspect", bundle).stdout
    manifest = _manifest(bundle)
    known = msgspec.structs.replace(FLOOR, latency_ms=3.14159, latency_is_floor=False)
    plan = msgspec.structs.replace(manifest.plan, predicted=known)
    write_manifest(bundle, msgspec.structs.replace(manifest, plan=plan))
    assert "peak memory 1.00 MiB, 3.14 ms a call" in cli("inspect", bundle).stdout


def test_pictures_never_lie_in_the_bundle_or_over_other_files(bundle: Path, tmp_path: Path, cli: Cli) -> None:
    pytest.importorskip("matplotlib")
    done = cli("inspect", bundle, "--picture", bundle / "x.png")
    assert done.returncode == 2
    assert "lies in the bundle" in done.stderr
    open_bundle(bundle, verify=True)
    picture = tmp_path / "x.svg"
    assert cli("inspect", bundle, "--picture", picture).returncode == 0
    picture.write_text("mine")
    done = cli("inspect", bundle, "--picture", picture)
    assert done.returncode != 0
    assert "Add --force" in done.stderr
    assert picture.read_text() == "mine"
    assert cli("inspect", bundle, "--picture", picture, "--force").returncode == 0
    assert "linear for laptop-cpu, int8-dynamic" in picture.read_text()


def test_layers_of_every_device(two: Path, tmp_path: Path, cli: Cli) -> None:
    pytest.importorskip("matplotlib")
    lines = cli("inspect", two, "--layers").stdout.splitlines()
    first, second = lines.index("for laptop-cpu"), lines.index(f"for {OTHER}")
    assert any(line.startswith("here ") and "quantized" in line for line in lines[first:second])
    assert any(line.startswith("there ") for line in lines[second:])
    alone = cli("inspect", two, "--layers", "--device", "jetson-orin").stdout  # an alias
    assert "there " in alone
    assert "here  " not in alone.replace("there", "")
    document = json.loads(cli("inspect", two, "--layers", "--json").stdout)
    assert {device: layers[0]["name"] for device, layers in document["layers"].items()} == {
        "laptop-cpu": "here",
        OTHER: "there",
    }
    done = cli("inspect", two, "--picture", tmp_path / "x.svg")
    assert done.returncode == 2
    assert "Choose one with --device" in done.stderr
    assert cli("inspect", two, "--picture", tmp_path / "x.svg", "--device", OTHER).returncode == 0
    assert "not made for 'raspberry-pi-5'" in cli("inspect", two, "--device", "raspberry-pi-5").stderr
