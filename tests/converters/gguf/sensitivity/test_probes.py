"""Curvature from real measurements: what is probed is what is predicted, by construction, and nothing stays behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeq.converters.gguf.assemble import assemble, read_tensor
from edgeq.converters.gguf.divergence import Judge
from edgeq.converters.gguf.header import GgufHeader, read_header
from edgeq.converters.gguf.quantize import quantizable_tensors
from edgeq.converters.gguf.sensitivity import probes
from edgeq.converters.gguf.sensitivity.curvature import Curvature
from edgeq.converters.gguf.sensitivity.matrix import Matrix
from edgeq.converters.gguf.sensitivity.probes import groups_of, probed_curvatures

Chunks = list[npt.NDArray[np.int32]]
CHUNKS: Chunks = [np.random.default_rng(i).integers(0, 320, 40).astype(np.int32) for i in range(4)]
ROLES = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]


@given(n_layers=st.integers(0, 70), roles=st.lists(st.sampled_from(ROLES), unique=True), seed=st.randoms())
def test_groups_are_one_role_in_one_part_of_the_depth(n_layers: int, roles: list[str], seed: object) -> None:
    names = [f"blk.{i}.{role}.weight" for i in range(n_layers) for role in roles]
    alone = ["token_embd.weight", "output.weight"]
    groups = groups_of([*alone, *names])
    assert sorted(name for group in groups for name in group) == sorted([*alone, *names])
    assert groups[:2] == [("token_embd.weight",), ("output.weight",)]
    for group in groups[2:]:
        assert len({name.split(".", 2)[2] for name in group}) == 1
        layers = [int(name.split(".")[1]) for name in group]
        assert layers == list(range(layers[0], layers[-1] + 1)), "layers of a group are neighbours"
    of_a_role = [len(g) for g in groups[2:] if roles and g[0].endswith(f"{roles[0]}.weight")]
    assert len(of_a_role) == (min(4, n_layers) if roles else 0)
    assert not of_a_role or max(of_a_role) - min(of_a_role) <= 1


def _importance(header: GgufHeader) -> dict[str, npt.NDArray[np.float32]]:
    rng = np.random.default_rng(2)
    names = [name for name in header.tensors if name in quantizable_tensors(header.path)]
    return {name: rng.gamma(1.0, size=header.tensors[name].shape[0]).astype(np.float32) for name in names}


def _probed(header: GgufHeader, importance: dict[str, npt.NDArray[np.float32]], work: Path) -> dict[str, Curvature]:
    return probed_curvatures(
        header, list(importance), importance, CHUNKS, work=work, threads=1, progress=lambda *_: None
    )


def _kld(header: GgufHeader, changed: dict[str, Matrix], kind: str, work: Path) -> float:
    """The true mean KL of some matrices in a type, with weights rounded as ggml rounds them on its own."""
    out = work / "changed.gguf"
    types = {name: kind if name in changed else tensor.type for name, tensor in header.tensors.items()}
    assemble(header, types, lambda n, k: changed[n].blocks(k) if n in changed else read_tensor(header, n), out)
    with Judge(header.path, CHUNKS, threads=1) as judge:
        kld = judge.compare([out])[0].mean_kld
    out.unlink()
    return kld


@pytest.mark.parametrize("case", ["llama-tied", "llama-untied"])
def test_the_probes_themselves_are_predicted_exactly(case: str, tiny_hf: Callable[..., Path], tmp_path: Path) -> None:
    header = read_header(tiny_hf(case, width=256 if case == "llama-tied" else 64).with_suffix(".gguf"))
    importance = _importance(header)
    found = _probed(header, importance, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert found.keys() == importance.keys()
    for group in groups_of(list(importance))[:4]:
        for name in group:
            curvature = found[name]
            assert curvature.correlation is None
            assert (curvature.rows > 0).all()
            assert np.array_equal(curvature.columns, importance[name])
            assert curvature.activation_kld.keys() == ({32, 256} if case == "llama-tied" else {32})
            assert all(value >= 0 for value in curvature.activation_kld.values())
        matrices = {name: Matrix.of(header, name, found[name], None) for name in group}
        weights, rounding = {}, {}
        for kind in ("q4_0", "q8_0"):
            parts = [(m, start, rows) for m in matrices.values() for start, rows in m.parts()]
            weights[kind] = sum(m.curvature.weight_kld(m.errors(rows, kind), start) for m, start, rows in parts)
            rounding[kind] = sum(m.curvature.activation_kld[32] for m in matrices.values())
        assert weights["q4_0"] == pytest.approx(_kld(header, matrices, "q4_0", tmp_path), rel=1e-4)
        fine = _kld(header, matrices, "q8_0", tmp_path)
        assert weights["q8_0"] + rounding["q8_0"] == pytest.approx(max(fine, weights["q8_0"]), rel=1e-3)


def test_a_matrix_without_effect_costs_nothing(tiny_hf: Callable[..., Path], tmp_path: Path) -> None:
    """A first layer whose values are zero, so that what its keys and queries say does not matter."""
    header = read_header(tiny_hf("llama-tied").with_suffix(".gguf"))
    data = bytearray(header.path.read_bytes())
    for layer in range(2):
        value = header.tensors[f"blk.{layer}.attn_v.weight"]
        data[value.offset : value.offset + (value.nbytes or 0)] = bytes(value.nbytes or 0)
    (tmp_path / "silent.gguf").write_bytes(data)
    header = read_header(tmp_path / "silent.gguf")
    importance = {n: w for n, w in _importance(header).items() if "attn_v" in n or "attn_q" in n}
    (tmp_path / "work").mkdir()
    for curvature in _probed(header, importance, tmp_path / "work").values():
        assert (curvature.rows >= 0).all()
        assert curvature.rows.max() < 1e-6
        assert all(0 <= value < 1e-6 for value in curvature.activation_kld.values())


def test_only_the_beginning_of_the_text_is_read(
    tiny_hf: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = read_header(tiny_hf("llama-tied").with_suffix(".gguf"))
    read: list[int] = []

    class Watched(Judge):
        def __init__(self, reference: Path, chunks: Chunks, *, threads: int | None = None) -> None:
            super().__init__(reference, chunks, threads=threads)
            read.append(self.n_positions)

    monkeypatch.setattr(probes, "Judge", Watched)
    monkeypatch.setattr(probes, "_PROBE_TOKENS", 70)
    importance = {"blk.0.ffn_up.weight": np.ones(64, np.float32)}
    _probed(header, importance, tmp_path)
    assert read == [80]


def test_an_interrupt_leaves_no_probe(tiny_hf: Callable[..., Path], tmp_path: Path) -> None:
    header = read_header(tiny_hf("llama-tied").with_suffix(".gguf"))

    def stop(done: int, _total: int, _detail: str) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        importance = _importance(header)
        probed_curvatures(header, list(importance), importance, CHUNKS, work=tmp_path, threads=1, progress=stop)
    assert list(tmp_path.iterdir()) == []
