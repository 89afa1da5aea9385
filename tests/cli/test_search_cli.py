"""Mixed types from the command line: searched, shown, exported and imported again, on models of two layers."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from edgeq.bundle import open_bundle
from edgeq.converters.gguf.header import read_header
from edgeq.converters.gguf.imatrix import write_imatrix
from edgeq.converters.gguf.observe import collect_imatrix
from edgeq.converters.gguf.recipe import read_recipe
from tests.fixtures.command import Cli, RunCli, one_line
from tests.fixtures.language_models import TinyHf
from tests.fixtures.search import LIMIT, SEARCH


@pytest.fixture(scope="module")
def model(tiny_hf: TinyHf) -> Path:
    return tiny_hf("llama-untied")


@pytest.fixture(scope="module")
def converted(
    model: Path, tmp_path_factory: pytest.TempPathFactory, run_cli: RunCli
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A bundle of a searched mix, and what convert said."""
    out = tmp_path_factory.mktemp("searched") / "bundle"
    done = run_cli("convert", model, *SEARCH, *LIMIT, "--trials", "3", "--eval-tokens", "600", "-o", out)
    assert done.returncode == 0, done.stderr
    return out, done


def test_a_mix_keeps_the_limit_and_says_how_it_was_found(
    converted: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    bundle, done = converted
    manifest = open_bundle(bundle, verify=True).llm
    search = manifest.plan.search
    assert search is not None
    assert manifest.plan.preset is None
    assert len(search.trials) > 1
    assert (bundle / "model.gguf").stat().st_size == manifest.plan.predicted.file_bytes <= 95_000
    assert len(set(manifest.plan.tensor_types.values())) > 2
    assert manifest.quality is not None
    assert manifest.quality.tokens == 600
    for text in (
        "types    searched mix: ",
        "search   least mean KL divergence within the limits",
        f"predicted mean KL {search.predicted_kld:.4g} nats",
        "sensitivities by imatrix on 512 tokens that the model wrote itself",
        "rounding weighted by activations",
        "times: bytes over the bandwidth of the profile laptop-cpu",
        f"{len(search.trials)} mixes made and compared on",
        "predicted optimum",
        "quality  against the f16 reference over 600 tokens",
        "≤ 92.8 KiB",
    ):
        assert text in done.stdout, text
    assert done.stdout.count("times: ") == 1


def test_inspect_shows_the_same_again(converted: tuple[Path, subprocess.CompletedProcess[str]], cli: Cli) -> None:
    bundle, done = converted
    shown = cli("inspect", bundle).stdout.splitlines()
    said = done.stdout.splitlines()
    for start, length in (("search   ", 6), ("trial  ", 4), ("quality  ", 3)):
        first = next(n for n, line in enumerate(said) if line.startswith(start))
        again = next(n for n, line in enumerate(shown) if line.startswith(start))
        assert said[first : first + length] == shown[again : again + length]


@pytest.mark.parametrize("command", ["inspect", "plan"])
def test_an_exported_recipe_gives_the_same_types(
    converted: tuple[Path, subprocess.CompletedProcess[str]], model: Path, command: str, cli: Cli, tmp_path: Path
) -> None:
    bundle, _ = converted
    recipe = tmp_path / "mix.yaml"
    if command == "inspect":
        wanted = open_bundle(bundle).llm.plan.tensor_types
        done = cli("inspect", bundle, "--export", recipe)
    else:
        wanted = json.loads(cli("plan", model, *SEARCH, *LIMIT, "--json").stdout)["tensor_types"]
        done = cli("plan", model, *SEARCH, *LIMIT, "--export", recipe)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"wrote {recipe}\n")
    given = cli("plan", model, "--target", "laptop-cpu", "--recipe", recipe, "--json")
    assert given.returncode == 0, given.stderr
    assert json.loads(given.stdout)["tensor_types"] == wanted
    assert json.loads(given.stdout)["rejected"] == []  # every preset comes to the same under a whole recipe


def test_a_recipe_with_a_search_is_rounded_as_the_search_did(
    converted: tuple[Path, subprocess.CompletedProcess[str]], model: Path, cli: Cli, tmp_path: Path
) -> None:
    bundle, _ = converted
    again = tmp_path / "again"
    options = ("--recipe", bundle / "recipe.yaml", "--search", "always", "--eval-tokens", "0", "-o", again)
    done = cli("convert", model, *SEARCH, *options)
    assert done.returncode == 0, done.stderr
    assert (again / "model.gguf").read_bytes() == (bundle / "model.gguf").read_bytes()
    plain = tmp_path / "plain"
    without = ("--recipe", bundle / "recipe.yaml", "--eval-tokens", "0", "-o", plain)
    assert cli("convert", model, "--target", "laptop-cpu", "--threads", "1", *without).returncode == 0
    types = {name: tensor.type for name, tensor in read_header(plain / "model.gguf").tensors.items()}
    assert types == open_bundle(bundle).llm.plan.tensor_types


def test_the_format_of_llama_cpp(
    converted: tuple[Path, subprocess.CompletedProcess[str]], cli: Cli, tmp_path: Path
) -> None:
    bundle, _ = converted
    types = open_bundle(bundle).llm.plan.tensor_types
    out = tmp_path / "types.txt"
    assert cli("inspect", bundle, "--export", out, "--format", "llama.cpp").returncode == 0
    entries = [line.split("=") for line in out.read_text().split()]
    assert {name: [kind for pattern, kind in entries if re.search(pattern, name)] for name in types} == {
        name: [kind] for name, kind in types.items()
    }


def test_files_are_never_overwritten_unasked(
    converted: tuple[Path, subprocess.CompletedProcess[str]], model: Path, cli: Cli, tmp_path: Path
) -> None:
    bundle, _ = converted
    mine = tmp_path / "mine.svg"
    mine.write_text("mine")
    (tmp_path / "folder.svg").mkdir()
    for command in (
        ["inspect", bundle, "--export", mine],
        ["plan", "no-such-model", *SEARCH, "--export", mine],
        ["plan", "no-such-model", *SEARCH, "--front", mine],
    ):
        assert "--force" in one_line(cli(*command), 1)
    for wrong, word in ((tmp_path / "folder.svg", "exists"), (tmp_path / "no" / "x.svg", "its folder is not there")):
        assert word in one_line(cli("plan", "no-such-model", *SEARCH, "--front", wrong, "--force"), 1)
    assert "in the bundle" in one_line(cli("inspect", bundle, "--export", bundle / "x.yaml"), 2)
    assert mine.read_text() == "mine"
    assert cli("inspect", bundle, "--export", mine, "--force").returncode == 0
    assert read_recipe(mine).overrides
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.svg", "mine.svg"]
    open_bundle(bundle, verify=True)


def test_options_that_come_to_nothing_are_named(model: Path, cli: Cli, tmp_path: Path) -> None:
    options = ("--target", "laptop-cpu", "--trials", "9", "--estimator", "fisher", "--seed", "5")
    note = "--estimator, --seed, --trials had no effect: f16 or q8_0 fits, so no mix is searched for"
    shown = cli("plan", model, *options).stdout
    (line,) = (line for line in shown.splitlines() if "had no effect" in line)
    assert line.startswith(f"note     {note}")
    assert "--search always" in line
    (found,) = json.loads(cli("plan", model, *options, "--json").stdout)["notes"]
    assert f"note     {found}" == line
    assert "no effect" not in cli("plan", model, "--target", "laptop-cpu").stdout
    assert "no effect" not in cli("plan", model, *SEARCH, *LIMIT, "--trials", "9").stdout
    judging = ("--target", "laptop-cpu", "--eval-tokens", "600", "-o", tmp_path / "out")
    done = cli("convert", model, *judging)
    assert "note     --eval-tokens had no effect: f16 weights are not judged" in done.stdout
    assert open_bundle(tmp_path / "out").llm.quality is None


def test_messages_name_the_model_as_the_user_does(model: Path, cli: Cli, tiny_hf: TinyHf, tmp_path: Path) -> None:
    copy = tmp_path / "my-robot"
    shutil.copytree(model, copy)
    for folder in (model, copy):  # the second one's text was kept under the name of the first
        plan = json.loads(cli("plan", folder, *SEARCH, *LIMIT, "--json").stdout)
        assert plan["search"]["calibration"]["name"] == f"written by {folder.name}"
    ids = np.arange(3, 131, dtype=np.int32)
    matrix = tmp_path / "other.gguf"
    other = tiny_hf("qwen2").with_suffix(".gguf")
    write_imatrix(collect_imatrix(other, [ids], threads=1), matrix)
    tied = tiny_hf("llama-tied", width=256)
    line = one_line(cli("plan", tied, "--target", "laptop-cpu", "--quant", "q4_0", "--imatrix", matrix), 2)
    assert f"names are in {tied.name}" in line
    assert ".gguf" not in line


def test_limits_are_shown_with_their_digits(model: Path, cli: Cli) -> None:
    line = one_line(cli("plan", model, *SEARCH, "--max-itl", "0.0001ms"), 3)
    assert "<= 0.0001 ms" in line


def test_a_preset_that_needs_an_importance_matrix(tiny_hf: TinyHf, cli: Cli, tmp_path: Path) -> None:
    model = tiny_hf("llama-untied", width=256)
    ids = np.random.default_rng(0).integers(3, 300, 128).astype(np.int32)
    matrix = tmp_path / "own.gguf"
    write_imatrix(collect_imatrix(model.with_suffix(".gguf"), [ids], threads=1), matrix)
    options = ("--target", "laptop-cpu", "--threads", "1", "--quant", "iq2_s")
    assert "--imatrix" in one_line(cli("plan", model, *options), 2)
    out = tmp_path / "out"
    done = cli("convert", model, *options, "--imatrix", matrix, "--eval-tokens", "0", "-o", out)
    assert done.returncode == 0, done.stderr
    manifest = open_bundle(out, verify=True).llm
    assert manifest.plan.preset == "iq2_s"
    assert "iq2_xs" in {tensor.type for tensor in read_header(out / "model.gguf").tensors.values()}
    assert "note     rounded with the importance matrix own.gguf, sha256 " in done.stdout
    recipe = ("--recipe", out / "recipe.yaml", "--target", "laptop-cpu")
    assert "--imatrix" in one_line(cli("plan", model, *recipe), 2)
    assert cli("plan", model, *recipe, "--imatrix", matrix).returncode == 0
    other = tiny_hf("llama-untied")
    assert "another model" in one_line(cli("plan", other, *options, "--imatrix", matrix), 2)
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(matrix.read_bytes()[:500])
    assert "damaged.gguf" in one_line(cli("plan", model, *options, "--imatrix", damaged), 1)


def test_a_preset_is_held_to_limits_on_quality_too(model: Path, cli: Cli, tmp_path: Path) -> None:
    preset = ("--target", "laptop-cpu", "--threads", "1", "--quant", "q4_0", "--eval-tokens", "600")
    line = one_line(cli("convert", model, *preset, "--max-kld", "1e-7", "-o", tmp_path / "out"), 3)
    assert "mean KL divergence" in line
    assert "same top token" in one_line(cli("convert", model, *preset, "--min-top1", "100%", "-o", tmp_path / "out"), 3)
    assert list(tmp_path.iterdir()) == []


def test_limits_that_no_mix_meets_name_what_would(model: Path, cli: Cli) -> None:
    line = one_line(cli("plan", model, *SEARCH, "--max-size", "20kB"), 3)
    (least,) = re.findall(r"--max-size ([\d.]+[KM]iB)\.$", line)
    assert cli("plan", model, *SEARCH, "--max-size", least).returncode == 0
    done = cli("plan", model, *SEARCH, *LIMIT, "--max-kld", "0.00001")
    line = one_line(done, 3)
    assert "file size" in line
    assert "mean KL divergence" in line
    ways = dict(re.findall(r"(--max-\w+) (\S+?)(?: or |\.$)", line))
    assert set(ways) == {"--max-size", "--max-kld"}
    assert cli("plan", model, *SEARCH, *LIMIT, "--max-kld", ways["--max-kld"]).returncode == 0
    assert cli("plan", model, *SEARCH, "--max-size", ways["--max-size"], "--max-kld", "0.00001").returncode == 0


@pytest.mark.parametrize(
    ("override", "word"),
    [("attn_k=q4_k", "rows of 64"), ("norm=q8_0", "always stays f32"), ("nothing=q8_0", "changes nothing")],
)
def test_a_search_refuses_overrides_that_no_tensor_can_take(model: Path, override: str, word: str, cli: Cli) -> None:
    assert word in one_line(cli("plan", model, *SEARCH, *LIMIT, "--tensor-type", override), 2)


def test_a_search_keeps_what_the_user_fixed(model: Path, cli: Cli) -> None:
    done = cli("plan", model, *SEARCH, *LIMIT, "--tensor-type", "attn_[kv]=q8_0", "--json")
    types = json.loads(done.stdout)["tensor_types"]
    assert {kind for name, kind in types.items() if "attn_k" in name or "attn_v" in name} == {"q8_0"}
    assert "q8_0" not in {kind for name, kind in types.items() if "ffn" in name}
