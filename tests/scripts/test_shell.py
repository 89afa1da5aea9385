"""The shell scripts: they parse, and what a machine lacks is one line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPTS = ("scripts/_lib.sh", "scripts/quickstart", "scripts/test", "scripts/check", ".ci/run")


@pytest.fixture
def tree(repo: Path, tmp_path: Path) -> Path:
    """A checkout with the scripts alone."""
    (tmp_path / "scripts").mkdir()
    for name in ("_lib.sh", "test"):
        shutil.copy(repo / "scripts" / name, tmp_path / "scripts")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(repo / name, tmp_path)
    return tmp_path


def bash(tree: Path, program: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PATH": f"{path}:/usr/bin:/bin"} if path else dict(os.environ)
    return subprocess.run(
        ["bash", "-c", f"set -euo pipefail; source scripts/_lib.sh; {program}"],
        cwd=tree,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,  # a step that left a sleeping child with our pipe would not return in time
        check=False,
    )


def fake(folder: Path, name: str, body: str) -> None:
    """A program that stands in for one that this machine has."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{body}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_parses(repo: Path, name: str) -> None:
    subprocess.run(["bash", "-n", str(repo / name)], check=True)
    assert name.endswith(".sh") or os.access(repo / name, os.X_OK)


def test_ci_calls_the_scripts_that_people_call(repo: Path) -> None:
    lines = (repo / ".ci" / "run").read_text().splitlines()
    assert [line.split()[0] for line in lines if line.startswith("scripts/")] == ["scripts/test", "scripts/check"]


def test_no_usable_python(tree: Path) -> None:
    for version in ("", ".10", ".11", ".12", ".13"):
        fake(tree / "bin", f"python3{version}", "exit 1")
    done = bash(tree, "ensure_venv", tree / "bin")
    assert done.returncode == 1
    assert done.stderr.startswith("error: no Python 3.10 or newer")
    assert done.stderr.count("\n") == 1


def test_a_tried_python_is_preferred_to_a_newer_one(tree: Path) -> None:
    fake(tree / "bin", "python3", '[[ "$2" == *"(4, 0)"* ]]')
    fake(tree / "bin", "python3.12", "exit 0")
    assert bash(tree, "find_python", tree / "bin").stdout == "python3.12\n"
    for version in (".10", ".11", ".12", ".13"):
        fake(tree / "bin", f"python3{version}", "exit 1")
    assert bash(tree, "find_python", tree / "bin").stdout == "python3\n"


def test_no_compiler(tree: Path) -> None:
    fake(tree / ".venv" / "bin", "python", "exit 1")
    done = bash(tree, "PATH=/nowhere; unset CXX; ensure_compiler")
    assert done.returncode == 1
    assert "error: no C++ compiler" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("packages", "allowed", "code"),
    [
        (["torch", "nvidia-cublas-cu13", "triton"], "", 1),
        (["torch", "nvidia-cublas-cu13", "triton"], "1", 0),
        (["torch", "sympy", "networkx"], "", 0),
        ([], "", 0),
    ],
)
def test_cuda_is_never_installed_by_surprise(tree: Path, packages: list[str], allowed: str, code: int) -> None:
    """The answer of pip is given; that pip can answer was seen on a machine, and costs minutes."""
    report = json.dumps({"install": [{"metadata": {"name": name}} for name in packages]})
    body = f"""
case "$*" in
  *find_spec*) exit 1 ;;
  *--dry-run*) echo '{report}' >.edgeq/logs/torch.json ;;
  *) exec python3 "$@" ;;
esac"""
    fake(tree / ".venv" / "bin", "python", body)
    done = bash(tree, f"EDGEQ_ALLOW_CUDA_TORCH={allowed} refuse_cuda_torch")
    assert done.returncode == code, done.stderr
    assert ("CPU wheel of torch" in done.stderr) == bool(code)


def test_step_hides_output_until_it_fails(tree: Path) -> None:
    done = bash(tree, 'step "Fine" fine echo hidden; step "Broken" broken bash -c "echo shown; exit 7"')
    assert done.returncode == 7
    assert done.stdout == ""
    assert "hidden" not in done.stderr
    assert "shown" in done.stderr
    assert "error: this step failed (exit code 7): Broken" in done.stderr
    assert (tree / ".edgeq" / "logs" / "fine.log").read_text() == "hidden\n"
