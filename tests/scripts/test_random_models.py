"""Random models of the benchmarks: live signals, the same each time, and a table of many architectures."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
t: Any = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def random_models(repo: Path) -> Any:
    return SimpleNamespace(**runpy.run_path(str(repo / "scripts" / "random_models.py")))


def _efficientnet() -> Any:
    config = t.EfficientNetConfig(
        image_size=64, width_coefficient=0.5, depth_coefficient=0.3, hidden_dim=640, num_labels=10
    )
    return t.EfficientNetForImageClassification(config)


_SHAPES = {"pixel_values": (1, 3, 64, 64)}


def test_signals_live_behind_every_convolution(random_models: Any) -> None:
    torch.manual_seed(0)
    model = _efficientnet().eval()
    inputs = random_models.drawn(_SHAPES)
    assert random_models.variation(model, inputs)["logits"] < 1e-3
    random_models.enliven(model, inputs)
    sizes: list[float] = []
    for module in model.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.BatchNorm2d)):
            module.register_forward_hook(lambda _module, _inputs, output: sizes.append(float(output.std())))
    assert random_models.variation(model, inputs)["logits"] > 1e-2
    assert len(sizes) > 30
    assert 0.2 < min(sizes) < max(sizes) < 5


def test_folders_are_the_same_each_time(random_models: Any, tmp_path: Path) -> None:
    def make() -> Any:
        return t.ResNetForImageClassification(t.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1]))

    weights = [
        random_models.save_random(make, {"pixel_values": (1, 3, 32, 32)}, tmp_path / name) / "model.safetensors"
        for name in ("a", "b")
    ]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_dead_models_are_refused(random_models: Any, tmp_path: Path) -> None:
    def make() -> Any:
        model = t.ResNetForImageClassification(t.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1]))
        torch.nn.init.zeros_(model.classifier[1].weight)
        torch.nn.init.ones_(model.classifier[1].bias)
        return model

    with pytest.raises(ValueError, match="hardly depends"):
        random_models.save_random(make, {"pixel_values": (1, 3, 32, 32)}, tmp_path / "dead")
    assert not (tmp_path / "dead").exists()


def test_many_architectures_of_every_kind(repo: Path) -> None:
    table = runpy.run_path(str(repo / "scripts" / "architectures.py"))["architectures"]()
    assert len(table) >= 20
    assert {next(iter(entry.shapes)) for entry in table.values()} == {
        "pixel_values", "input_ids", "input_values", "input_features",
    }  # fmt: skip
