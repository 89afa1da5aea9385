from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeq.errors import UsageError
from edgeq.units import (
    format_bytes,
    format_ms,
    format_quantity,
    parse_bandwidth,
    parse_bytes,
    parse_flops,
    parse_ms,
    parse_rate,
    parse_watts,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("400MiB", 400 * 2**20), ("1.5 GB", 1_500_000_000), ("64kib", 65536), ("1e3MB", 10**9), ("7b", 7)],
)
def test_bytes(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(("text", "expected"), [("60ms", 60.0), ("0.5s", 500.0), ("2min", 120_000.0), ("10us", 0.01)])
def test_durations(text: str, expected: float) -> None:
    assert parse_ms(text) == pytest.approx(expected)


def test_rates_are_the_only_quantity_without_a_unit() -> None:
    assert parse_rate("20") == parse_rate("20tok/s") == parse_rate("20 t/s") == 20.0
    assert parse_bandwidth("102.4GB/s") == pytest.approx(102.4e9)
    assert parse_flops("5TFLOP/s") == pytest.approx(5e12)
    assert parse_watts("15W") == 15.0


@pytest.mark.parametrize(
    "text", ["400", "MiB", "", "400 parsecs", "-1MiB", "0MiB", "nanMiB", "1e999GB", "4 00MiB", "1e9999MB"]
)
def test_nonsense_is_refused_with_a_remedy(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_bytes(text)
    assert caught.value.exit_code == 2
    assert caught.value.remedy
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("400Mb", ["'Mb' means megabits", "write MB"]),
        ("400 Kb", ["'Kb' means kilobits", "write KB"]),
        ("1Tb", ["terabits", "write TB"]),
        ("1Gib", ["gibibits", "write GiB"]),
    ],
)
def test_bits_are_no_bytes(text: str, words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        parse_bytes(text)
    assert all(word in str(caught.value) for word in words), caught.value
    with pytest.raises(UsageError, match="bits"):
        parse_bandwidth(f"{text}/s")


@pytest.mark.parametrize("text", ["1gb", "1GB", "1gB", "1000mb", "1e6kB", "1e6KB"])
def test_letters_may_be_large_or_small_where_nothing_else_is_meant(text: str) -> None:
    assert parse_bytes(text) == 10**9
    assert parse_bandwidth(f"{text}/S") == 1e9


def test_megawatts_are_no_milliwatts() -> None:
    assert parse_watts("500mW") == parse_watts("500mw") == 0.5
    for text in ("15MW", "15 Mw"):
        with pytest.raises(UsageError, match=r"means megawatts\. .*write W or mW"):
            parse_watts(text)


@given(st.integers(1, 2**50))
def test_whole_bytes_survive(n_bytes: int) -> None:
    assert parse_bytes(f"{n_bytes}B") == n_bytes


@given(st.integers(1, 2**44))
def test_formatted_bytes_are_close(n_bytes: int) -> None:
    shown = parse_bytes(format_bytes(n_bytes).replace(" ", ""))
    assert shown == pytest.approx(n_bytes, rel=0.006)


@given(st.floats(1e-6, 1e6))
def test_formatted_durations_are_close(value: float) -> None:
    assert parse_ms(format_ms(value).replace(" ", "")) == pytest.approx(value, rel=0.05, abs=min(0.005, value / 10))


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [(0.0001, "ms", "0.0001 ms"), (0.04, "ms", "0.04 ms"), (0.0, "ms", "0.00 ms"), (0.004, "tok/s", "0.004 tok/s")],
)
def test_small_amounts_keep_their_digits(value: float, unit: str, shown: str) -> None:
    assert format_quantity(value, unit) == shown
