"""Curvature from real measurements: what is probed is what is predicted, by construction, and nothing stays behind."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeq.converters.gguf.assemble import assemble, read_tensor
from edgeq.converters.gguf.divergence import Judge
from edgeq.converters.gguf.grams import correlation
from edgeq.converters.gguf.header import GgufHeader, read_header
from edgeq.converters.gguf.observe import observe_inputs
from edgeq.converters.gguf.quantize import quantizable_tensors
from edgeq.converters.gguf.sensitivity import probes
from edgeq.converters.gguf.sensitivity.curvature import Curvature
from edgeq.converters.gguf.sensitivity.matrix import Matrix
from edgeq.converters.gguf.sensitivity.probes import _scale_and_noise, groups_of, probed_curvatures
from edgeq.disk_cache import DiskCache

Chunks = list[npt.NDArray[np.int32]]
Floats = npt.NDArray[np.float32]
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


def _inputs(header: GgufHeader, *, correlated: bool = False) -> dict[str, Curvature]:
    return {name: _input(header, name, columns, correlated) for name, columns in _importance(header).items()}


def _input(header: GgufHeader, name: str, columns: Floats, correlated: bool) -> Curvature:
    n_columns, n_rows = header.tensors[name].shape
    base = np.random.default_rng(len(name)).standard_normal((n_columns, n_columns // 4)).astype(np.float32)
    found = correlation(base @ base.T) if correlated else None
    return Curvature(np.ones(n_rows, np.float32), columns, {}, found)


def _probed(
    header: GgufHeader,
    inputs: dict[str, Curvature],
    work: Path,
    *,
    progress: Callable[[int, int, str], None] = lambda *_: None,
) -> dict[str, Curvature]:
    cache = DiskCache(work.parent / "cache")
    return probed_curvatures(header, inputs, CHUNKS, cache=cache, key="k", work=work, threads=1, progress=progress)


def _kld(header: GgufHeader, changed: dict[str, Matrix], kind: str, work: Path) -> float:
    """The true mean KL of some matrices in a type, with weights rounded as ggml rounds them on its own."""
    out = work / "changed.gguf"
    types = {name: kind if name in changed else tensor.type for name, tensor in header.tensors.items()}
    assemble(header, types, lambda n, k: changed[n].blocks(k) if n in changed else read_tensor(header, n), out)
    with Judge(header.path, CHUNKS, threads=1) as judge:
        kld = judge.compare([out])[0].mean_kld
    out.unlink()
    return kld


@pytest.fixture
def work(tmp_path: Path) -> Path:
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


@pytest.mark.parametrize("correlated", [False, True])
@pytest.mark.parametrize("case", ["llama-tied", "llama-untied"])
def test_the_probes_themselves_are_predicted_exactly(
    case: str, correlated: bool, tiny_hf: Callable[..., Path], work: Path
) -> None:
    header = read_header(tiny_hf(case, width=256 if case == "llama-tied" else 64).with_suffix(".gguf"))
    inputs = _inputs(header, correlated=correlated)
    found = _probed(header, inputs, work)
    assert list(work.iterdir()) == []
    assert found.keys() == inputs.keys()
    for group in groups_of(list(inputs))[:4]:
        for name in group:
            curvature = found[name]
            assert curvature.correlation is None or curvature.correlation is inputs[name].correlation
            assert (curvature.rows > 0).all()
            assert np.array_equal(curvature.columns, inputs[name].columns)
            assert curvature.activation_kld.keys() == ({32, 256} if case == "llama-tied" else {32})
            assert all(value >= 0 for value in curvature.activation_kld.values())
        matrices = {name: Matrix.of(header, name, found[name], None) for name in group}
        weights, rounding = {}, {}
        for kind in ("q4_0", "q8_0"):
            parts = [(m, start, rows) for m in matrices.values() for start, rows in m.parts()]
            weights[kind] = sum(
                m.curvature.weight_kld(m.errors(rows, kind), start, m.column_matrix) for m, start, rows in parts
            )
            rounding[kind] = sum(m.curvature.activation_kld[32] for m in matrices.values())
        coarse, fine = (_kld(header, matrices, kind, work) for kind in ("q4_0", "q8_0"))
        assert weights["q4_0"] + rounding["q4_0"] == pytest.approx(coarse, rel=1e-4)
        assert weights["q8_0"] + rounding["q8_0"] == pytest.approx(max(fine, weights["q8_0"]), rel=1e-3)


def test_errors_are_made_up_for_where_that_really_helps(tiny_hf: Callable[..., Path], work: Path) -> None:
    header = read_header(tiny_hf("llama-tied", width=256).with_suffix(".gguf"))
    text = [np.random.default_rng(9).integers(0, 320, 200).astype(np.int32)]
    true = observe_inputs(header.path, text, threads=1, correlations=True)
    inputs = {
        name: dataclasses.replace(c, columns=w, correlation=true.correlations[name])
        for name, c in _inputs(header).items()
        if (w := true.matrix.weights(name)) is not None
    }
    found = _probed(header, inputs, work)
    used = set()
    for group in groups_of(list(inputs))[:6]:
        both = [
            {name: Matrix.of(header, name, c, None) for name, c in of.items()}
            for of in (
                {name: inputs[name] for name in group},
                {name: dataclasses.replace(inputs[name], correlation=None) for name in group},
            )
        ]
        with_them, without = (_kld(header, matrices, "q4_0", work) for matrices in both)
        assert {found[name].correlation is not None for name in group} == {with_them < without}
        used.add(with_them < without)
    assert True in used


@given(
    scale=st.floats(1e-6, 1e3),
    noise=st.floats(0, 1),
    coarse=st.floats(1e-3, 1e3),
    share=st.floats(0.0, 0.9),
)
def test_scale_and_noise_are_the_line_through_both_measurements(
    scale: float, noise: float, coarse: float, share: float
) -> None:
    fine = share * coarse
    found = _scale_and_noise(coarse, scale * coarse + noise, fine, scale * fine + noise)
    assert found == pytest.approx((scale, noise), rel=1e-6, abs=1e-6 * (scale * coarse + noise))


@pytest.mark.parametrize(
    ("measured", "expected"),
    [((0.0, 0.1, 0.0, 0.2), (0.0, 0.2)), ((2.0, 1.0, 1.0, 3.0), (0.5, 2.5)), ((2.0, 8.0, 1.0, 1.0), (4.0, 0.0))],
    ids=["no error", "8 bits cost more", "less noise than nothing"],
)
def test_what_no_line_explains_is_never_negative(
    measured: tuple[float, float, float, float], expected: tuple[float, float]
) -> None:
    assert _scale_and_noise(*measured) == expected


def test_a_matrix_without_effect_costs_nothing(tiny_hf: Callable[..., Path], tmp_path: Path) -> None:
    """A first layer whose values are zero, so that what its keys and queries say does not matter."""
    header = read_header(tiny_hf("llama-tied").with_suffix(".gguf"))
    data = bytearray(header.path.read_bytes())
    for layer in range(2):
        value = header.tensors[f"blk.{layer}.attn_v.weight"]
        data[value.offset : value.offset + (value.nbytes or 0)] = bytes(value.nbytes or 0)
    (tmp_path / "silent.gguf").write_bytes(data)
    header = read_header(tmp_path / "silent.gguf")
    inputs = {n: c for n, c in _inputs(header).items() if "attn_v" in n or "attn_q" in n}
    (tmp_path / "work").mkdir()
    for curvature in _probed(header, inputs, tmp_path / "work").values():
        assert (curvature.rows >= 0).all()
        assert curvature.rows.max() < 1e-6
        assert all(0 <= value < 1e-6 for value in curvature.activation_kld.values())


def test_only_the_beginning_of_the_text_is_read(
    tiny_hf: Callable[..., Path], work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = read_header(tiny_hf("llama-tied").with_suffix(".gguf"))
    read: list[int] = []

    class Watched(Judge):
        def __init__(self, reference: Path, chunks: Chunks, *, threads: int | None = None) -> None:
            super().__init__(reference, chunks, threads=threads)
            read.append(self.n_positions)

    monkeypatch.setattr(probes, "Judge", Watched)
    monkeypatch.setattr(probes, "_PROBE_TOKENS", 70)
    _probed(header, {name: c for name, c in _inputs(header).items() if name == "blk.0.ffn_up.weight"}, work)
    assert read == [80]


def test_an_interrupt_leaves_no_probe_and_what_was_probed_is_kept(tiny_hf: Callable[..., Path], work: Path) -> None:
    header = read_header(tiny_hf("llama-tied").with_suffix(".gguf"))
    inputs = _inputs(header)
    seen: list[str] = []

    def stop(done: int, _total: int, detail: str) -> None:
        if done == 2:
            raise KeyboardInterrupt
        seen.append(detail)

    with pytest.raises(KeyboardInterrupt):
        _probed(header, inputs, work, progress=stop)
    assert list(work.iterdir()) == []
    finished, seen = seen, []
    resumed = _probed(header, inputs, work, progress=lambda _done, _total, detail: seen.append(detail))
    assert len(finished) == 2
    assert finished + seen == [group[0] for group in groups_of(list(inputs))]
    (work / "another").mkdir()
    fresh = _probed(header, inputs, work / "another")
    assert {n: c.activation_kld for n, c in fresh.items()} == {n: c.activation_kld for n, c in resumed.items()}
    assert all(np.array_equal(fresh[name].rows, resumed[name].rows) for name in fresh)
