"""The reference model: a genuine Hugging Face folder that speaks, the same everywhere, written atomically."""

from __future__ import annotations

import hashlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors import safe_open

from edgeq.converters.checkpoint import Checkpoint
from edgeq.llama import Model

WEIGHTS_SHA256 = "e3e044e62d3808cf765de718ebec95d4c20902b421fcdf66e6e56c1e44e3101b"
TEXT = (
    "Grüße, 世界! The robot's arm — 3.14159 rad — can't\n\n  move\t1234567 steps…\n"
    "def f(x): return x**2  # 🤖👩‍🔬\n<|im_start|>user\nhi<|im_end|>   trailing   "
)


@pytest.fixture(scope="module")
def tokenizer(smollm2_hf: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2_hf)


@pytest.fixture(scope="module")
def model(smollm2_hf: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    kind: Any = AutoModelForCausalLM
    loaded, info = kind.from_pretrained(smollm2_hf, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    return loaded


@pytest.fixture(scope="module")
def llama(smollm2_gguf: Path) -> Iterator[Model]:
    with Model.load(smollm2_gguf, vocab_only=True) as loaded:
        yield loaded


def test_it_completes_text(model: Any, tokenizer: Any) -> None:
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert " Paris" in tokenizer.decode(answer[0])


def test_it_answers_in_a_chat(model: Any, tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    text = tokenizer.decode(answer[0])
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert "Paris" in text.split("<|im_start|>assistant")[1]


def test_tokens_are_those_of_llama_cpp(tokenizer: Any, llama: Model) -> None:
    assert tokenizer(TEXT)["input_ids"] == llama.tokenize(TEXT, add_special=False, parse_special=True)
    assert tokenizer.decode(tokenizer(TEXT)["input_ids"]) == TEXT
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (llama.bos, llama.eos)


def test_weights_are_the_same_everywhere(smollm2_hf: Path) -> None:
    assert hashlib.sha256((smollm2_hf / "model.safetensors").read_bytes()).hexdigest() == WEIGHTS_SHA256


def test_safetensors_reads_it(smollm2_hf: Path) -> None:
    path = smollm2_hf / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        assert len(file.keys()) == 272
        assert tuple(file.get_slice("model.embed_tokens.weight").get_shape()) == (49152, 576)
        assert {str(file.get_slice(name).get_dtype()) for name in file.keys()} == {"BF16"}  # noqa: SIM118 - no mapping


@pytest.fixture(scope="module")
def packaged(smollm2_gguf: Path) -> gguf.GGUFReader:
    return gguf.GGUFReader(smollm2_gguf)


@pytest.mark.parametrize("name", ["mlp.down_proj", "self_attn.v_proj"])
def test_noise_is_uniform_over_one_step(smollm2_hf: Path, packaged: gguf.GGUFReader, name: str) -> None:
    """Against the grid that the weights came from: at most half a step, a quarter on average, bias near zero."""
    theirs = {"mlp.down_proj": "blk.3.ffn_down.weight", "self_attn.v_proj": "blk.3.attn_v.weight"}[name]
    (tensor,) = [t for t in packaged.tensors if t.name == theirs]
    grid = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(-1, 32)
    raw = Checkpoint.open(smollm2_hf).read(f"model.layers.3.{name}.weight")
    weights = (raw.astype(np.uint32) << 16).view(np.float32).reshape(-1, 32)
    steps = np.array([np.diff(np.unique(block)).min() if len(np.unique(block)) > 1 else np.inf for block in grid])
    noise = (weights - grid) / steps[:, None]
    rounding = np.abs(weights / steps[:, None]).max() * 2.0**-8
    assert np.abs(noise).max() <= 0.5 + rounding
    assert np.abs(noise).mean() == pytest.approx(0.25, abs=0.01)
    assert noise.mean() == pytest.approx(0, abs=0.01)


def make_in(folder: Path) -> subprocess.Popen[bytes]:
    script = Path(__file__).parents[2] / "scripts" / "make_smollm2.py"
    return subprocess.Popen([sys.executable, str(script), str(folder)], stdout=subprocess.DEVNULL)


def test_killed_run_leaves_nothing_and_the_next_repairs(tmp_path: Path, smollm2_hf: Path) -> None:
    out = tmp_path / "model"
    child = make_in(out)
    while not list(tmp_path.glob(".model.tmp*")):
        assert child.poll() is None
        time.sleep(0.01)
    time.sleep(0.5)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not out.exists()

    shutil.copytree(smollm2_hf, out)
    (out / "tokenizer.json").write_text("{")
    assert make_in(out).wait() == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == [".model.lock", "model"]
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in smollm2_hf.iterdir())
    for file in smollm2_hf.iterdir():
        assert (out / file.name).read_bytes() == file.read_bytes()

    written = out.stat().st_ino
    assert make_in(out).wait() == 0
    assert out.stat().st_ino == written, "a complete folder is kept"
