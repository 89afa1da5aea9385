from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeq.converters.gguf.header import read_header
from edgeq.converters.gguf.quantize import quantize
from edgeq.converters.gguf.shape import describe_artifact, model_shape
from edgeq.errors import SourceError
from edgeq.profiles.llm.model_memory import file_bytes
from edgeq.profiles.llm.model_shape import ModelShape

_KEYS: dict[str, Any] = {
    "block_count": 2,
    "context_length": 64,
    "embedding_length": 64,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "vocab_size": 8,
}


def _write(path: Path, arch: str = "llama", *, name: str = "", **changes: Any) -> Path:
    writer = gguf.GGUFWriter(path, arch)
    if name:
        writer.add_name(name)
    for key, value in {**_KEYS, **{k.replace("__", "."): v for k, v in changes.items()}}.items():
        if isinstance(value, list):
            writer.add_array(f"{arch}.{key}", value)
        elif isinstance(value, float):
            writer.add_float32(f"{arch}.{key}", value)
        else:
            writer.add_uint32(f"{arch}.{key}", value)
    writer.add_tokenizer_model("no_vocab")
    writer.add_tensor("token_embd.weight", np.ones((8, 64), np.float16))
    writer.add_tensor("output_norm.weight", np.ones(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _shape(path: Path) -> ModelShape:
    return model_shape(read_header(path))


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(length=st.integers(1, 40))
def test_the_files_size_is_exact_although_llama_cpp_adds_keys(tmp_path: Path, length: int) -> None:
    source, out = _write(tmp_path / "source.gguf", name="n" * length), tmp_path / "out.gguf"
    types = {"token_embd.weight": "q8_0", "output_norm.weight": "f32"}
    quantize(source, out, types, threads=1)
    assert file_bytes(_shape(source), types) == out.stat().st_size
    assert file_bytes(_shape(out), types) == out.stat().st_size  # nothing is added the second time


@pytest.mark.parametrize(
    ("pattern", "windows"),
    [
        (None, [512] * 5 + [None]),
        (3, [512, 512, None] * 2),
        (0, [512] * 6),
        ([True, False, False, True, False, True], [512, None, None, 512, None, 512]),
    ],
)
def test_windows_of_gemma(tmp_path: Path, pattern: Any, windows: list[int | None]) -> None:
    extra = {} if pattern is None else {"attention__sliding_window_pattern": pattern}
    path = _write(tmp_path / "m.gguf", "gemma3", block_count=6, attention__sliding_window=512, **extra)
    assert [layer.window for layer in _shape(path).layers] == windows


def test_a_window_that_llama_cpp_ignores_is_ignored(tmp_path: Path) -> None:
    path = _write(tmp_path / "m.gguf", "llama", attention__sliding_window=16)
    assert [layer.window for layer in _shape(path).layers] == [None, None]


def test_kv_heads_may_differ_by_layer(tmp_path: Path) -> None:
    path = _write(tmp_path / "m.gguf", attention__head_count_kv=[1, 4])
    assert [layer.key_width for layer in _shape(path).layers] == [16, 64]


@pytest.mark.parametrize(
    ("arch", "changes", "message"),
    [
        ("llama", {"block_count": 0}, "0 layers"),
        ("llama", {"block_count": 2**31}, "2147483648 layers"),
        (
            "gemma3",
            {"attention__sliding_window": 16, "attention__sliding_window_pattern": [True]},
            "1 flags of sliding windows for 2 layers",
        ),
    ],
)
def test_damaged_headers_are_refused_before_anything_is_allocated(
    tmp_path: Path, arch: str, changes: dict[str, Any], message: str
) -> None:
    header = read_header(_write(tmp_path / "m.gguf", arch, **changes))
    with pytest.raises(SourceError, match=message):
        model_shape(header)
    if "block_count" in changes:
        with pytest.raises(SourceError, match=message):
            describe_artifact(header)
