"""Small graphs, and TensorRT-RTX where it is installed."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """The module beside this file that makes graphs; these tests are no package that could import it."""
    name = "edgeq_tests_tiny_graphs"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("tiny_graphs.py"))
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


@pytest.fixture(scope="session")
def rtx() -> ModuleType:
    """The module ``tensorrt_rtx``."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    return importlib.import_module("tensorrt_rtx")


@pytest.fixture
def int8_bundle(tiny: ModuleType, tmp_path: Path) -> Path:
    """A bundle around the INT8 classifier."""
    folder: Path = tiny.write_tensor_bundle(tmp_path / "bundle", tiny.int8_graph(tmp_path / "int8.onnx"))
    return folder
