from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edgeq.converters.config_shape import shape_of_config
from edgeq.converters.gguf.presets import PRESETS
from edgeq.profiles.llm.weight_schemes import SCHEMES
from edgeq.strict_yaml import load_yaml

BOARD = """
name: board
summary: a board
arch: aarch64
cpu: {{name: A78, cores: 6}}
gpu: {{name: Ampere, compute_capability: "8.7", sms: 8, int8_ops_per_s: 40TOPS}}
memory: {{total_bytes: 8GB, visible_bytes: 8GB, reserved_bytes: 1GB, unified: true, bandwidth_bytes_per_s: 100GB/s}}
power_modes: {{15W: {{power_w: 15W}}}}
power_mode: 15W
backends:
  llama.cpp-cuda:
    precisions: [fp16]
    decode_efficiency: {efficiency}
    compute_efficiency: 0.4
    runtime_bytes: 96MiB
provenance: datasheet
sources: {{cpu: x, gpu: x, memory: x, power_modes: x, backends: x}}
"""
FIGURES = """
models:
  small:
    source: made up
    config: {{architectures: [LlamaForCausalLM], hidden_size: 256, intermediate_size: 512, num_hidden_layers: 2,
      num_attention_heads: 4, vocab_size: 1000}}
sources: {{paper: a paper}}
tables:
  - {{device: {device}, backend: llama.cpp-cuda, engine: E, weights: fp16, source: paper, target: true,
      tokens_per_s: {{small: {published}}}}}
  - {{device: {device}, backend: llama.cpp-cuda, engine: E, weights: q8_0, context_tokens: 100, source: paper,
      tokens_per_s: {{small: 20000}}}}
  - {{device: {device}, backend: tensorrt, engine: E, weights: fp16, source: paper, tokens_per_s: {{small: 1}}}}
"""
# Two blocks of four matrices of 256 x 256 and three of 256 x 512, the output matrix, five norms.
WEIGHTS = 2 * (4 * 256 * 256 + 3 * 256 * 512) + 256 * 1000
READ = 2 * (WEIGHTS + 5 * 256)


@pytest.fixture(scope="session")
def figures(repo: Path) -> Any:
    path = repo / "scripts" / "published_figures.yaml"
    return load_yaml(path.read_text(encoding="utf-8"), str(path))


def run(repo: Path, *args: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(repo / "scripts" / "bench_published.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def write(folder: Path, *, published: float, efficiency: float = 0.5, text: str = FIGURES) -> Path:
    (folder / "board.yaml").write_text(BOARD.format(efficiency=efficiency))
    path = folder / "figures.yaml"
    path.write_text(text.format(device=folder / "board.yaml", published=published))
    return path


def test_a_prediction_from_the_config_alone(repo: Path, tmp_path: Path) -> None:
    predicted = 50e9 / READ
    path = write(tmp_path, published=predicted / 1.2)
    done = run(repo, "--figures", path, "--json", tmp_path / "out.json")
    assert (done.returncode, done.stderr) == (0, "")
    rows = json.loads((tmp_path / "out.json").read_text())
    assert rows[0]["predicted"] == pytest.approx(predicted)
    assert rows[0]["error"] == pytest.approx(0.2)
    q8 = WEIGHTS * 34 / 32 + 4 * 5 * 256 + 100 * 2 * 2 * 2 * 256
    assert rows[1]["predicted"] == pytest.approx(50e9 / q8)
    assert (rows[2]["predicted"], rows[2]["problem"]) == (None, f"{tmp_path}/board.yaml has no backend tensorrt")
    assert "1 without a prediction" in done.stdout
    assert "+20% (target)" in done.stdout


@pytest.mark.parametrize("factor", [1.26, 0.74])
def test_a_target_beyond_the_limit_is_exit_code_3(repo: Path, tmp_path: Path, factor: float) -> None:
    done = run(repo, "--figures", write(tmp_path, published=50e9 / READ / factor))
    assert done.returncode == 3
    assert "1 targets, 1 of them missed" in done.stdout


def test_a_target_that_cannot_be_predicted_is_missed(repo: Path, tmp_path: Path) -> None:
    path = write(tmp_path, published=50e9 / READ, text=FIGURES.replace("llama.cpp-cuda", "tensorrt-rtx", 1))
    assert run(repo, "--figures", path).returncode == 3


@pytest.mark.parametrize(
    ("old", "new", "cause"),
    [
        ("source: paper, target", "source: book, target", "names book"),
        ("{{small: {published}}}", "{{large: {published}}}", "names large"),
        ("target: true", "goal: true", "unknown field `goal`"),
        ("weights: fp16", "weights: q9_9", "q9_9"),
        ("context_tokens: 100", "context_tokens: -100", "context_tokens"),
        ("{{small: {published}}}", "{{small: 0}}", "tokens_per_s"),
        ("{{small: {published}}}", "{{small: .nan}}", "tokens_per_s"),
        ("target: true", "power_mode_assumed: true", "assumes a power mode"),
        ("hidden_size: 256, ", "", "has no hidden_size"),
    ],
)
def test_mistakes_in_the_file_are_one_line(repo: Path, tmp_path: Path, old: str, new: str, cause: str) -> None:
    assert old in FIGURES
    done = run(repo, "--figures", write(tmp_path, published=1, text=FIGURES.replace(old, new, 1)))
    assert done.returncode in (1, 2)
    assert done.stderr.count("\n") == 1
    assert cause in done.stderr


def test_what_the_source_says_beside_a_figure_is_printed(repo: Path, tmp_path: Path) -> None:
    """An assumed power mode is marked, notes stand under the table, and the last line counts all that is far off."""
    text = FIGURES.replace("target: true,", "note: at night, power_mode: 15W, power_mode_assumed: true,", 1)
    path = write(tmp_path, published=50e9 / READ / 1.3, text=text)
    done = run(repo, "--figures", path, "--json", tmp_path / "out.json")
    assert done.returncode == 0
    first = done.stdout.splitlines()[2]
    assert "15W*" in first
    assert first.endswith("| 1    |")
    assert "- note 1: at night\n" in done.stdout
    assert "does not state the power mode (1 figures)" in done.stdout
    assert done.stdout.endswith("3 figures, 2 of them beyond 25%; 0 targets, 0 of them missed\n")
    row = json.loads((tmp_path / "out.json").read_text())[0]
    assert (row["power_mode_assumed"], row["note"]) == (True, "at night")


FITTED = """
models:
  wide: {{source: made up, config: {{architectures: [LlamaForCausalLM], hidden_size: 1024, intermediate_size: 4096,
    num_hidden_layers: 2, num_attention_heads: 4, vocab_size: 1000}}}}
  deep: {{source: made up, config: {{architectures: [LlamaForCausalLM], hidden_size: 256, intermediate_size: 512,
    num_hidden_layers: 40, num_attention_heads: 4, vocab_size: 1000}}}}
sources: {{paper: a paper}}
tables:
  - {{device: {device}, backend: llama.cpp-cuda, engine: E, weights: fp16, source: paper,
      tokens_per_s: {{wide: {wide}, deep: {deep}}}}}
  - {{device: {device}, backend: llama.cpp-cuda, engine: E, weights: fp16, source: paper, target: true,
      tokens_per_s: {{deep: {target}}}}}
fits:
  those of E: [{{engine: {engine}, device: {device}}}]
alternatives: {{fp16: [q8_0]}}
"""


def fitted_figures(folder: Path, *, engine: str) -> Path:
    """Figures of 0.8 of 100 GB/s and 0.05 ms a layer; what the target should be is 1.2 times as fast as published."""
    (folder / "board.yaml").write_text(BOARD.format(efficiency=0.5))
    speeds = {}
    for name, (width, inner, layers) in {"wide": (1024, 4096, 2), "deep": (256, 512, 40)}.items():
        matrices = layers * (4 * width**2 + 3 * width * inner) + 1000 * width
        read = 2 * (matrices + (2 * layers + 1) * width)
        speeds[name] = 1 / (read / 80e9 + layers * 0.05e-3)
    path = folder / "fitted.yaml"
    device = folder / "board.yaml"
    path.write_text(FITTED.format(device=device, engine=engine, target=speeds["deep"] / 1.2, **speeds))
    return path


def test_a_fit_finds_the_constants_that_made_the_figures(repo: Path, tmp_path: Path) -> None:
    done = run(repo, "--figures", fitted_figures(tmp_path, engine="E"), "--fit")
    assert (done.returncode, done.stderr) == (3, "")
    line = next(line for line in done.stdout.splitlines() if line.startswith("| those of E"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:4] == ["2", "0.80", "0.050"]
    assert cells[5] == "+20%"
    assert [cell.replace("-", "+") for cell in cells[4].split(" to ")] == ["+0%", "+0%"]
    others = [line for line in done.stdout.splitlines() if line.startswith(("| fp16 ", "| q8_0 "))]
    assert [line.split("|")[1].strip() for line in others] == ["fp16", "q8_0"]


def test_a_fit_on_nothing_is_one_line(repo: Path, tmp_path: Path) -> None:
    done = run(repo, "--figures", fitted_figures(tmp_path, engine="another"), "--fit")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "0 figures of 'those of E'" in done.stderr


def test_files_that_cannot_be_read_or_written_are_one_line(repo: Path, tmp_path: Path) -> None:
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"models: \xff\xfe")
    path = write(tmp_path, published=50e9 / READ)
    for arguments, words in (
        (("--figures", binary), "not UTF-8"),
        (("--figures", tmp_path / "nowhere.yaml"), "No such file"),
        (("--figures", path, "--json", tmp_path / "nowhere" / "out.json"), "its folder is not there"),
        (("--figures", path, "--json", tmp_path), "exists"),
    ):
        done = run(repo, *arguments)
        assert done.returncode in (1, 2)
        assert done.stdout == ""
        assert done.stderr.count("\n") == 1
        assert words in done.stderr


def test_the_page_holds_what_the_script_prints(repo: Path) -> None:
    """docs/published.md: print it anew with --fit after a change of profiles or figures."""
    done = run(repo, "--fit")
    assert done.returncode == 0, done.stdout[-200:] + done.stderr
    page = set((repo / "docs" / "published.md").read_text(encoding="utf-8").splitlines())
    assert [line for line in done.stdout.splitlines() if line not in page] == []
    printed = set(done.stdout.splitlines())
    rows = [line for line in page if line.startswith(("| jetson", "| raspberry"))]
    assert [line for line in rows if line not in printed] == []


def test_every_model_has_its_published_number_of_parameters(figures: Any) -> None:
    for name, model in figures["models"].items():
        tensors = shape_of_config(model["config"]).tensors.values()
        published = re.search(r"published as ([\d.]+)B parameters", model["source"])
        assert published is not None, name
        digits = len(published[1].partition(".")[2])
        assert f"{sum(map(math.prod, tensors)) / 1e9:.{digits}f}" == published[1], name


def test_every_figure_has_what_it_needs(figures: Any) -> None:
    for table in figures["tables"]:
        assert table["weights"] in SCHEMES or table["weights"] in PRESETS
        assert set(table["tokens_per_s"]) <= set(figures["models"])
        assert figures["sources"][table["source"]]
    used = {name for table in figures["tables"] for name in table["tokens_per_s"]}
    assert used == set(figures["models"])


def test_targets_are_those_that_were_asked_for(figures: Any) -> None:
    targets = [(name, value) for t in figures["tables"] if t.get("target") for name, value in t["tokens_per_s"].items()]
    assert targets == [("Qwen3-0.6B", 71), ("Qwen3-0.6B", 159), ("Qwen3-4B", 29.1), ("Llama-3.1-8B", 19.1)]
