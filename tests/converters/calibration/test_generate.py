from __future__ import annotations

import hashlib
import threading
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from edgeq import llama_workers
from edgeq.converters.calibration import generate
from edgeq.converters.calibration.generate import self_text
from edgeq.converters.calibration.texts import TokenText
from edgeq.converters.gguf.header import read_header
from edgeq.errors import ConversionError, SessionError, UsageError
from edgeq.llama import Context, Model

TINY_CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def _tokens(text: TokenText) -> list[list[int]]:
    return [chunk.tolist() for chunk in text.chunks]


def _write(model: Path, *, seed: int = 0, threads: int = 1, n_tokens: int = 600) -> TokenText:
    return self_text(model, n_tokens=n_tokens, chunk_tokens=64, seed=seed, threads=threads)


def test_seed_and_file_decide_and_threads_do_not(tiny_gguf: Any) -> None:
    model = tiny_gguf(chat_template=TINY_CHAT)
    first, other = _write(model), _write(model, seed=1)
    for threads in (2, 3, 4):
        again = _write(model, threads=threads)
        assert _tokens(first) == _tokens(again)
        assert first.text_sha256 == again.text_sha256 != other.text_sha256
    assert _tokens(first) != _tokens(other)
    data = b"".join(chunk.astype("<i4").tobytes() for chunk in first.chunks)
    assert first.text_sha256 == hashlib.sha256(data).hexdigest()
    assert (first.source, first.seed, first.warnings) == ("self", 0, ())


@pytest.mark.parametrize(("threads", "shares"), [(1, [[1, 1]]), (2, [[1], [1]]), (3, [[2], [1]]), (4, [[2], [2]])])
def test_no_more_threads_compute_than_were_asked_for(
    threads: int, shares: list[list[int]], tiny_gguf: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Python's thread that ran it, the threads of each context: those of one thread take turns."""
    seen: dict[int, list[int]] = {}
    run = generate._Writer.run

    def spy(writer: generate._Writer) -> None:
        seen.setdefault(threading.get_ident(), []).append(writer.context.threads)
        barrier.wait()  # a thread that ended would give its number to the next one
        run(writer)

    barrier = threading.Barrier(len(shares))
    monkeypatch.setattr(generate._Writer, "run", spy)
    _write(tiny_gguf(), threads=threads)
    assert sorted(seen.values(), reverse=True) == shares


def test_sizes_are_kept(tiny_gguf: Any) -> None:
    found = _write(tiny_gguf(chat_template=TINY_CHAT), n_tokens=1000)
    lengths = [len(chunk) for chunk in found.chunks]
    assert sum(lengths) == found.n_tokens
    assert 1000 - 64 <= found.n_tokens <= 1000
    assert 8 <= min(lengths) <= max(lengths) <= 64
    assert {chunk.dtype for chunk in found.chunks} == {np.dtype(np.int32)}


def test_half_of_it_is_chats_with_both_turns(tiny_gguf: Any) -> None:
    path = tiny_gguf(chat_template=TINY_CHAT)
    found = _write(path, n_tokens=4000)
    with Model.load(path, vocab_only=True) as model:
        user = model.tokenize("<|im_start|>user\n", add_special=True, parse_special=True)
        turn = model.tokenize("<|im_end|>\n<|im_start|>assistant\n", add_special=False, parse_special=True)
        end = model.eos
    chats = [chunk for chunk in _tokens(found) if chunk[: len(user)] == user]
    others = [chunk for chunk in _tokens(found) if chunk[: len(user)] != user]
    share = sum(map(len, chats)) / found.n_tokens
    assert 0.4 < share < 0.6
    assert {chunk[0] for chunk in others} == {user[0]}, "all others continue BOS"
    for chat in chats:
        places = [i for i in range(len(chat)) if chat[i : i + len(turn)] == turn]
        if len(chat) < 64 // 4 + len(user) + len(turn):
            continue  # the last ones were not finished
        assert places, "the assistant's header is in every chat"
        assert places[0] <= 64 // 4 + len(user)
        assert end not in chat[places[0] + len(turn) : -1], "the answer's end is the document's"


def test_tokens_are_drawn_as_the_model_says(tiny_gguf: Any) -> None:
    """The first token after BOS against the model's distribution: a chi-squared test over the common tokens."""
    path = tiny_gguf()
    found = _write(path, n_tokens=40_000)
    firsts = np.array([chunk[1] for chunk in found.chunks])
    with Model.load(path) as model, Context(model, context_tokens=64, threads=1) as context:
        assert model.bos is not None
        context.decode([model.bos], 0, logits="last")
        logits = context.logits().astype(np.float64)
    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()
    expected = probabilities * len(firsts)
    common = expected >= 5
    counts = np.bincount(firsts, minlength=len(expected))
    # Everything that is rare counts as one token.
    observed = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum())
    statistic = ((observed - wanted) ** 2 / wanted).sum()
    degrees = len(observed) - 1
    assert degrees >= 5
    assert statistic < degrees + 5 * np.sqrt(2 * degrees)


def test_sampling_inverts_the_distribution() -> None:
    writer = object.__new__(generate._Writer)
    logits = np.log(np.array([0.5, 1e-30, 0.3, 0.2], np.float32)) + 3
    writer._scratch = (np.empty(4, np.float32), np.empty(4, np.float64))
    draws = [0.0, 0.499, 0.501, 0.799, 0.801, 1 - 2**-53]
    assert [writer._sample(logits, draw) for draw in draws] == [0, 0, 2, 2, 3, 3]


def test_a_model_without_a_template_continues_bos(tiny_gguf: Any) -> None:
    path = tiny_gguf()
    found = _write(path)
    with Model.load(path, vocab_only=True) as model:
        assert {chunk[0] for chunk in _tokens(found)} == {model.bos}
    assert found.warnings == ()


def test_an_unknown_template_is_warned_of(tiny_gguf: Any) -> None:
    found = _write(tiny_gguf(chat_template="{{ messages[0]['content'] }}??"))
    assert ["does not know the model's chat template" in warning for warning in found.warnings] == [True]


def _log_probabilities(context: Context, ids: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
    context.clear()
    context.decode(ids, 0, logits="all")
    logits = context.all_logits().astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    return np.asarray(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))


def test_sequences_do_not_see_each_other(tiny_gguf: Any) -> None:
    """Tokens are as surprising under their own document alone as the model says, and more so in another order."""
    path = tiny_gguf()  # without a template, so that no token is put in
    found = _write(path, n_tokens=6000)
    surprise: list[float] = []
    entropy: list[float] = []
    shuffled: list[float] = []
    rng = np.random.default_rng(0)
    with Model.load(path) as model, Context(model, context_tokens=64, threads=1, max_outputs=64) as context:
        for chunk in found.chunks[:40]:
            log_p = _log_probabilities(context, chunk)
            places = np.arange(len(chunk) - 1)
            surprise.extend((-log_p[places, chunk[1:]]).tolist())
            entropy.extend(-(np.exp(log_p) * log_p).sum(axis=1)[:-1])
            mixed = np.append(chunk[:1], rng.permutation(chunk[1:]))
            shuffled.extend((-_log_probabilities(context, mixed)[places, mixed[1:]]).tolist())
    assert len(surprise) > 1000
    error = np.std(surprise) / np.sqrt(len(surprise))
    assert abs(np.mean(surprise) - np.mean(entropy)) < 5 * error
    assert np.mean(shuffled) - np.mean(entropy) > 20 * error


def test_sizes_that_make_no_sense_are_refused(tiny_gguf: Any) -> None:
    for n_tokens, chunk_tokens in ((10, 64), (100, 8)):
        with pytest.raises(UsageError, match="too few"):
            self_text(tiny_gguf(), n_tokens=n_tokens, chunk_tokens=chunk_tokens)
    with pytest.raises(SessionError, match="does not exist"):
        self_text(Path("none.gguf"), n_tokens=100, chunk_tokens=64)


def test_a_broken_model_is_refused(tiny_gguf: Any, tmp_path: Path) -> None:
    model = tiny_gguf()
    broken = bytearray(model.read_bytes())
    tensor = read_header(model).tensors["output_norm.weight"]
    broken[tensor.offset : tensor.offset + 4] = np.float32("nan").tobytes()
    (tmp_path / "broken.gguf").write_bytes(broken)
    with pytest.raises(ConversionError, match=r"broken.gguf gives logits that are NaN"):
        _write(tmp_path / "broken.gguf")


def test_a_model_that_only_ends_texts_is_given_up(tiny_gguf: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Model, "is_eog", lambda _self, _token: True)
    with pytest.raises(ConversionError, match="ends its texts before they begin"):
        _write(tiny_gguf())


def test_an_interrupt_ends_it(tiny_gguf: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_workers, "_POLL_S", 0.001)

    def stop(_done: int, _total: int, _what: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        self_text(tiny_gguf(), n_tokens=10**6, chunk_tokens=256, threads=2, progress=stop)


def test_the_real_model_writes_its_turns(smollm2_gguf: Path) -> None:
    found = self_text(smollm2_gguf, n_tokens=64, chunk_tokens=32, threads=1)
    with Model.load(smollm2_gguf, vocab_only=True) as model:
        texts = [
            b"".join(model.token_bytes(t, special=True) for t in ids).decode("utf-8", "replace")
            for ids in _tokens(found)
        ]
    assert found.warnings == ()
    assert 48 <= found.n_tokens <= 64
    assert all(text.startswith("<|im_start|>") for text in texts)
