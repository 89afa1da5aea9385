"""Prices of types against quantizing whole matrices at once, and what stays on disk when a run is cut short."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from edgeq.converters.gguf.assemble import read_tensor
from edgeq.converters.gguf.header import GgufHeader
from edgeq.converters.gguf.sensitivity import matrix as matrix_module
from edgeq.converters.gguf.sensitivity import table
from edgeq.converters.gguf.sensitivity.curvature import Curvature, Curvatures
from edgeq.converters.gguf.sensitivity.matrix import Matrix
from edgeq.converters.gguf.sensitivity.table import weight_errors
from edgeq.disk_cache import DiskCache
from edgeq.errors import ConversionError
from edgeq.ggml_blocks import dequantize

Menu = Mapping[str, Sequence[str]]
Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Q, V, EMBEDDING = "blk.0.attn_q.weight", "blk.1.attn_v.weight", "token_embd.weight"


class _Run:
    """`weight_errors` with a cache of its own, and which tensors it had to work on."""

    def __init__(self, folder: Path, header: GgufHeader, curvatures: Curvatures) -> None:
        self.cache = DiskCache(folder)
        self.header, self.curvatures = header, curvatures
        self.importance = {name: c.columns + np.float32(0.01) for name, c in curvatures.by_tensor.items()}
        self.priced: list[str] = []

    def __call__(
        self, menu: Menu, *, stop_after: int | None = None, threads: int = 1, weights_key: str = "w", **changes: Any
    ) -> dict[str, dict[str, float]]:
        self.priced = []

        def progress(done: int, total: int, name: str) -> None:
            assert 0 < done <= total
            self.priced.append(name)
            if len(self.priced) == stop_after:
                raise KeyboardInterrupt

        return weight_errors(
            self.header,
            menu,
            dataclasses.replace(self.curvatures, **changes),
            self.importance,
            cache=self.cache,
            weights_key=weights_key,
            threads=threads,
            progress=progress,
        )


@pytest.fixture
def run(tmp_path: Path, wide: GgufHeader, made_up: Curvatures) -> _Run:
    return _Run(tmp_path, wide, made_up)


def _truth(run: _Run, name: str, kind: str) -> float:
    """The quadratic form written out, in float64, over blocks that were made in one go, and not again."""
    curvature, header = run.curvatures.by_tensor[name], run.header
    n_columns = header.tensors[name].shape[0]
    weights = dequantize(read_tensor(header, name), "f16", n_columns)
    made = Matrix.of(header, name, curvature, run.importance[name]).blocks(kind, refined=False)
    errors = (dequantize(made, kind, n_columns) - weights).astype(np.float64)
    columns = curvature.column_matrix().astype(np.float64)
    return 0.5 * float(curvature.rows @ np.einsum("ij,jk,ik->i", errors, columns, errors))


def test_a_price_is_the_curvature_of_blocks_of_ggml(run: _Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix_module, "CHUNK_WEIGHTS", 100 * 256)  # several parts, none a divisor of the rows
    menu = {Q: ("q4_0", "q4_k", "iq3_s"), EMBEDDING: ("q5_1", "q6_k"), "blk.0.ffn_down.weight": ("q8_0", "f16")}
    found = run(menu)
    for name, kinds in menu.items():
        assert tuple(found[name]) == kinds
        for kind in kinds:
            assert found[name][kind] == pytest.approx(_truth(run, name, kind), rel=0.02), (name, kind)
    assert found["blk.0.ffn_down.weight"]["f16"] == 0.0


def test_more_bits_cost_less(run: _Run, menu: Menu) -> None:
    for prices in run(menu).values():
        assert prices["f16"] == 0.0
        assert 0 < prices["q8_0"] < prices["q4_k"] < prices["iq3_s"]
        assert prices["q8_0"] < prices["q4_0"]


@pytest.mark.parametrize("kind", ["iq3_s", "q4_0"])
def test_some_rows_stand_for_all_where_a_matrix_is_large(kind: str, run: _Run, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = run({EMBEDDING: (kind,)})[EMBEDDING][kind]
    monkeypatch.setattr(table, "_PRICED_WEIGHTS", 40 * 256)
    monkeypatch.setattr(table, "_PRICED_WEIGHTS_SLOW", 40 * 256)
    monkeypatch.setattr(table, "CHUNK_WEIGHTS", 7 * 256)
    seen: list[int] = []
    quantize = Matrix.quantize

    def watched(self: Matrix, weights: Floats, kind: str) -> Bytes:
        seen.append(len(weights))
        return quantize(self, weights, kind)

    monkeypatch.setattr(Matrix, "quantize", watched)
    sampled = run({EMBEDDING: (kind,)}, key="another")[EMBEDDING][kind]
    assert max(seen) == 7
    assert sum(seen) <= 44
    assert sampled == pytest.approx(exact, rel=0.15)


@pytest.mark.parametrize("n_used", [0, 1, 3])
def test_the_few_rows_of_an_embedding_that_count_are_not_missed(
    n_used: int, run: _Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "_PRICED_WEIGHTS_SLOW", 8 * 256)
    rows = np.zeros(320, np.float32)
    rows[[7, 100, 319][:n_used]] = [1.0, 2.0, 3.0][:n_used]
    flat = Curvature(rows, np.ones(256, np.float32), {})
    run.curvatures = Curvatures({EMBEDDING: flat}, "fisher", 1, "few rows")
    found = run({EMBEDDING: ("iq3_s", "iq2_s")})[EMBEDDING]
    for kind in ("iq3_s", "iq2_s"):
        assert found[kind] == pytest.approx(_truth(run, EMBEDDING, kind), rel=1e-4)
        assert (found[kind] > 0) == (n_used > 0)


@pytest.mark.parametrize("n_rows", [1, 2, 3, 320])
def test_very_wide_or_very_few_rows_are_priced_too(n_rows: int, run: _Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer weights may be priced than one row has, and a matrix may have one row."""
    monkeypatch.setattr(table, "_PRICED_WEIGHTS", 100)
    header = run.header
    tensor = dataclasses.replace(header.tensors[EMBEDDING], shape=(256, n_rows))
    run.header = dataclasses.replace(header, tensors={**header.tensors, EMBEDDING: tensor})
    flat = Curvature(np.ones(n_rows, np.float32), np.ones(256, np.float32), {})
    run.curvatures = Curvatures({EMBEDDING: flat}, "fisher", 1, f"{n_rows} rows")
    found = run({EMBEDDING: ("q4_0",)})[EMBEDDING]["q4_0"]
    assert found == pytest.approx(_truth(run, EMBEDDING, "q4_0"), rel=0.3)


def test_the_second_run_reads_the_same_numbers(run: _Run, menu: Menu) -> None:
    first = run(menu)
    assert sorted(run.priced) == sorted(menu)
    assert run(menu) == first
    assert run.priced == []
    # A further type is priced alone, and a smaller menu gives less.
    calls = run({Q: ("q4_0", "q5_0")})
    assert run.priced == [Q]
    assert calls[Q]["q4_0"] == first[Q]["q4_0"]
    assert run({V: ("q8_0",)}) == {V: {"q8_0": first[V]["q8_0"]}}
    assert run.priced == []


def test_other_weights_and_other_curvatures_are_not_mixed_up(run: _Run) -> None:
    menu = {Q: ("q4_0",)}
    run(menu)
    run(menu, weights_key="other")
    assert run.priced == [Q]
    run(menu, key="other")
    assert run.priced == [Q]
    run(menu)
    assert run.priced == []


def test_threads_change_nothing(run: _Run, menu: Menu, tmp_path: Path) -> None:
    small = dict.fromkeys(menu, ("q4_0", "q8_0"))
    one = run(small)
    run.cache = DiskCache(tmp_path / "other")
    assert run(small, threads=3) == one


def test_a_damaged_entry_is_made_again(run: _Run, menu: Menu) -> None:
    small = dict.fromkeys(menu, ("q4_0",))
    first = run(small)
    file = sorted(run.cache.folder.iterdir())[3]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes(data)
    assert run(small) == first
    assert len(run.priced) == 1
    assert run(small) == first
    assert run.priced == []


def test_an_interrupted_run_goes_on_where_it_was(run: _Run, menu: Menu, tmp_path: Path) -> None:
    small = dict.fromkeys(menu, ("q4_0", "iq3_s"))
    with pytest.raises(KeyboardInterrupt):
        run(small, stop_after=4)
    finished = set(run.priced)
    assert len(finished) == 4
    found = run(small)
    assert finished.isdisjoint(run.priced)
    assert finished | set(run.priced) == set(small)
    run.cache = DiskCache(tmp_path / "other")
    assert run(small) == found


def test_what_fails_in_a_thread_is_raised_and_the_rest_is_kept(run: _Run, monkeypatch: pytest.MonkeyPatch) -> None:
    of: Callable[..., Matrix] = Matrix.of

    def fail(header: GgufHeader, name: str, *rest: Any) -> Matrix:
        if name == V:
            raise ConversionError("broken", "fix it")
        return of(header, name, *rest)

    monkeypatch.setattr(Matrix, "of", fail)
    with pytest.raises(ConversionError, match="broken"):
        run({EMBEDDING: ("q4_0",), V: ("q4_0",)})
    monkeypatch.undo()
    run({EMBEDDING: ("q4_0",), V: ("q4_0",)})
    assert run.priced == [V]


@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_price_that_is_no_number_is_never_kept(run: _Run) -> None:
    rows = np.full(320, np.inf, np.float32)
    run.curvatures = Curvatures({EMBEDDING: Curvature(rows, np.zeros(256, np.float32), {})}, "fisher", 1, "broken")
    for _ in range(2):
        assert not np.isfinite(run({EMBEDDING: ("q4_0",)})[EMBEDDING]["q4_0"])
        assert run.priced == [EMBEDDING]
