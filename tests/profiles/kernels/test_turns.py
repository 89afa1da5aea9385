"""Who takes turns with whom, and how often."""

from __future__ import annotations

import itertools
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeq.profiles.kernels.turns import groups_that_fit, rounds


@given(st.lists(st.integers(0, 50)), st.integers(0, 100))
def test_groups_are_neighbours_that_fit(sizes: list[int], limit: int) -> None:
    groups = groups_that_fit(enumerate(sizes), limit)
    assert [item for group in groups for item in group] == list(range(len(sizes)))
    for group in groups:
        assert len(group) == 1 or sum(sizes[item] for item in group) <= limit
    for group, after in itertools.pairwise(groups):
        assert sum(sizes[item] for item in group) + sizes[after[0]] > limit


def test_rounds_end_with_the_time_or_the_most(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)

    def done(fewest: int, most: int, end_s: float) -> list[int]:
        nonlocal now
        now = 100.0
        found = []
        for turn in rounds(fewest, most, end_s):
            found.append(turn)
            now += 2.0
        return found

    assert done(3, 15, 0.0) == [0, 1, 2]
    assert done(3, 15, 110.0) == [0, 1, 2, 3, 4]  # a sixth would end at 112
    assert done(3, 15, 111.9) == [0, 1, 2, 3, 4]
    assert done(3, 4, 1000.0) == [0, 1, 2, 3]
