"""The plumbing around llama.cpp's converter.

A stand-in plays the script: the real one needs a llama.cpp checkout, which no package brings. With a checkout at hand,
``EDGEQ_LLAMA_CPP=DIR`` runs the real one.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from edgeq.converters.gguf.external import export_with_llama_cpp
from edgeq.converters.gguf.header import read_header
from edgeq.errors import ConversionError, SourceError, UnsupportedModelError, UsageError

_COPIES = """
import argparse, shutil, sys
parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("--outfile")
parser.add_argument("--outtype", choices=["f32", "f16", "bf16"])
arguments = parser.parse_args()
print("INFO: writing", file=sys.stderr)
shutil.copy({gguf!r}, arguments.outfile)
"""


def _checkout(folder: Path, script: str) -> Path:
    folder.mkdir()
    (folder / "convert_hf_to_gguf.py").write_text(script)
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["SomethingNew"]}')
    return folder


def test_the_script_writes_what_is_then_read(tmp_path: Path, model: Path, smollm2_gguf: Path) -> None:
    checkout = _checkout(tmp_path / "llama.cpp", _COPIES.format(gguf=str(smollm2_gguf)))
    seen: list[str] = []
    export_with_llama_cpp(model, tmp_path / "out.gguf", checkout, float_type="bf16", progress=seen.append)
    assert read_header(tmp_path / "out.gguf").architecture == "llama"
    assert seen == ["INFO: writing"]


@pytest.mark.parametrize(
    ("script", "cause", "remedy"),
    [
        ("raise KeyError('n_ctx')", "KeyError: 'n_ctx'", "bring the GGUF"),
        ("import no_such_torch", "No module named 'no_such_torch'", "requirements.txt"),
        ("", "exit code 0", "bring the GGUF"),
        ("import sys; sys.exit(5)", "exit code 5", "bring the GGUF"),
    ],
)
def test_a_failing_script_is_one_line(tmp_path: Path, model: Path, script: str, cause: str, remedy: str) -> None:
    checkout = _checkout(tmp_path / "llama.cpp", script)
    with pytest.raises(ConversionError) as caught:
        export_with_llama_cpp(model, tmp_path / "out.gguf", checkout, float_type="f16")
    assert cause in caught.value.cause
    assert remedy in caught.value.remedy
    assert "\n" not in str(caught.value)


def test_an_output_that_is_no_gguf_is_refused(tmp_path: Path, model: Path) -> None:
    (tmp_path / "text").write_text("no GGUF")
    checkout = _checkout(tmp_path / "llama.cpp", _COPIES.format(gguf=str(tmp_path / "text")))
    with pytest.raises(SourceError, match="GGUF"):
        export_with_llama_cpp(model, tmp_path / "out.gguf", checkout, float_type="f16")


def test_a_folder_without_the_script(tmp_path: Path, model: Path) -> None:
    with pytest.raises(UsageError, match=r"convert_hf_to_gguf\.py"):
        export_with_llama_cpp(model, tmp_path / "out.gguf", tmp_path, float_type="f16")


def test_a_model_with_code_of_its_own_is_refused(tmp_path: Path, model: Path) -> None:
    (model / "config.json").write_text('{"auto_map": {"AutoConfig": "configuration_x.X"}}')
    (model / "configuration_x.py").write_text("raise SystemExit('ran')")
    checkout = _checkout(tmp_path / "llama.cpp", "print('never')")
    with pytest.raises(UnsupportedModelError, match="code of its own"):
        export_with_llama_cpp(model, tmp_path / "out.gguf", checkout, float_type="f16")


@pytest.mark.slow
@pytest.mark.skipif("EDGEQ_LLAMA_CPP" not in os.environ, reason="EDGEQ_LLAMA_CPP names no llama.cpp checkout")
def test_the_real_script_converts_a_model_that_edgeq_does_not(tmp_path: Path, smollm2_hf: Path) -> None:
    import transformers

    from edgeq.planner.convert import Job, convert

    config = transformers.OlmoConfig(
        vocab_size=49152, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    transformers.OlmoForCausalLM(config).save_pretrained(tmp_path / "olmo")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(smollm2_hf / name, tmp_path / "olmo")
    job = Job(str(tmp_path / "olmo"), "laptop-cpu", llama_cpp=Path(os.environ["EDGEQ_LLAMA_CPP"]))
    assert convert(job, tmp_path / "out").manifest.artifact.architecture == "olmo"
