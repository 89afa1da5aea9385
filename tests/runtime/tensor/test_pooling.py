"""Against sentence-transformers' own module."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgeq.runtime.tensor.pooling import Pooling, normalized, pool

torch = pytest.importorskip("torch")
st = pytest.importorskip("sentence_transformers")


@pytest.mark.parametrize(("ours", "theirs"), [("mean", "mean"), ("cls", "cls"), ("max", "max"), ("last", "lasttoken")])
@pytest.mark.parametrize("side", ["left", "right"])
def test_as_sentence_transformers_does(ours: Pooling, theirs: Any, side: str) -> None:
    from sentence_transformers.sentence_transformer.modules import Pooling as Theirs

    rng = np.random.default_rng(3)
    hidden = rng.standard_normal((5, 7, 16), np.float32) - 2
    lengths = [1, 3, 7, 5, 2]
    mask = np.array([[1] * n + [0] * (7 - n) for n in lengths], np.int64)
    if side == "left":
        mask = np.ascontiguousarray(mask[:, ::-1])
    module: Any = Theirs(16, pooling_mode=theirs)
    features = {"token_embeddings": torch.from_numpy(hidden), "attention_mask": torch.from_numpy(mask)}
    wanted = module(features)["sentence_embedding"].numpy()
    result = pool(hidden, mask, ours)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, wanted, rtol=1e-5, atol=1e-6)


def test_normalized() -> None:
    vectors = np.array([[3, 4], [0, 0], [1e-20, 0]], np.float32)
    wanted = torch.nn.functional.normalize(torch.from_numpy(vectors)).numpy()
    np.testing.assert_allclose(normalized(vectors), wanted)
    assert normalized(vectors).dtype == np.float32
