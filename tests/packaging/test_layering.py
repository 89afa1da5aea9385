"""The arrows of the house, read from the syntax tree: imports inside functions and for type checkers count too."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ALLOWED = {
    "core": {"core"},
    "profiles": {"core", "profiles"},
    "converters": {"core", "profiles", "converters"},
    "runtime": {"core", "profiles", "runtime"},
    "top": {"core", "profiles", "converters", "runtime", "top"},
}
CORE_PACKAGES = {"msgspec", "numpy", "llama_cpp", "PIL", "tokenizers"}
# The one module of the core that reads YAML, for profiles and recipes alike.
YAML_READER = "edgeq.strict_yaml"
LAZY_ONLY = {
    "PIL",
    "gguf",
    "huggingface_hub",
    "jinja2",
    "llama_cpp",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "psutil",
    "rclpy",
    "rich",
    "safetensors",
    "sentencepiece",
    "tensorrt",
    "tokenizers",
}
NEVER = {"torch", "transformers"}
# What takes gradients, and what traces modules of torch; inside functions only, so that nobody else needs torch.
TORCH = ("edgeq.converters.gguf.sensitivity.fisher", "edgeq.converters.onnx.export.")
# The public surface: it forwards names to every layer, lazily, so it stands above them all.
FACADE = "edgeq/__init__.py"


def layer(module: str) -> str:
    """The layer of a module: ``edgeq.converters.gguf`` is of the converters, ``edgeq.types`` of the core."""
    parts = module.split(".")
    part = parts[1] if len(parts) > 1 else ""
    if part in {"converters", "profiles", "runtime"}:
        return part
    return "top" if part in {"__main__", "cli", "planner", "probe"} else "core"


def source_files(repo: Path) -> Iterator[tuple[str, Path]]:
    """Name and file of every module, through the real folders and not the links that type checkers use."""
    for package, folder in (
        ("edgeq", repo / "edgeq"),
        *((f"edgeq.{name}", repo / name) for name in ("converters", "profiles", "runtime")),
    ):
        for file in sorted(folder.rglob("*.py")):
            inside = file.relative_to(folder)
            if package == "edgeq" and inside.parts[0] in {"converters", "profiles", "runtime"}:
                continue
            yield ".".join([package, *inside.with_suffix("").parts]).removesuffix(".__init__"), file


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every module that is imported anywhere: by statement, by ``import_module`` or by ``require_package``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            base = node.module or ""
            if base == "edgeq":
                yield from ((f"edgeq.{alias.name}", node.lineno) for alias in node.names)
            else:
                yield base, node.lineno
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func
            name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
            if name in {"import_module", "require_package"} and isinstance(node.args[0].value, str):
                yield node.args[0].value, node.lineno


def imports_at_once(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """What importing the module imports: neither functions nor blocks for type checkers."""
    todo: list[ast.stmt] = list(tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            todo += node.orelse
            continue
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from imports(node)
        for name in ("body", "orelse", "finalbody"):
            todo += getattr(node, name, [])


def broken_arrows(module: str, tree: ast.Module) -> list[str]:
    """What a module imports against the arrows."""
    home = layer(module)
    broken = []
    for name, line in imports(tree):
        root = name.split(".")[0]
        if root == "edgeq":
            if layer(name) not in ALLOWED[home]:
                broken.append(f"line {line}: {module} ({home}) imports {name} ({layer(name)})")
        elif root in NEVER and not module.startswith(TORCH):
            broken.append(f"line {line}: {module} imports {name}, which only tests and the export may")
        elif root == "yaml" and module == YAML_READER:
            continue
        elif home == "core" and root not in sys.stdlib_module_names and root not in CORE_PACKAGES:
            broken.append(f"line {line}: {module} is core and imports {name}")
    for name, line in imports_at_once(tree):
        if name.split(".")[0] in LAZY_ONLY | NEVER:
            broken.append(f"line {line}: {module} imports {name} outside a function")
    return broken


def test_arrows(repo: Path) -> None:
    files = [(m, f) for m, f in source_files(repo) if f != repo / FACADE]
    broken = [text for module, file in files for text in broken_arrows(module, ast.parse(file.read_text()))]
    assert not broken, "\n".join(broken)
    assert len({layer(module) for module, _ in files}) == len(ALLOWED), "every layer was looked at"


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("edgeq.types", "def f():\n    from edgeq.runtime import x"),
        ("edgeq.types", "from edgeq import cli"),
        ("edgeq.types", "import yaml"),
        ("edgeq.types", "if TYPE_CHECKING:\n    import edgeq.profiles.loader"),
        ("edgeq.converters.a", "import importlib\nimportlib.import_module('edgeq.runtime.llm')"),
        ("edgeq.runtime.a", "from edgeq.converters.gguf import header"),
        ("edgeq.profiles.a", "import edgeq.planner"),
        ("edgeq.runtime.a", "class A:\n    import rich"),
        ("edgeq.cli.a", "try:\n    import gguf\nexcept ImportError:\n    pass"),
        ("edgeq.cli.a", "def f():\n    require_package('torch', 'x', 'y')"),
    ],
)
def test_a_broken_arrow_is_seen(module: str, code: str) -> None:
    assert broken_arrows(module, ast.parse(code))


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("edgeq.llama", "import numpy\ndef f():\n    return require_package('llama_cpp', 'cpu', 'to run')"),
        (
            "edgeq.converters.a",
            "from edgeq.errors import EdgeqError\nfrom edgeq.profiles import load\ndef f():\n    import gguf",
        ),
        ("edgeq.cli.a", "import edgeq.runtime\nif TYPE_CHECKING:\n    import rich"),
    ],
)
def test_an_allowed_arrow_is_let_through(module: str, code: str) -> None:
    assert broken_arrows(module, ast.parse(code)) == []
