from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter, TokenType

from edgeq.bundle import MANIFEST, REPORTS, open_bundle
from edgeq.errors import BudgetError, ConversionError, OutputExistsError, SourceError, UsageError
from edgeq.planner.convert import Job, convert
from edgeq.planner.plan import Request
from edgeq.types import Budget

_WIDTH, _INNER, _HEADS = 64, 96, 4


def _write_model(path: Path, seed: int = 0) -> Path:
    """A random f16 llama of one layer with a byte vocabulary: everything that convert needs, in 200 kB."""
    writer = GGUFWriter(str(path), "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(_WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(_INNER)
    writer.add_head_count(_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(_WIDTH // _HEADS)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, *([TokenType.BYTE] * 256)]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types(kinds)
    rng = np.random.default_rng(seed)
    shapes = {
        "token_embd": (len(tokens), _WIDTH),
        "output": (len(tokens), _WIDTH),
        "blk.0.attn_q": (_WIDTH, _WIDTH),
        "blk.0.attn_k": (_WIDTH, _WIDTH),
        "blk.0.attn_v": (_WIDTH, _WIDTH),
        "blk.0.attn_output": (_WIDTH, _WIDTH),
        "blk.0.ffn_gate": (_INNER, _WIDTH),
        "blk.0.ffn_up": (_INNER, _WIDTH),
        "blk.0.ffn_down": (_WIDTH, _INNER),
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.normal(scale=0.1, size=shape).astype(np.float16))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(_WIDTH, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    return _write_model(tmp_path / "in" / "model.gguf")


def _job(model: Path, preset: str = "f16", budget: Budget | None = None) -> Job:
    return Job(str(model), "laptop-cpu", budget or Budget(), Request(preset=preset), threads=1)


def test_a_bundle_is_replaced_with_its_reports(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = convert(_job(model), out)
    (out / REPORTS).mkdir()
    (out / REPORTS / "of-the-old-one.json").write_text("{}")
    second = convert(_job(model, "q8_0"), out, force=True)
    assert second.llm.plan.preset == "q8_0"
    assert second.manifest.source.weights_sha256 == first.manifest.source.weights_sha256 is not None
    assert open_bundle(out, verify=True).manifest == second.manifest
    assert not (out / REPORTS).exists()
    assert {p.name for p in tmp_path.iterdir()} == {"in", "out"}


@pytest.mark.parametrize("through", ["file", "link"])
def test_force_never_deletes_the_model_that_is_converted(model: Path, tmp_path: Path, through: str) -> None:
    out = tmp_path / "out"
    source = convert(_job(model), out).file("model")
    if through == "link":
        (tmp_path / "link.gguf").symlink_to(source)
        source = tmp_path / "link.gguf"
    before = source.read_bytes()
    with pytest.raises(OutputExistsError, match="holds the model"):
        convert(_job(source, "q8_0"), out, force=True)
    assert source.read_bytes() == before


def test_force_never_deletes_files_that_are_not_the_bundles(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(_job(model), out)
    (out / "thesis.tex").write_text("x")
    with pytest.raises(OutputExistsError, match=r"thesis\.tex"):
        convert(_job(model, "q8_0"), out, force=True)
    assert (out / "thesis.tex").exists()


@pytest.mark.parametrize("output", ["", ".", "..", "sub/.."])
def test_the_current_folder_is_refused_before_the_model_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    (tmp_path / "here" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(OutputExistsError, match="current folder"):
        convert(_job(tmp_path / "no-such-model"), Path(output), force=True)


def test_a_current_folder_that_is_gone(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here").rmdir()
    with pytest.raises(ConversionError, match="current folder"):
        convert(_job(model), Path("out"))
    assert convert(_job(model), tmp_path / "out").manifest.name == "out"


def test_an_output_that_a_manifest_cannot_name(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="UTF-8"):
        convert(_job(model), tmp_path / os.fsdecode(b"bad\xff"))
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_a_plan_that_fails_leaves_no_folders(model: Path, tmp_path: Path) -> None:
    with pytest.raises(BudgetError):
        convert(_job(model, budget=Budget(peak_memory_bytes=1)), tmp_path / "new" / "sub" / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("change", ["written over", "replaced"])
@pytest.mark.parametrize("stage", ["plan", "hash source"])
def test_weights_that_change_meanwhile_are_noticed(model: Path, tmp_path: Path, change: str, stage: str) -> None:
    other = _write_model(tmp_path / "in" / "other.gguf", seed=1)
    assert other.stat().st_size == model.stat().st_size
    os.utime(model, ns=(0, 10**18))
    changed = False

    def listener(name: str, _done: int, _total: int, _detail: str) -> None:
        nonlocal changed
        if name == stage and not changed:
            changed = True
            if change == "replaced":
                stamp = model.stat().st_mtime_ns
                os.utime(other, ns=(stamp, stamp))
                other.replace(model)
            else:
                model.write_bytes(other.read_bytes())

    with pytest.raises(SourceError, match=r"model\.gguf changed"):
        convert(_job(model), tmp_path / "out", progress=listener)
    assert changed
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_the_same_bundle_twice_to_one_place_needs_force(model: Path, tmp_path: Path) -> None:
    convert(_job(model), tmp_path / "out")
    before = (tmp_path / "out" / MANIFEST).read_bytes()
    with pytest.raises(OutputExistsError, match="--force"):
        convert(_job(model), tmp_path / "out")
    assert (tmp_path / "out" / MANIFEST).read_bytes() == before
