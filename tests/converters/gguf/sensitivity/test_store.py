from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from edgeq.converters.calibration.texts import TokenText
from edgeq.converters.gguf.assemble import read_tensor
from edgeq.converters.gguf.header import GgufHeader
from edgeq.converters.gguf.sensitivity.curvature import Curvatures
from edgeq.converters.gguf.sensitivity.evidence import Evidence
from edgeq.converters.gguf.sensitivity.matrix import Matrix
from edgeq.converters.gguf.sensitivity.store import BlockStore
from edgeq.ggml_types import tensor_bytes

Q, K, NORM = "blk.0.attn_q.weight", "blk.0.attn_k.weight", "output_norm.weight"


@pytest.fixture
def evidence(wide: GgufHeader, made_up: Curvatures) -> Evidence:
    importance = {name: c.columns + np.float32(0.01) for name, c in made_up.by_tensor.items()}
    text = TokenText((), "", "file", "", None, 0)
    return Evidence(wide, text, made_up, importance, "fisher", {}, ())


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What was really quantized."""
    calls: list[tuple[str, str]] = []
    blocks = Matrix.blocks

    def watched(self: Matrix, kind: str) -> npt.NDArray[np.uint8]:
        calls.append((self.name, kind))
        return blocks(self, kind)

    monkeypatch.setattr(Matrix, "blocks", watched)
    return calls


def _whole(evidence: Evidence, name: str, kind: str) -> npt.NDArray[np.uint8]:
    matrix = Matrix.of(evidence.header, name, evidence.curvatures.by_tensor[name], evidence.importance[name])
    return matrix.blocks(kind)


def test_each_tensor_and_type_is_made_once(evidence: Evidence, made: list[tuple[str, str]]) -> None:
    store = BlockStore(evidence)
    mix = {name: tensor.type for name, tensor in evidence.header.tensors.items()} | {Q: "q4_0", K: "q8_0"}
    store.prepare(mix, threads=2)
    assert sorted(made) == [(K, "q8_0"), (Q, "q4_0")]
    found = store.blocks(Q, "q4_0")
    store.prepare(mix | {Q: "q5_1"}, threads=1)
    assert store.blocks(Q, "q4_0") is found
    assert made[2:] == [(Q, "q5_1")]
    assert np.array_equal(found, _whole(evidence, Q, "q4_0"))
    assert np.array_equal(store.blocks(NORM, "f32"), read_tensor(evidence.header, NORM))


def test_what_is_kept_has_a_limit(evidence: Evidence, made: list[tuple[str, str]]) -> None:
    size = {name: tensor_bytes("q4_0", evidence.header.tensors[name].shape) for name in (Q, K)}
    store = BlockStore(evidence, limit_bytes=size[Q] + size[K] - 1)
    store.blocks(Q, "q4_0")
    store.blocks(K, "q4_0")
    store.blocks(K, "q4_0")
    assert made == [(Q, "q4_0"), (K, "q4_0")]
    store.blocks(Q, "q4_0")
    assert made[2:] == [(Q, "q4_0")], "it made room for the other"


def test_no_more_is_prepared_than_can_be_kept(evidence: Evidence, made: list[tuple[str, str]]) -> None:
    """Or each tensor of a large model would be made twice, and all of them would lie in memory at once."""
    size = {name: tensor_bytes("q4_0", evidence.header.tensors[name].shape) for name in (Q, K)}
    store = BlockStore(evidence, limit_bytes=size[Q] + size[K])
    mix = {Q: "q4_0", K: "q4_0", "blk.0.attn_v.weight": "q4_0", "blk.0.ffn_up.weight": "q4_0"}
    store.prepare(mix, threads=2)
    assert sorted(made) == [(K, "q4_0"), (Q, "q4_0")]
    for name in mix:
        store.blocks(name, "q4_0")
    assert sorted(made) == sorted((name, "q4_0") for name in mix)


def test_a_matrix_larger_than_the_limit_is_made_all_the_same(evidence: Evidence) -> None:
    store = BlockStore(evidence, limit_bytes=1)
    store.prepare({Q: "q4_0"}, threads=1)
    assert np.array_equal(store.blocks(Q, "q4_0"), _whole(evidence, Q, "q4_0"))
