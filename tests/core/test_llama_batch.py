"""Several sequences at once give what each gives alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgeq.errors import SessionError, UsageError
from edgeq.llama import Context, Model
from edgeq.llama_batch import ParallelContext

PAST = np.array([[10, 20, 30, 40], [500, 600, 700, 800], [11, 21, 31, 41]])


def test_sequences_are_what_they_are_alone(smollm2_gguf: Path) -> None:
    with Model.load(smollm2_gguf) as model, Context(model, context_tokens=64, threads=1) as alone:
        expected = []
        for row in PAST:
            alone.clear()
            alone.decode(row, 0, logits="last")
            expected.append(alone.logits().copy())
        with ParallelContext(model, n_sequences=3, sequence_tokens=16, threads=1) as context:
            wanted = np.array([True, False, True])
            for step in range(4):
                assert context.step(PAST[:, step], np.full(3, step), wanted)
            found = context.logits().copy()
            assert found.shape == (2, model.n_vocab)
            # A sequence that begins anew beside others that go on.
            context.forget(1)
            for step in range(4):
                context.step(np.array([1, PAST[1, step], 2]), np.array([4 + step, step, 4 + step]), np.ones(3, bool))
            anew = context.logits()[1].copy()
    for row, oracle in zip([*found, anew], [expected[0], expected[2], expected[1]], strict=True):
        np.testing.assert_allclose(row, oracle, atol=0.15)
        assert int(row.argmax()) == int(oracle.argmax())


def test_what_llama_cpp_would_die_of_is_refused(smollm2_gguf: Path) -> None:
    with Model.load(smollm2_gguf) as model:
        for count in (0, 257):
            with pytest.raises(UsageError, match="sequences make no sense"):
                ParallelContext(model, n_sequences=count, sequence_tokens=16)
        with ParallelContext(model, n_sequences=2, sequence_tokens=16, threads=1) as context:
            ones = np.ones(2, bool)
            with pytest.raises(UsageError, match="49152 is not a token"):
                context.step(np.array([1, 49152]), np.zeros(2, int), ones)
            with pytest.raises(SessionError, match="position 16 leaves"):
                context.step(np.array([1, 2]), np.array([0, 16]), ones)
            assert context.logits().shape == (0, model.n_vocab)
            context.interrupt()
            assert not context.step(np.array([1, 2]), np.zeros(2, int), ones)
    with Model.load(smollm2_gguf, vocab_only=True) as model, pytest.raises(SessionError, match="vocab_only"):
        ParallelContext(model, n_sequences=2, sequence_tokens=16)
