"""KL divergence over streamed logits, against float64 on whole rows by numpy and torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeq.converters.gguf.divergence import Divergence, Judge, _Rows, compare
from edgeq.converters.gguf.header import read_header
from edgeq.errors import ConversionError, SessionError, UsageError
from edgeq.llama import Context, Model

LENGTHS = (70, 33, 1, 2)
Logits = npt.NDArray[np.float64]


def _chunks(lengths: tuple[int, ...] = LENGTHS, n_vocab: int = 320) -> list[npt.NDArray[np.int32]]:
    rng = np.random.default_rng(5)
    return [rng.integers(0, n_vocab, n).astype(np.int32) for n in lengths]


def _log_probabilities(path: Path, chunk: npt.NDArray[np.int32], rows: int = 32) -> Logits:
    """In batches of ``rows``: llama.cpp's kernels depend on their size, and with them the last digits."""
    with (
        Model.load(path, use_mmap=True) as model,
        Context(model, context_tokens=128, batch_tokens=rows, threads=1, max_outputs=rows) as context,
    ):
        parts = []
        for start in range(0, len(chunk), rows):
            context.decode(chunk[start : start + rows], start, logits="all")
            parts.append(context.all_logits().astype(np.float64))
    logits = np.concatenate(parts)
    logits -= logits.max(axis=1, keepdims=True)
    return np.asarray(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))


def _expected(reference: Path, candidate: Path, chunks: list[npt.NDArray[np.int32]]) -> dict[str, list[Any]]:
    figures: dict[str, list[Any]] = {"kld": [], "same_top": [], "nll_reference": [], "nll_candidate": [], "chunk": []}
    for index, chunk in enumerate(chunks):
        p, q = _log_probabilities(reference, chunk), _log_probabilities(candidate, chunk)
        figures["kld"] += (np.exp(p) * (p - q)).sum(axis=1).tolist()
        figures["same_top"] += (p.argmax(axis=1) == q.argmax(axis=1)).tolist()
        places = (np.arange(len(chunk) - 1), chunk[1:])
        figures["nll_reference"] += (-p[places]).tolist()
        figures["nll_candidate"] += (-q[places]).tolist()
        figures["chunk"] += [index] * len(chunk)
    return figures


@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-3, 1e-2, 0.1, 1.0, 30.0]), st.sampled_from([0.1, 3.0, 30.0]))
def test_rows_are_float64s(seed: int, difference: float, spread: float) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(seed)
    p = rng.normal(7, spread, 20_000).astype(np.float32)
    q = (p + 3 + rng.normal(scale=difference, size=p.shape)).astype(np.float32)
    log_p, log_q = (torch.log_softmax(torch.tensor(x, dtype=torch.float64), 0) for x in (p, q))
    oracle = float(torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="sum"))
    found = _Rows(len(p)).compare(p, q, 123)
    assert found is not None
    assert found[0] == pytest.approx(oracle, rel=1e-5, abs=1e-7)
    assert found[1:] == pytest.approx((-float(log_p[123]), -float(log_q[123])), rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_a_row_that_is_not_finite_is_seen(bad: float, which: int) -> None:
    rows = [np.linspace(0, 200, 1000, dtype=np.float32) for _ in range(2)]
    assert _Rows(1000).compare(rows[0], rows[1], 1) is not None
    rows[which][3] = bad  # where its probability is nothing, too
    assert _Rows(1000).compare(rows[0], rows[1], None) is None


def test_positions_are_numpys(tiny_gguf: Any) -> None:
    reference, candidate = tiny_gguf(), tiny_gguf(noise=0.1)
    chunks = _chunks()
    (found,) = compare(reference, [candidate], chunks, threads=1, rows_at_once=32)
    expected = _expected(reference, candidate, chunks)
    np.testing.assert_allclose(found.kld, expected["kld"], rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(found.same_top, expected["same_top"])
    np.testing.assert_array_equal(found.chunk, expected["chunk"])
    np.testing.assert_allclose(found.nll_reference, expected["nll_reference"], rtol=1e-6)
    np.testing.assert_allclose(found.nll_candidate, expected["nll_candidate"], rtol=1e-6)
    assert found.nll_chunk.tolist() == [i for i, n in enumerate(LENGTHS) for _ in range(n - 1)]
    assert found.mean_kld > 1e-3, "the two models differ"
    assert not found.same_top.all()


def test_neither_threads_nor_company_matter(tiny_gguf: Any) -> None:
    reference, near, far = tiny_gguf(), tiny_gguf(noise=0.05), tiny_gguf(noise=0.5)
    chunks = _chunks()
    alone = [compare(reference, [path], chunks, threads=1)[0] for path in (near, far)]
    for threads in (1, 2, 3):
        together = compare(reference, [near, far], chunks, threads=threads)
        for a, b in zip(alone, together, strict=True):
            np.testing.assert_array_equal(a.kld, b.kld)
            np.testing.assert_array_equal(a.nll_candidate, b.nll_candidate)
    assert alone[0].mean_kld < alone[1].mean_kld


@pytest.mark.parametrize("rows", [1, 7, 500])
def test_rows_at_once_change_rounding_only(tiny_gguf: Any, rows: int) -> None:
    reference, candidate = tiny_gguf(), tiny_gguf(noise=0.1)
    (usual,) = compare(reference, [candidate], _chunks(), threads=1)
    (found,) = compare(reference, [candidate], _chunks(), threads=1, rows_at_once=rows)
    np.testing.assert_allclose(found.kld, usual.kld, rtol=0.05)
    assert found.mean_kld == pytest.approx(usual.mean_kld, rel=1e-3)


def test_a_judge_is_used_again_and_again(tiny_gguf: Any) -> None:
    reference, candidate = tiny_gguf(), tiny_gguf(noise=0.1)
    seen: list[tuple[int, int, str]] = []
    with Judge(reference, _chunks(), threads=1) as judge:
        first, again = (judge.compare([candidate])[0] for _ in range(2))
        (itself,) = judge.compare([reference], progress=lambda *report: seen.append(report))
        floor = judge.noise_floor(n_chunks=2)
    np.testing.assert_array_equal(first.kld, again.kld)
    np.testing.assert_allclose(itself.kld, 0, atol=1e-7)
    assert itself.same_top.all()
    assert len(floor.kld) == sum(LENGTHS[:2])
    assert abs(floor.mean_kld) < 1e-4 < first.mean_kld
    assert [report[:2] for report in seen][-1] == (judge.n_positions, judge.n_positions) == (sum(LENGTHS),) * 2


def test_the_candidates_cache_is_judged_too(tiny_hf: Callable[..., Path]) -> None:
    """Heads of 32 values or more, which a quantized cache needs."""
    reference = tiny_hf("llama-tied", width=256).with_suffix(".gguf")
    chunks = [np.random.default_rng(i).integers(2, 320, 60).astype(np.int32) for i in range(3)]
    with Judge(reference, chunks, threads=1) as judge:
        found = {kind: judge.compare([reference], kv_type=kind)[0].mean_kld for kind in ("f16", "q8_0", "q4_0")}
    assert found["f16"] == pytest.approx(0, abs=1e-7)
    assert found["q4_0"] > 4 * found["q8_0"] > 0


def test_an_interrupted_judge_can_go_on(tiny_gguf: Any) -> None:
    reference, candidate = tiny_gguf(), tiny_gguf(noise=0.1)

    def stop(_done: int, _total: int, _what: str) -> None:
        raise KeyboardInterrupt

    with Judge(reference, _chunks(), threads=2, rows_at_once=8) as judge:
        (before,) = judge.compare([candidate])
        with pytest.raises(KeyboardInterrupt):
            judge.compare([candidate], progress=stop)
        (after,) = judge.compare([candidate])
    np.testing.assert_array_equal(before.kld, after.kld)


def test_another_vocabulary_is_refused(tiny_gguf: Any) -> None:
    with Judge(tiny_gguf(), _chunks(), threads=1) as judge:
        with pytest.raises(ConversionError, match=r"has 330 tokens and .* has 320"):
            judge.compare([tiny_gguf(vocab_size=330)])
        with pytest.raises(ConversionError, match="is not the same in"):
            judge.compare([tiny_gguf(corpus=("zebras quietly juggle xylophones, vexing my aunt",))])


def test_logits_that_are_not_finite_are_refused(tiny_gguf: Any, tmp_path: Path) -> None:
    reference = tiny_gguf()
    broken = bytearray(reference.read_bytes())
    tensor = read_header(reference).tensors["output_norm.weight"]
    broken[tensor.offset : tensor.offset + 4] = np.float32("nan").tobytes()
    (tmp_path / "broken.gguf").write_bytes(broken)
    with Judge(reference, _chunks(), threads=2) as judge:
        with pytest.raises(ConversionError, match=r"broken.gguf or its reference gives logits that are NaN"):
            judge.compare([tiny_gguf(noise=0.1), tmp_path / "broken.gguf"])
        assert judge.compare([tiny_gguf(noise=0.1)])[0].mean_kld > 0, "the judge is still of use"


def test_what_cannot_be_compared_is_refused(tiny_gguf: Any, tmp_path: Path) -> None:
    for chunks in ([], [np.empty(0, np.int32)]):
        with pytest.raises(UsageError, match="no text"):
            Judge(tiny_gguf(), chunks)
    with pytest.raises(SessionError, match="does not exist"):
        compare(tiny_gguf(), [tmp_path / "none.gguf"], _chunks(), threads=1)
    with pytest.raises(UsageError, match="320 is not a token"):
        compare(tiny_gguf(), [tiny_gguf()], [np.array([1, 320], np.int32)], threads=1)


def test_a_model_without_a_vocabulary_is_refused(
    no_vocabulary_gguf: Path, tiny_gguf: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks = _chunks(n_vocab=64)
    with pytest.raises(SessionError, match=r"nameless\.gguf holds no vocabulary"):
        Judge(no_vocabulary_gguf, chunks, threads=1)
    with Judge(tiny_gguf(), chunks, threads=1) as judge:
        with pytest.raises(ConversionError, match="has 64 tokens"):
            judge.compare([no_vocabulary_gguf])
        monkeypatch.setattr(judge._model, "n_vocab", 64)  # as if both were of one size
        with pytest.raises(SessionError, match=r"nameless\.gguf holds no vocabulary"):
            judge.compare([no_vocabulary_gguf])


def test_the_real_model(smollm2_gguf: Path) -> None:
    torch = pytest.importorskip("torch")
    with Model.load(smollm2_gguf, vocab_only=True) as model:
        text = "The arm moves to the shelf, waits for the camera, and picks the smallest of the three boxes."
        chunk = np.array(model.tokenize(text, add_special=True, parse_special=False), np.int32)
    with Judge(smollm2_gguf, [chunk], threads=1, rows_at_once=8) as judge:
        (itself,) = judge.compare([smollm2_gguf])
    log_p = torch.tensor(_log_probabilities(smollm2_gguf, chunk, rows=8))
    oracle = torch.nn.functional.nll_loss(log_p[:-1], torch.tensor(chunk[1:], dtype=torch.long))
    assert isinstance(itself, Divergence)
    np.testing.assert_allclose(itself.kld, 0, atol=1e-7)
    assert float(itself.nll_reference.mean()) == pytest.approx(float(oracle), rel=1e-5)
    np.testing.assert_array_equal(itself.nll_reference, itself.nll_candidate)
