"""The names of `edgeq` are a promise: adding one is a decision, losing one breaks programs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import edgeq
from edgeq import errors

SURFACE = {
    "Budget",
    "BudgetError",
    "Bundle",
    "BundleError",
    "Calibration",
    "ConversionError",
    "DeviceProfile",
    "DiskFullError",
    "EdgeqError",
    "EmbeddingSession",
    "Gate",
    "Generation",
    "GgufEmbeddingSession",
    "Job",
    "LLMSession",
    "Manifest",
    "MissingPackageError",
    "ModelSource",
    "ModuleSource",
    "OutputExistsError",
    "Plan",
    "ProfileError",
    "PromptTooLongError",
    "Report",
    "Request",
    "SessionClosedError",
    "SessionError",
    "SourceError",
    "TensorJob",
    "TensorManifest",
    "TensorSession",
    "Timings",
    "Token",
    "TokenStream",
    "UnsupportedModelError",
    "UsageError",
    "__version__",
    "convert",
    "convert_tensor",
    "load",
    "load_profile",
    "open_bundle",
}


def test_the_surface_is_what_was_promised() -> None:
    assert set(edgeq.__all__) == SURFACE
    assert len(edgeq.__all__) == len(SURFACE)


@pytest.mark.parametrize("name", sorted(SURFACE))
def test_every_name_is_there_documented_and_listed(name: str) -> None:
    value = getattr(edgeq, name)
    assert name in dir(edgeq)
    assert name == "__version__" or value.__doc__


def test_every_error_is_public() -> None:
    kinds = {name for name in errors.__all__ if name.endswith("Error")}
    assert kinds <= SURFACE
    for name in kinds:
        assert getattr(edgeq, name) is getattr(errors, name)
        assert issubclass(getattr(edgeq, name), edgeq.EdgeqError)


def test_type_checkers_see_the_same_names_from_the_same_homes() -> None:
    tree = ast.parse(Path(edgeq.__file__).read_text(encoding="utf-8"))
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        (alias.asname, node.module)
        for node in guarded.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.name == alias.asname
    }
    assert seen == set(edgeq._HOME_OF.items())


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="module 'edgeq' has no attribute 'lod'"):
        _ = edgeq.lod  # type: ignore[attr-defined]


def test_importing_edgeq_loads_nothing_else() -> None:
    code = "import sys; before = set(sys.modules); import edgeq; print(sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=60, check=True)
    loaded = set(ast.literal_eval(done.stdout))
    assert {name for name in loaded if name.startswith("edgeq")} == {"edgeq", "edgeq._version"}
    assert not {name.split(".")[0] for name in loaded} & {"numpy", "msgspec", "llama_cpp", "rich", "jinja2"}


def test_the_star_import_works() -> None:
    namespace: dict[str, object] = {}
    exec("from edgeq import *", namespace)
    assert set(namespace) >= SURFACE
