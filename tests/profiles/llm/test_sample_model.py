from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from edgeq.converters.gguf.header import read_header
from edgeq.converters.gguf.shape import model_shape
from edgeq.llama import Context, Model
from edgeq.profiles.llm.model_memory import kv_cache_bytes
from edgeq.profiles.llm.sample_model import SampleModel, sample_types, write_sample_model

MODEL = SampleModel(layers=3, width=128, feed_forward=192, heads=4, kv_heads=2, vocabulary=300)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sample") / "model.gguf"
    write_sample_model(MODEL, path)
    return path


def test_gguf_reads_what_was_written(path: Path) -> None:
    reader = gguf.GGUFReader(path)
    assert {t.name: tuple(int(n) for n in t.shape) for t in reader.tensors} == MODEL.tensors()
    assert {t.name: t.tensor_type.name.lower() for t in reader.tensors} == sample_types(MODEL)
    assert reader.get_field("llama.block_count").contents() == 3  # type: ignore[union-attr]
    assert len(reader.get_field("tokenizer.ggml.tokens").contents()) == 300  # type: ignore[union-attr]


def test_the_cost_model_sees_the_same_shape(path: Path) -> None:
    found, told = model_shape(read_header(path)), MODEL.shape()
    assert (found.tensors, found.layers, found.n_vocab) == (told.tensors, told.layers, told.n_vocab)
    assert (found.key_head_width, found.feed_forward_width) == (told.key_head_width, told.feed_forward_width)
    assert found.tied_embedding


def test_llama_cpp_runs_it_and_its_vocabulary_knows_every_byte(path: Path) -> None:
    with Model.load(path) as model, Context(model, context_tokens=256, threads=1) as context:
        text = bytes(range(32, 127)).decode() + "\n"
        ids = model.tokenize(text, add_special=False, parse_special=False)
        assert b"".join(model.token_bytes(token) for token in ids) == text.encode()
        assert context.decode(ids[:8], 0, logits="last")
        assert np.isfinite(context.logits()).all()
        assert np.std(context.logits()) > 0
        # llama.cpp tells two decimals of a MiB
        expected = kv_cache_bytes(MODEL.shape(), 256, "f16", "f16", 512)
        assert context.buffer_bytes["kv"] == pytest.approx(expected, abs=2**20 / 100)
