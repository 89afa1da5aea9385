"""Products of matrices are measured on this machine: what every processor shows, as ratios."""

from __future__ import annotations

import pytest

from edgeq.errors import UsageError
from edgeq.probe_points import MatmulPoint
from edgeq.profiles.kernels import probe_matmul
from edgeq.profiles.kernels.probe_matmul import measure_matmul
from edgeq.types import from_json, to_json


def test_every_legal_product_is_measured() -> None:
    told: list[tuple[int, int]] = []
    found = measure_matmul(
        ((288, 64), (256, 128)),
        threads=1,
        types=("f32", "q8_0", "q4_k"),
        batches=(2, 32),
        progress=lambda done, total, _: told.append((done, total)),
        budget_s=0.5,
    )
    assert {(p.type, p.columns, p.rows, p.batch) for p in found} == {
        (name, *shape, batch)
        for name, shape in [
            ("f32", (288, 64)),
            ("f32", (256, 128)),
            ("q8_0", (288, 64)),
            ("q8_0", (256, 128)),
            ("q4_k", (256, 128)),
        ]
        for batch in (2, 32)
    }
    assert told[0] == (0, 10)
    assert told[-1] == (10, 10)
    assert told == sorted(told)
    assert all(p.n >= 3 and p.threads == 1 and p.buffer for p in found)
    assert from_json(to_json(found), tuple[MatmulPoint, ...]) == found


def test_a_batch_is_faster_than_its_vectors_one_by_one() -> None:
    one, many = measure_matmul(((1024, 2048),), threads=1, types=("f32",), batches=(1, 64), budget_s=1)
    assert many.flops_per_s > one.flops_per_s
    assert 1 < many.ns / one.ns < 64


def test_a_cut_matrix_has_the_time_of_a_whole_one() -> None:
    size = (1024, 16384)
    assert size[0] * size[1] > probe_matmul._MOST_WEIGHTS
    part, whole = (
        measure_matmul((shape,), threads=1, types=("q4_0",), batches=(16,), budget_s=0.5)[0]
        for shape in ((1024, 4096), size)
    )
    assert (whole.columns, whole.rows) == size
    assert 2 < whole.ns / part.ns < 8  # four times the rows


def test_little_memory_means_more_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_matmul, "free_bytes", lambda: 1)
    found = measure_matmul(((64, 64),), threads=1, types=("f32", "q8_0"), batches=(4,), budget_s=0)
    assert [p.type for p in found] == ["f32", "q8_0"]


def test_nonsense_is_refused() -> None:
    with pytest.raises(UsageError, match="not a tensor type"):
        measure_matmul(((64, 64),), threads=1, types=("q9",))
    with pytest.raises(UsageError, match="threads"):
        measure_matmul(((64, 64),), threads=0, types=("f32",))
