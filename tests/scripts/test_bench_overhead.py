from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest


def run(repo: Path, *args: str | Path) -> subprocess.CompletedProcess[str]:
    script = str(repo / "scripts" / "bench_overhead.py")
    command = [sys.executable, script, *map(str, args), "--threads", "1"]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.parametrize("kind", ["smollm2_gguf", "smollm2_bundle"])
def test_figures_are_complete_and_consistent(
    repo: Path, tmp_path: Path, request: pytest.FixtureRequest, kind: str
) -> None:
    out = tmp_path / "figures.json"
    done = run(repo, request.getfixturevalue(kind), "--tokens", "6", "--rounds", "2", "--limit", "100", "--json", out)
    assert (done.returncode, done.stderr) == (0, "")
    figures = json.loads(out.read_text())
    assert len(figures["session_ms"]) == len(figures["bare_ms"]) == 2 * 5
    ratios = [a / b for a, b in zip(figures["session_ms"], figures["bare_ms"], strict=True)]
    assert figures["ratio_median"] == pytest.approx(statistics.median(ratios))
    assert f"{figures['ratio_median']:.4f}" in done.stdout


def test_a_missed_limit_is_exit_code_3(repo: Path, smollm2_gguf: Path) -> None:
    assert run(repo, smollm2_gguf, "--tokens", "4", "--rounds", "1", "--limit", "0").returncode == 3


def test_a_file_that_is_no_model_is_one_line(repo: Path, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"x")
    done = run(repo, tmp_path / "x.gguf")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
