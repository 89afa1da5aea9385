"""What is shipped: built from a copy of the tree, through the source distribution, as a release is."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
FOLDERS = ("converters", "profiles", "runtime")


@pytest.fixture(scope="module")
def pyproject(repo: Path) -> dict[str, Any]:
    settings: dict[str, Any] = tomllib.loads((repo / "pyproject.toml").read_text(encoding="utf-8"))
    return settings


@pytest.fixture(scope="module")
def wheel(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.Path:
    copy, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("edgeq", *FOLDERS):
        shutil.copytree(repo / name, copy / name, symlinks=True, ignore=skip)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(repo / name, copy)
    command = [sys.executable, "-m", "build", "--outdir", str(out), str(copy)]
    if importlib.util.find_spec("setuptools") and int(importlib.metadata.version("setuptools").split(".")[0]) >= 77:
        command.append("--no-isolation")
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = out.glob("*.whl")
    return zipfile.Path(file)


def names(wheel: zipfile.Path) -> set[str]:
    return {name for name in wheel.root.namelist() if not name.endswith("/")}


def shipped(repo: Path) -> set[str]:
    """The files that belong into the wheel, under the names that they are imported by."""
    found = set()
    for root, prefix in ((repo / "edgeq", "edgeq"), *((repo / name, f"edgeq/{name}") for name in FOLDERS)):
        for file in root.rglob("*"):
            inside = file.relative_to(root)
            if root.name == "edgeq" and inside.parts[0] in FOLDERS:
                continue
            if file.suffix == ".py" or file.name == "py.typed" or (file.suffix == ".yaml" and root.name == "profiles"):
                found.add(f"{prefix}/{inside.as_posix()}")
    return found


def test_top_level_is_edgeq_alone(wheel: zipfile.Path) -> None:
    top = {name.split("/")[0] for name in names(wheel)}
    assert {name for name in top if not name.endswith(".dist-info")} == {"edgeq"}
    assert len(top) == 2


def test_every_module_is_in_the_wheel(repo: Path, wheel: zipfile.Path) -> None:
    inside = {name for name in names(wheel) if name.startswith("edgeq/")}
    assert inside == shipped(repo)
    assert {"edgeq/py.typed", "edgeq/profiles/laptop-cpu.yaml", "edgeq/converters/__init__.py"} <= inside


def test_wheel_imports_on_its_own(wheel: zipfile.Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(str(wheel.root.filename)) as archive:
        archive.extractall(tmp_path)
    program = "import edgeq, edgeq.converters, edgeq.profiles, edgeq.runtime, edgeq.cli; print(edgeq.runtime.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == tmp_path / "edgeq" / "runtime" / "__init__.py"


def test_packages_are_the_folders_of_the_tree(repo: Path, pyproject: dict[str, Any]) -> None:
    folders = set()
    for root, prefix in ((repo / "edgeq", "edgeq"), *((repo / name, f"edgeq.{name}") for name in FOLDERS)):
        for file in root.rglob("*.py"):
            inside = file.parent.relative_to(root).parts
            if not (root.name == "edgeq" and inside and inside[0] in FOLDERS):
                folders.add(".".join([prefix, *inside]))
    listed = pyproject["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(folders)
    assert set(pyproject["tool"]["setuptools"]["package-dir"]) == {f"edgeq.{name}" for name in FOLDERS}


@pytest.mark.parametrize("name", FOLDERS)
def test_links_for_type_checkers(repo: Path, name: str) -> None:
    link = repo / "edgeq" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..", name)


def test_every_requirement_is_pinned(repo: Path, pyproject: dict[str, Any]) -> None:
    project = pyproject["project"]
    wanted = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    plain = {_name(text) for text in wanted} - {"edgeq"}
    pins = [line for line in (repo / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert plain <= {_name(pin) for pin in pins}
    assert all("==" in pin for pin in pins)
    assert "torch==2.13.0" in pins


def _name(requirement: str) -> str:
    return re.split(r"[\[<>=!~; ]", requirement, maxsplit=1)[0].lower().replace("_", "-").replace(".", "-")
