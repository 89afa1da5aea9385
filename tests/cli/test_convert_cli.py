from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from edgeq.bundle import MANIFEST, open_bundle
from edgeq.staging import PREFIX

RunCli = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def bundle(smollm2_hf: Path, tmp_path_factory: pytest.TempPathFactory, run_cli: RunCli) -> Path:
    """The bundle of the README's first command."""
    out = tmp_path_factory.mktemp("convert") / "bundle"
    limits = ["--max-memory", "400MiB", "--max-itl", "60ms", "--eval-tokens", "512"]
    done = run_cli("convert", smollm2_hf, "--target", "laptop-cpu", *limits, "-o", out)
    assert done.returncode == 0, done.stderr
    assert f"wrote {out}" in done.stdout
    assert "peak memory" in done.stdout
    assert "rejected f16" in done.stdout
    assert "quality  against the bf16 reference over 512 tokens" in done.stdout
    return out


def _one_line(done: subprocess.CompletedProcess[str], code: int) -> str:
    """The error line, after checking that it is one and that there is no traceback."""
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(lines) == 1, done.stderr
    return lines[0]


def test_the_bundle_is_whole_and_says_how_it_was_made(bundle: Path) -> None:
    manifest = open_bundle(bundle, verify=True).llm
    assert manifest.plan.preset == "q8_0"
    assert manifest.source.license == "apache-2.0"
    assert manifest.source.weights_sha256
    assert manifest.budget.peak_memory_bytes == 400 * 2**20
    assert manifest.budget.ttft_ms == 2000.0  # from the profile
    assert manifest.plan.predicted.file_bytes == (bundle / "model.gguf").stat().st_size
    assert manifest.smoke is not None
    assert manifest.smoke.mean_kld < 0.05
    assert manifest.quality is not None
    assert 0 < manifest.quality.mean_kld < 0.05
    assert manifest.plan.search is None
    assert [p.name for p in bundle.parent.iterdir()] == ["bundle"]


def test_inspect_verify_and_json(bundle: Path, run_cli: RunCli) -> None:
    shown = run_cli("inspect", bundle)
    assert shown.returncode == 0, shown.stderr
    for word in ("apache-2.0", "q8_0", "peak memory", "mean KL", "sha256"):
        assert word in shown.stdout
    assert json.loads(run_cli("inspect", bundle, "--json").stdout)["plan"]["preset"] == "q8_0"
    assert "blk.29.ffn_up.weight" in run_cli("inspect", bundle, "--tensors").stdout
    assert run_cli("verify", bundle).stdout.startswith("ok: 2 files")
    assert json.loads(run_cli("verify", bundle, "--json").stdout)["ok"] is True


def test_a_recipe_of_a_bundle_makes_the_same_file(
    bundle: Path, smollm2_hf: Path, run_cli: RunCli, tmp_path: Path
) -> None:
    out = tmp_path / "again"
    done = run_cli(
        *("convert", smollm2_hf, "--target", "laptop-cpu", "--recipe", bundle / "recipe.yaml", "-o", out, "--json"),
        *("--eval-tokens", "0"),
    )
    assert done.returncode == 0, done.stderr
    model = next(f for f in json.loads(done.stdout)["files"] if f["role"] == "model")
    assert model["sha256"] == open_bundle(bundle).llm.files[0].sha256


def test_generating_from_it(bundle: Path, run_cli: RunCli) -> None:
    done = run_cli("run", bundle, "What is the capital of France?", "--max-tokens", "24")
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert "tok/s" in done.stderr
    answer = json.loads(run_cli("run", bundle, "Say hi", "--max-tokens", "4", "--json").stdout)
    assert answer["finish_reason"] == "length"
    assert len(answer["timings"]["gaps_ms"]) == 3


def test_an_existing_bundle_needs_force(bundle: Path, smollm2_hf: Path, run_cli: RunCli) -> None:
    before = (bundle / MANIFEST).read_bytes()
    done = run_cli("convert", smollm2_hf, "--target", "laptop-cpu", "-o", bundle)
    assert "--force" in _one_line(done, 1)
    assert (bundle / MANIFEST).read_bytes() == before


def test_a_flipped_byte_is_found(bundle: Path, run_cli: RunCli, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    with (copy / "model.gguf").open("r+b") as file:
        file.seek(70_000_000)
        byte = file.read(1)
        file.seek(70_000_000)
        file.write(bytes([byte[0] ^ 4]))
    assert "was changed" in _one_line(run_cli("verify", copy), 1)
    assert "was changed" in _one_line(run_cli("bench", copy), 1)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--target", "jetson-orinn"], 1, ["jetson-orin"]),
        (["--max-memory", "400"], 2, ["no unit"]),
        (["--max-memory", "4 elephants"], 2, ["elephants"]),
        (["--max-itl", "0ms"], 2, ["positive"]),
        (["--max-memory", "20MiB", "--search", "never"], 3, ["limit 20"]),
        (["--quant", "q4km"], 2, ["q4_k_m"]),
        (["--quant", "iq1_s"], 2, ["importance matrix"]),
        (["--tensor-type", "nothing=q8_0"], 2, ["changes nothing"]),
        (["--tensor-type", "attn_k=q4_k"], 2, ["576"]),
        (["--context", "0"], 2, ["above zero"]),
        (["--context", "99999"], 2, ["8192"]),
        (["--recipe", "missing.yaml"], 2, ["cannot be read"]),
        (["--llama-cpp", "nowhere"], 2, ["convert_hf_to_gguf.py"]),
        (["--revision", "main"], 2, ["revision"]),
        (["--frobnicate"], 2, ["--frobnicate"]),
    ],
)
def test_wrong_arguments(
    arguments: list[str], code: int, words: list[str], smollm2_hf: Path, cli: RunCli, tmp_path: Path
) -> None:
    target = [] if "--target" in arguments else ["--target", "laptop-cpu"]
    done = cli("convert", smollm2_hf, *target, *arguments, "-o", tmp_path / "out")
    line = _one_line(done, code)
    assert all(word in line for word in words)
    assert list(tmp_path.iterdir()) == []


def test_wrong_models(cli: RunCli, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    (tmp_path / "nameless").mkdir()
    (tmp_path / "nameless" / "config.json").write_text("{}")
    tensors = b'{"w": {"dtype": "F16", "shape": [2], "data_offsets": [0, 4]}}'
    (tmp_path / "nameless" / "model.safetensors").write_bytes(struct.pack("<Q", len(tensors)) + tensors + bytes(4))
    (tmp_path / "no.gguf").write_bytes(b"hello")
    for name, word in (
        ("missing", "neither a folder nor a file"),
        ("empty", "config.json"),
        ("pickled", "safetensors"),
        ("nameless", "architectures"),
        ("no.gguf", "GGUF"),
    ):
        done = cli("convert", tmp_path / name, "--target", "laptop-cpu", "-o", tmp_path / "out")
        assert word in _one_line(done, 1)
        assert not (tmp_path / "out").exists()


def test_a_quantized_gguf_is_refused_and_a_float_one_taken(
    bundle: Path, smollm2_hf: Path, run_cli: RunCli, tmp_path: Path
) -> None:
    from edgeq.converters.gguf.export import export_gguf

    done = run_cli("convert", bundle / "model.gguf", "--target", "laptop-cpu", "-o", tmp_path / "out")
    assert "quantized" in _one_line(done, 1)
    source = export_gguf(smollm2_hf, tmp_path / "f16.gguf", float_type="f16").path
    preset = ("--quant", "q4_0", "--eval-tokens", "0")
    done = run_cli("convert", source, "--target", "jetson-orin", *preset, "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    manifest = open_bundle(tmp_path / "out", verify=True).llm
    assert manifest.built_for == "jetson-orin-nano-8gb"
    assert manifest.plan.gpu_layers == -1
    assert [f.wanted for f in manifest.plan.fallbacks] == ["q6_k"]
    assert "became q8_0" in done.stdout


def test_plan_writes_nothing(smollm2_hf: Path, cli: RunCli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = cli("plan", smollm2_hf, "--target", "laptop-cpu", "--quant", "q4_k_m")
    assert done.returncode == 0, done.stderr
    assert "q4_k became q5_0 in" in done.stdout
    assert list(tmp_path.iterdir()) == []
    as_json = cli("plan", smollm2_hf, "--target", "laptop-cpu", "--json")
    assert json.loads(as_json.stdout)["predicted"]["peak_memory_bytes"] > 0


def test_a_full_disk_leaves_nothing(smollm2_hf: Path, small_disk: Callable[[int], Path], cli: RunCli) -> None:
    disk = small_disk(300)  # holds the unquantized model, but not the quantized one beside it
    done = cli("convert", smollm2_hf, "--target", "laptop-cpu", "--quant", "q8_0", "-o", disk / "out")
    assert "No space left" in _one_line(done, 1)
    assert list(disk.iterdir()) == []


def test_sigterm_cleans_up(smollm2_hf: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "edgeq.cli", "convert", str(smollm2_hf), "--target", "laptop-cpu", "-o", "out"]
    child = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=os.environ)
    while not list(tmp_path.glob(f"{PREFIX}*/reference/{smollm2_hf.name}")):
        assert child.poll() is None
    child.terminate()
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "interrupted" in errors
    assert list(tmp_path.iterdir()) == []


def test_completion_help_and_no_command(cli: RunCli) -> None:
    assert "edgeq" in cli("completion", "bash").stdout
    others = ("imatrix", "bench", "report", "run", "devices", "inspect", "verify", "completion")
    for command in ("convert", "plan", *others):
        done = cli(command, "--help")
        assert done.returncode == 0, done.stderr
        assert "examples:" in done.stdout
    assert "commands" in cli().stdout
    _one_line(cli("convrt"), 2)
