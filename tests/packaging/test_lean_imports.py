"""A robot starts fast: importing edgeq loads nothing heavy."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = {"torch", "transformers", "onnx", "onnxruntime", "tensorrt", "llama_cpp", "rclpy"}
CONVERTING = {"gguf", "tokenizers", "sentencepiece", "huggingface_hub", "safetensors"}


def loaded_by(statement: str) -> set[str]:
    """Top-level packages in memory after ``statement`` in a fresh interpreter."""
    program = f"import json, sys; {statement}; print(json.dumps([m.split('.')[0] for m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    ("statement", "banned"),
    [
        ("import edgeq", HEAVY | CONVERTING | {"numpy", "msgspec", "rich", "jinja2", "psutil", "yaml"}),
        ("import edgeq.runtime", HEAVY | CONVERTING | {"rich", "jinja2"}),
        ("import edgeq.converters", HEAVY | {"rich"}),
        ("import edgeq.profiles", HEAVY | CONVERTING | {"rich", "jinja2"}),
        ("import edgeq.cli", HEAVY | CONVERTING | {"numpy", "rich", "jinja2"}),
    ],
)
def test_import_is_lean(statement: str, banned: set[str]) -> None:
    assert loaded_by(statement) & banned == set()


def test_the_measurement_sees_what_is_loaded() -> None:
    assert "numpy" in loaded_by("import numpy")
