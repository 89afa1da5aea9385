from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeq.converters.gguf.smoke import kl_divergence, smoke_check
from edgeq.errors import ConversionError


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()), np.float32)


@given(st.integers(0, 2**32 - 1))
def test_kl_divergence_is_torchs(seed: int) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(seed)
    p, q = (_log_softmax(rng.normal(scale=3, size=500)) for _ in range(2))
    oracle = torch.nn.functional.kl_div(torch.tensor(q), torch.tensor(p), log_target=True, reduction="sum")
    assert kl_divergence(p, q) == pytest.approx(float(oracle), rel=1e-4)
    assert kl_divergence(p, p) == pytest.approx(0, abs=1e-9)


def test_a_model_equals_itself(smollm2_gguf: Path) -> None:
    check = smoke_check(smollm2_gguf, smollm2_gguf, is_float=True, threads=1)
    assert check.mean_kld == pytest.approx(0, abs=1e-6)
    assert check.top1_agreement == 1.0
    assert check.tokens > 64


def test_a_ruined_model_is_refused(smollm2_gguf: Path, tmp_path: Path) -> None:
    from edgeq.converters.gguf.header import read_header

    header = read_header(smollm2_gguf)
    ruined = bytearray(smollm2_gguf.read_bytes())
    first = header.tensors["blk.10.attn_q.weight"]
    last = header.tensors["blk.20.attn_q.weight"]
    # Rotate ten layers by one quantization block: valid numbers, in the wrong places.
    region = ruined[first.offset : last.offset]
    ruined[first.offset : last.offset] = region[20 * 577 :] + region[: 20 * 577]
    (tmp_path / "ruined.gguf").write_bytes(ruined)
    with pytest.raises(ConversionError, match=r"does not behave like its source|NaN"):
        smoke_check(smollm2_gguf, tmp_path / "ruined.gguf", is_float=False, threads=1)
