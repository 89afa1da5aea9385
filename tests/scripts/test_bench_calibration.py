"""The benchmark of calibration: its table, its figures, and the promise of 700 MB on ResNet-50."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.fixtures.language_models import load_script

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return load_script("bench_calibration")


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """image (1, 3, 16, 16) -> Conv -> Relu -> Conv."""
    rng = np.random.default_rng(0)

    def weight(name: str, *dims: int) -> Any:
        return onnx.numpy_helper.from_array(rng.standard_normal(dims, np.float32), name)

    info = onnx.helper.make_tensor_value_info
    nodes = [
        onnx.helper.make_node("Conv", ["image", "w1"], ["a"]),
        onnx.helper.make_node("Relu", ["a"], ["b"]),
        onnx.helper.make_node("Conv", ["b", "w2"], ["c"]),
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "small",
        [info("image", 1, [1, 3, 16, 16])],
        [info("c", 1, None)],
        [weight("w1", 8, 3, 3, 3), weight("w2", 4, 8, 3, 3)],
    )
    path = tmp_path / "small.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def test_the_table_has_a_row_a_method(
    bench: ModuleType, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.activations(small) == ["image", "a", "b", "c"]
    command = ["bench", "--model", str(small), "--samples", "3", "--methods", "minmax", "mse", "--onnxruntime", "2"]
    monkeypatch.setattr(sys, "argv", [*command, "--json", str(tmp_path / "figures.json")])
    assert bench.main() == 0
    rows = json.loads((tmp_path / "figures.json").read_text())
    assert [row["label"] for row in rows] == [bench.MODEL_ALONE, "minmax", "mse", bench.ONNXRUNTIME]
    assert [row["samples"] for row in rows] == [3, 3, 3, 2]
    assert all(20e6 < row["peak_bytes"] < 400e6 for row in rows)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 + len(rows)
    # What is too much is an exit code.
    monkeypatch.setattr(bench, "LIMIT_BYTES", 1_000_000)
    assert bench.main() == 3


@pytest.mark.slow
def test_resnet_50_stays_under_700_mb(bench: ModuleType, tmp_path: Path) -> None:
    for package in ("torch", "transformers", "onnxscript"):
        pytest.importorskip(package)
    model = bench.export_resnet(tmp_path)
    rows = bench.run(model, 12, ("minmax", "mse"))
    assert all(row.peak_bytes < bench.LIMIT_BYTES for row in rows)
