"""Inputs of the accuracy benchmark: nothing that is judged on is calibrated with."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest


@pytest.fixture
def inputs() -> SimpleNamespace:
    """The script as a module."""
    repo = Path(__file__).resolve().parents[2]
    return SimpleNamespace(**runpy.run_path(str(repo / "scripts" / "accuracy_inputs.py")))


def test_photos_to_judge_on_are_others(inputs: SimpleNamespace, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    first, second = inputs.write_photos(tmp_path, 7, 7)
    assert not set(inputs._CALIBRATED) & set(inputs._JUDGED)
    pixels = [
        [np.asarray(image.open(path)).tobytes() for path in sorted(folder.iterdir())] for folder in (first, second)
    ]
    assert len(set(pixels[0]) | set(pixels[1])) == 14


@pytest.mark.slow
def test_sentences_to_judge_on_are_others(inputs: SimpleNamespace, tmp_path: Path) -> None:
    first, second = (
        set(path.read_text(encoding="utf-8").splitlines()) for path in inputs.write_texts(tmp_path, 64, 64)
    )
    assert len(first) == len(second) == 64
    assert not first & second
