"""Loading a bundle brings in what serves its kind, and nothing of the other one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnxruntime")

# `edgeq.llama_library` is not among them: it tells how many physical cores there are.
OF_LANGUAGE = {
    "edgeq.ggml_types",
    "edgeq.llama",
    "edgeq.llama_context",
    "edgeq.llama_decoder",
    "edgeq.llama_handle",
    "edgeq.llama_model",
    "edgeq.runtime.chat",
    "edgeq.runtime.engine",
    "edgeq.runtime.generation",
    "edgeq.runtime.llm",
    "edgeq.runtime.prompt",
    "edgeq.runtime.sampling",
    "edgeq.runtime.stream",
    "edgeq.runtime.turns",
    "llama_cpp",
}
OF_ARRAYS = {"edgeq.inputs", "edgeq.profiles.onnx.session", "edgeq.runtime.tensor.session", "onnxruntime"}


def _loaded_by(bundle: Path) -> set[str]:
    """Modules in memory after loading a bundle in a fresh interpreter."""
    program = "import edgeq, json, sys\nedgeq.load(sys.argv[1]).close()\nprint(json.dumps(sorted(sys.modules)))"
    command = [sys.executable, "-c", program, str(bundle)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return set(json.loads(done.stdout))


def test_arrays_need_nothing_of_language_models(linear_onnx: Path, make_tensor_bundle: Any) -> None:
    loaded = _loaded_by(make_tensor_bundle(linear_onnx))
    assert loaded & OF_LANGUAGE == set()
    assert loaded >= OF_ARRAYS
    assert loaded & {"edgeq.profiles.loader", "edgeq.runtime.tensor.embedding", "yaml", "PIL", "tokenizers"} == set()


def test_language_models_need_nothing_of_arrays(smollm2_bundle: Path) -> None:
    loaded = _loaded_by(smollm2_bundle)
    assert loaded & OF_ARRAYS == set()
    assert loaded >= OF_LANGUAGE
