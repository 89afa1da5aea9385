"""Tokenizers made on the spot: trained, saved as Hugging Face folders, and carried by GGUFs without weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter
from tokenizers import Tokenizer, trainers

from edgeq.converters.gguf.tokenizer import NASTY_TEXT, TokenizerSpec, read_tokenizer, write_tokenizer

CORPUS = [
    *NASTY_TEXT.splitlines(keepends=True),
    "It's the model's words that we'll count, and they've more than one. Don't stop, I'm here, you'd go, we're off!\n",
    "for (int i = 0; i < 100; ++i) {\n    sum += a[i] * b[i];\n}\n\n\treturn sum;\r\n",
    "Das Straßenfest in Köln war übervoll, ça va très bien, el niño comió piñas, русские слова и ещё слова.\n",
    "今日は天気がいいですね。你好世界 안녕하세요 세계 नमस्ते दुनिया สวัสดีชาวโลก שלום עולם مرحبا 🙂🙃👍\n",
    "1 22 333 4444 55555 666666 2024-01-31 12:34:56 3.14 1,000 x^2 + y^2 = z^2; a != b && c || d\n",
] * 8


def vocabulary_gguf(folder: Path, out: Path, *, n_vocab: int) -> TokenizerSpec:
    """A GGUF of a folder's tokenizer and nothing else, and what went into it."""
    spec = read_tokenizer(folder, n_vocab=n_vocab, architecture="llama")
    writer = GGUFWriter(str(out), "llama")
    write_tokenizer(writer, spec)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return spec


@pytest.fixture(scope="session")
def make_vocabulary_gguf() -> Callable[..., TokenizerSpec]:
    """``make_vocabulary_gguf(folder, out, n_vocab=...)``: a GGUF with only that tokenizer."""
    return vocabulary_gguf


@pytest.fixture(scope="session")
def train_byte_level() -> Callable[..., int]:
    """``train_byte_level(folder, pre_tokenizer, ...)``: save a small byte-level BPE there; its number of tokens."""

    def train(
        folder: Path,
        pre_tokenizer: Mapping[str, Any],
        *,
        ignore_merges: bool = False,
        vocab_size: int = 700,
        special: Sequence[str] = ("<|end|>", "<|start|>"),
        config: Mapping[str, Any] | None = None,
        changes: Mapping[str, Any] | None = None,
    ) -> int:
        document: dict[str, Any] = {
            "version": "1.0",
            "added_tokens": [],
            "normalizer": None,
            "pre_tokenizer": pre_tokenizer,
            "post_processor": None,
            "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            "model": {"type": "BPE", "vocab": {}, "merges": [], "ignore_merges": ignore_merges},
        }
        tokenizer = Tokenizer.from_str(json.dumps(document))
        alphabet = [chr(c) for c in (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x144))]
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(CORPUS, trainer)
        folder.mkdir(parents=True, exist_ok=True)
        saved = json.loads(tokenizer.to_str())
        saved |= changes or {}
        (folder / "tokenizer.json").write_text(json.dumps(saved), encoding="utf-8")
        settings = {"eos_token": special[0], **(config or {})} if special else config or {}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        return tokenizer.get_vocab_size()

    return train
