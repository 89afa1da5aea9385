from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeq.types import BUDGET_LINES, Budget, from_json, merge_budgets, to_json

_LIMITS = st.one_of(st.none(), st.floats(0.001, 1e9))
_BUDGETS = st.builds(
    Budget,
    peak_memory_bytes=st.one_of(st.none(), st.integers(1, 2**40)),
    load_ms=_LIMITS,
    ttft_ms=_LIMITS,
    itl_ms=_LIMITS,
    tokens_per_s=_LIMITS,
    latency_ms=_LIMITS,
    power_w=_LIMITS,
)


@given(_BUDGETS)
def test_json_is_an_exact_inverse(budget: Budget) -> None:
    assert from_json(to_json(budget), Budget) == budget


@given(_BUDGETS, _BUDGETS)
def test_merging_keeps_every_override(base: Budget, override: Budget) -> None:
    merged = merge_budgets(base, override)
    for line in BUDGET_LINES:
        wanted = override.limit(line) if override.limit(line) is not None else base.limit(line)
        assert merged.limit(line) == wanted


def test_every_budget_field_is_a_line() -> None:
    assert {line.field for line in BUDGET_LINES} == set(Budget.__struct_fields__)


def test_a_misspelt_limit_is_an_error() -> None:
    with pytest.raises(msgspec.ValidationError, match="peak_memory"):
        from_json(b'{"peak_memory": 1}', Budget)
