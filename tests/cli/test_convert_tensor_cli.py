"""``edgeq convert`` of models that are called with arrays, as a user types it: photos, saved arrays, wrong ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    from tests.fixtures.command import Cli
else:
    Cli = object

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")

PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "retina.jpg", "ihc.png")
QUICK = ("--target", "laptop-cpu", "--threads", "1", "--precision", "int8-static", "--calibration-method", "minmax")


@pytest.fixture(scope="module")
def camera(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny ResNet with its image processor's settings."""
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=5
    )
    folder = tmp_path_factory.mktemp("resnet") / "camera"
    transformers.ResNetForImageClassification(config).eval().save_pretrained(folder)
    processor = {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 64}, "crop_pct": 0.875}
    processor |= {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = Path(pytest.importorskip("skimage").__file__).parent / "data"
    folder = tmp_path_factory.mktemp("photos")
    for name in PHOTOS:
        shutil.copyfile(data / name, folder / name)
    return folder


def test_photos_from_a_folder(cli: Cli, camera: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    done = cli("convert", camera, *QUICK, "--min-cosine", "0.9", "--calibration", photos, "-o", out, "--json")
    assert done.returncode == 0, done.stderr
    manifest = json.loads(done.stdout)
    assert manifest["plan"]["scheme"] == "int8-static"
    assert manifest["quality"]["source"].startswith(f"{photos.name}, of which")
    assert not [note for note in manifest["plan"]["notes"] if "random" in note]


def test_saved_arrays_and_what_comes_next(cli: Cli, camera: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "frames.npz", pixel_values=rng.standard_normal((6, 3, 64, 64)).astype(np.float32))
    out = tmp_path / "bundle"
    shape = ("--shape", "pixel_values=1x3x64x64", "--min-cosine", "0.9")
    done = cli("convert", camera, *QUICK, *shape, "--calibration", tmp_path / "frames.npz", "-o", out)
    assert done.returncode == 0, done.stderr
    assert "frames.npz" in done.stdout
    assert done.stdout.splitlines()[-1] == f"next: edgeq bench {out}"


@pytest.mark.parametrize("kind", ["folder", "arrays"])
def test_a_language_model_is_calibrated_with_texts(cli: Cli, smollm2_hf: Path, tmp_path: Path, kind: str) -> None:
    given = tmp_path / "photos" if kind == "folder" else tmp_path / "frames.npz"
    if kind == "folder":
        given.mkdir()
    else:
        np.savez(given, x=np.zeros(3))
    done = cli("convert", smollm2_hf, "--target", "laptop-cpu", "--calibration", given, "-o", tmp_path / "out")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert given.name in line
    assert "text" in line
    assert not (tmp_path / "out").exists()
