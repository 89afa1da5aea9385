"""Importance matrices from the command line, read back by the gguf package and used by ``edgeq convert``."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from edgeq.bundle import open_bundle
from edgeq.converters.gguf.imatrix import ImportanceMatrix, read_imatrix
from tests.fixtures.command import Cli, RunCli, one_line
from tests.fixtures.language_models import TinyHf

QUICK = ("--threads", "1", "--calibration-tokens", "512")
_BLOCK = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
IN_BLOCKS = {f"blk.{layer}.{name}.weight" for layer in range(2) for name in _BLOCK}


@pytest.fixture(scope="module")
def untied(tiny_hf: TinyHf) -> Path:
    return tiny_hf("llama-untied", width=256)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of a few thousand tokens."""
    rng = random.Random(0)
    text = " ".join(rng.choice(["robot", "arm", "shelf", "camera", "waits"]) for _ in range(3000))
    path = tmp_path_factory.mktemp("words") / "words.txt"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def made(
    untied: Path, tmp_path_factory: pytest.TempPathFactory, run_cli: RunCli
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A file, and what was said about it."""
    out = tmp_path_factory.mktemp("imatrix") / "own.gguf"
    done = run_cli("imatrix", untied, *QUICK, "-o", out)
    assert done.returncode == 0, done.stderr
    assert list(out.parent.iterdir()) == [out]
    return out, done


def _same(a: ImportanceMatrix, b: ImportanceMatrix) -> bool:
    return a.entries.keys() == b.entries.keys() and a.sha256 == b.sha256


def test_the_file_is_what_llama_imatrix_writes(made: tuple[Path, Any]) -> None:
    out, _ = made
    reader = gguf.GGUFReader(out)
    assert reader.fields["general.type"].contents() == "imatrix"
    (dataset,) = reader.fields["imatrix.datasets"].contents()
    assert dataset.startswith("written by llama-untied-256, 512 tokens, seed 0, sha256 ")
    assert reader.fields["imatrix.chunk_count"].contents() >= 2
    assert 128 <= reader.fields["imatrix.chunk_size"].contents() <= 256
    arrays = {tensor.name: tensor.data for tensor in reader.tensors}
    wanted = IN_BLOCKS | {"output.weight"}
    assert arrays.keys() == {name + suffix for name in wanted for suffix in (".in_sum2", ".counts")}
    for name in wanted:
        assert arrays[name + ".counts"].ravel().tolist() == [512]
        sums = arrays[name + ".in_sum2"].ravel()
        assert len(sums) == (512 if "ffn_down" in name else 256)
        assert np.isfinite(sums).all()
        assert (sums > 0).mean() > 0.9
    # Query, key and value multiply the same input.
    assert np.array_equal(arrays["blk.1.attn_q.weight.in_sum2"], arrays["blk.1.attn_v.weight.in_sum2"])
    matrix = read_imatrix(out)
    assert np.array_equal(matrix.entries["output.weight"].sums, arrays["output.weight.in_sum2"].reshape(1, -1))


def test_what_was_done_is_said(made: tuple[Path, subprocess.CompletedProcess[str]], untied: Path) -> None:
    out, done = made
    matrix = read_imatrix(out)
    lines = done.stdout.splitlines()
    assert lines[0].startswith("model    llama-untied-256, LlamaForCausalLM, ")
    wrote = f"512 tokens that the model wrote itself, in {matrix.chunk_count} texts, seed 0, sha256 "
    assert lines[1].startswith(f"text     {wrote}")
    assert lines[2:] == [
        "matrices 15; no entry: token_embd.weight",
        f"contents sha256 {matrix.sha256}",
        f"wrote {out}",
        f"next: edgeq convert {untied} --target DEVICE --imatrix {out}",
    ]
    assert lines[1].rpartition(" ")[2] in matrix.datasets[0]
    assert [line.partition(":")[0] for line in done.stderr.splitlines()] == [
        "read weights",
        "write calibration text",
        "collect imatrix",
    ]


def test_folder_and_gguf_give_the_same_and_the_seed_another(
    made: tuple[Path, Any], untied: Path, cli: Cli, tmp_path: Path
) -> None:
    out, _ = made
    found = {}
    for name, model, options in (
        ("gguf", untied.with_suffix(".gguf"), ()),
        ("seed", untied, ("--seed", "1")),
    ):
        path = tmp_path / f"{name}.gguf"
        done = cli("imatrix", model, *QUICK, *options, "--json", "-o", path)
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout)
        found[name] = read_imatrix(path)
        assert said["path"] == str(path)
        assert said["matrix_sha256"] == found[name].sha256
        assert (said["matrices"], said["without_entry"], said["notes"]) == (15, ["token_embd.weight"], [])
        assert said["text"]["name"] == f"written by {model.name}"
        assert said["text"]["text_sha256"] in found[name].datasets[0]
        assert (said["text"]["source"], said["text"]["tokens"]) == ("self", 512)
        assert said["text"]["chunks"] == found[name].chunk_count
        assert said["source"]["id"] == model.name
    assert said["text"]["seed"] == 1
    assert _same(found["gguf"], read_imatrix(out))
    assert not _same(found["seed"], found["gguf"])


def test_a_text_of_the_user(tiny_hf: TinyHf, words: Path, cli: Cli, tmp_path: Path) -> None:
    """A tied embedding is multiplied with too, as the output matrix."""
    out = tmp_path / "words.imatrix.gguf"
    arguments = ("imatrix", tiny_hf("llama-tied"), "--threads", "1", "--calibration", words, "-o", out)
    done = cli(*arguments, "--calibration-tokens", "2100")
    assert done.returncode == 0, done.stderr
    assert "text     2100 tokens of words.txt, in 9 texts, sha256 " in done.stdout
    assert "\nmatrices 15\n" in done.stdout
    matrix = read_imatrix(out)
    assert matrix.entries.keys() == IN_BLOCKS | {"token_embd.weight"}
    assert {int(entry.counts[0]) for entry in matrix.entries.values()} == {2100}
    assert (matrix.chunk_count, matrix.chunk_tokens) == (9, 256)
    assert matrix.datasets[0].startswith("words.txt, 2100 tokens, sha256 ")


def test_convert_rounds_with_it(made: tuple[Path, Any], untied: Path, cli: Cli, tmp_path: Path) -> None:
    matrix, _ = made
    options = ("--target", "laptop-cpu", "--threads", "1", "--quant", "iq2_s", "--eval-tokens", "0")
    done = cli("convert", untied, *options, "--imatrix", matrix, "-o", tmp_path / "bundle")
    assert done.returncode == 0, done.stderr
    notes = open_bundle(tmp_path / "bundle", verify=True).manifest.plan.notes
    assert f"rounded with the importance matrix own.gguf, sha256 {read_imatrix(matrix).sha256}" in notes


def test_a_file_that_is_there_is_only_overwritten_on_demand(
    made: tuple[Path, Any], untied: Path, cli: Cli, tmp_path: Path
) -> None:
    out = tmp_path / "there.gguf"
    out.write_text("mine")
    line = one_line(cli("imatrix", "no-such-model", *QUICK, "-o", out), 1)
    assert "there.gguf exists. Add --force" in line
    line = one_line(cli("imatrix", untied, *QUICK, "-o", tmp_path, "--force"), 1)
    assert "Choose another file" in line
    assert out.read_text() == "mine"
    assert cli("imatrix", untied, *QUICK, "-o", out, "--force").returncode == 0
    assert out.read_bytes() == made[0].read_bytes()
    assert list(tmp_path.iterdir()) == [out]


def test_what_it_is_made_from_is_never_overwritten(tiny_hf: TinyHf, words: Path, cli: Cli, tmp_path: Path) -> None:
    gguf_file, folder = tiny_hf("llama-tied").with_suffix(".gguf"), tiny_hf("llama-tied")
    link = tmp_path / "link.gguf"
    link.symlink_to(gguf_file)
    for model, out in ((gguf_file, link), (folder, folder / "model.safetensors"), (folder, words)):
        before = out.read_bytes()
        done = cli("imatrix", model, "--calibration", words, "-o", out, "--force")
        assert "is what the importance matrix is made from" in one_line(done, 1)
        assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["no-such-model"], 1, ["no-such-model", "neither a folder"]),
        (["no-such-model", "-o", "missing/own.gguf"], 1, ["missing/own.gguf", "folder is not there"]),
        (["no-such-model", "-o", "o" * 300], 1, ["cannot be written", "File name too long"]),
        (["m", "--calibration-tokens", "255"], 2, ["--calibration-tokens 255", "256"]),
        (["m", "--calibration", "missing.txt"], 2, ["missing.txt", "No such file"]),
        (["m", "--calibration", __file__, "--seed", "1"], 2, ["--seed", "--calibration"]),
        (["m", "--threads", "0"], 2, ["--threads"]),
    ],
)
def test_wrong_values_are_one_line_before_any_work(
    arguments: list[str], code: int, words: list[str], cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = one_line(cli("imatrix", "-o", "own.gguf", *arguments), code)
    assert line.startswith("edgeq")
    assert all(word in line for word in words), line
    assert list(tmp_path.iterdir()) == []


def test_models_and_texts_that_will_not_do(
    untied: Path, smollm2_gguf: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = one_line(cli("imatrix", smollm2_gguf, "-o", "own.gguf"), 1)
    assert "quantized" in line
    short, binary = tmp_path / "short.txt", tmp_path / "binary"
    short.write_text("the robot moves " * 20)
    binary.write_bytes(b"\x00\xff" * 500)
    for path, word in ((short, "are needed"), (binary, "binary")):
        assert word in one_line(cli("imatrix", untied, "--calibration", path, "-o", "own.gguf"), 2)
    assert "--llama-cpp" in one_line(
        cli("imatrix", untied.with_suffix(".gguf"), "--llama-cpp", ".", "-o", "own.gguf"), 2
    )
    assert sorted(tmp_path.iterdir()) == [binary, short]


def test_a_folder_that_takes_no_file(untied: Path, cli: Cli) -> None:
    assert "cannot be written" in one_line(cli("imatrix", untied, "-o", "/proc/own.gguf"), 1)


def test_a_full_disk(untied: Path, small_disk: Callable[[int], Path], cli: Cli) -> None:
    disk = small_disk(1)
    assert "1.00 MiB free" in one_line(cli("imatrix", untied, *QUICK, "-o", disk / "own.gguf"), 1)
    assert list(disk.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
@pytest.mark.parametrize("stage", ["write calibration text", "collect imatrix"])
def test_an_interrupt_leaves_nothing(
    untied: Path, words: Path, stage: str, number: signal.Signals, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "edgeq.cli", "imatrix", str(untied), "-o", "own.gguf", "--threads", "1"]
    if stage == "collect imatrix":
        text = tmp_path.parent / f"{number.name}.txt"
        text.write_text(words.read_text() * 20)
        command += ["--calibration", str(text)]
    command += ["--calibration-tokens", "100000"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=os.environ) as child:
        assert child.stderr is not None
        seen = next(line for line in child.stderr if line.startswith(stage))
        assert seen
        time.sleep(0.05)
        child.send_signal(number)
        rest = child.stderr.read()
        assert child.wait(60) == 130, rest
    assert rest.splitlines()[-1] == "edgeq: interrupted"
    assert "Traceback" not in rest
    assert list(tmp_path.iterdir()) == []
