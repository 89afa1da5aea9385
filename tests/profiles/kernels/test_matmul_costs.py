from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeq.errors import UsageError
from edgeq.probe_points import MatmulPoint
from edgeq.profiles.kernels.matmul_costs import matmul_ns


def _point(
    columns: int, rows: int, batch: int, flops_per_s: float, kind: str = "q8_0", threads: int = 2
) -> MatmulPoint:
    return MatmulPoint(
        type=kind,
        columns=columns,
        rows=rows,
        batch=batch,
        threads=threads,
        flops_per_s=flops_per_s,
        spread=0.0,
        n=9,
        buffer="CPU",
    )


POINTS = (
    _point(512, 256, 16, 40e9),
    _point(512, 256, 128, 80e9),
    _point(512, 4096, 16, 50e9),
    _point(512, 4096, 128, 100e9),
    _point(2048, 4096, 128, 120e9),
)


@pytest.mark.parametrize("point", POINTS)
def test_a_measured_point_is_its_own_prediction(point: MatmulPoint) -> None:
    found = matmul_ns(POINTS, "Q8_0", (point.columns, point.rows), batch=point.batch, threads=2)
    assert found == pytest.approx(point.ns)


def test_between_points_and_beyond_them() -> None:
    def flops(columns: int, rows: int, batch: int) -> float:
        ns = matmul_ns(POINTS, "q8_0", (columns, rows), batch=batch, threads=2)
        return 2 * columns * rows * batch / ns

    # 576 is nearer to 512; in the logarithm 1024 rows lie halfway between 256 and 4096, and times add, not speeds.
    assert flops(576, 1024, 128) == pytest.approx(1 / ((1 / 80 + 1 / 100) / 2))
    assert flops(512, 64, 128) == pytest.approx(80)
    assert flops(512, 1 << 17, 512) == pytest.approx(100)
    assert flops(4096, 64, 128) == pytest.approx(120)
    assert 50 < flops(512, 4096, 64) < 100


@given(
    columns=st.integers(1, 1 << 14), rows=st.integers(1, 1 << 17), batch=st.integers(1, 2048), more=st.integers(2, 16)
)
def test_more_work_never_takes_less_time(columns: int, rows: int, batch: int, more: int) -> None:
    def ns(rows: int, batch: int) -> float:
        return matmul_ns(POINTS, "q8_0", (columns, rows), batch=batch, threads=2)

    assert ns(rows * more, batch) > ns(rows, batch)
    assert ns(rows, batch * more) > ns(rows, batch)


@pytest.mark.parametrize(("kind", "threads"), [("q4_0", 2), ("q8_0", 4)])
def test_what_was_not_measured_is_not_guessed(kind: str, threads: int) -> None:
    with pytest.raises(UsageError, match=f"{kind} were not measured on {threads} threads"):
        matmul_ns(POINTS, kind, (512, 512), batch=128, threads=threads)
