"""Observers against numpy, scipy, onnxruntime's calibrator and an exhaustive search on the full data."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from edgeq.converters.onnx.calibration.histogram import NotFiniteError
from edgeq.converters.onnx.calibration.observers import (
    METHODS,
    ChannelObserver,
    HistogramObserver,
    Method,
    MinMaxObserver,
    Observer,
    make_observer,
)
from edgeq.converters.onnx.calibration.ranges import Range
from edgeq.converters.onnx.calibration.thresholds import kept_bins
from edgeq.errors import ConversionError, UsageError

Floats = NDArray[np.floating[Any]]

data = arrays.arrays(np.float32, st.integers(2, 50), elements=st.floats(-1e6, 1e6, width=32))


def samples(kind: str, size: int = 30_000) -> NDArray[np.float32]:
    """Numbers as activations are distributed."""
    rng = np.random.default_rng(7)
    normal = rng.standard_normal(size)
    wide = 2 * normal
    values = {
        "normal": normal,
        "laplace": rng.laplace(size=size) * 4,
        "relu": np.maximum(normal, 0),
        "gelu": 0.5 * wide * (1 + np.tanh(0.8 * (wide + 0.045 * wide**3))),
        "relu6": np.clip(4 * normal, 0, 6),
        "outliers": np.where(rng.random(size) < 3e-4, 1400.0, 1.0) * normal,
        "shifted": 5 + 0.1 * normal,
        "far": 10 + normal,
        "uniform": rng.uniform(2, 3, size),
        "gates": 1 + 1 / (1 + np.exp(-normal)),
        "spike": np.where(rng.random(size) < 0.02, rng.uniform(5, 6, size), 6.0),
        "negative": -rng.uniform(2, 3, size),
    }
    chosen: NDArray[np.float32] = values[kind].astype(np.float32)
    return chosen


KINDS = ("normal", "laplace", "relu", "gelu", "relu6", "outliers", "shifted")
AWAY_FROM_ZERO = ("shifted", "far", "uniform", "gates", "spike", "negative")


def observed(method: Method, values: Floats, **more: Any) -> Range:
    observer = make_observer(method, **more)
    for part in np.array_split(values, 3):
        observer.update(part)
    return observer.range()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9, 99.99])
@pytest.mark.parametrize("kind", KINDS)
def test_percentiles_are_numpys(kind: str, percentile: float, symmetric: bool) -> None:
    values = samples(kind)
    found = observed("percentile", values, percentile=percentile, symmetric=symmetric)
    if symmetric:
        limit = np.percentile(np.abs(values).astype(np.float64), percentile)
        assert found.high == pytest.approx(limit, rel=1e-3)
        assert found.low == -found.high
    else:
        tail = (100 - percentile) / 2
        expected = np.percentile(values.astype(np.float64), [tail, 100 - tail])
        assert [found.low, found.high] == pytest.approx(expected, rel=1e-3, abs=1e-5)


@given(data, st.booleans())
def test_the_hundredth_percentile_is_the_whole_range(values: Floats, symmetric: bool) -> None:
    whole = observed("minmax", values, symmetric=symmetric)
    assert observed("percentile", values, percentile=100, symmetric=symmetric) == whole


@given(data, st.lists(st.floats(1, 100), min_size=2, max_size=5), st.booleans())
def test_a_higher_percentile_never_clips_more(values: Floats, percentiles: list[float], symmetric: bool) -> None:
    ranges = [observed("percentile", values, percentile=p, symmetric=symmetric) for p in sorted(percentiles)]
    for inner, outer in itertools.pairwise(ranges):
        assert outer.low <= inner.low
        assert inner.high <= outer.high


@given(data, st.sampled_from(METHODS), st.booleans())
@settings(max_examples=60)
def test_ranges_stay_inside_what_was_seen(values: Floats, method: Method, symmetric: bool) -> None:
    found = observed(method, values, symmetric=symmetric)
    seen = Range(float(values.min()), float(values.max()))
    limit = seen.symmetric() if symmetric else (seen.with_zero() if method == "mse" else seen)
    slack = 1e-9 * seen.absolute
    assert limit.low - slack <= found.low <= found.high <= limit.high + slack
    assert found.quantizable(symmetric=symmetric).with_zero() == found.quantizable(symmetric=symmetric)


@given(st.lists(data, min_size=2, max_size=4), st.sampled_from(METHODS))
@settings(max_examples=40)
def test_neither_order_nor_merging_nor_a_break_matters(parts: list[Floats], method: Method) -> None:
    forth, back, broken = (make_observer(method) for _ in range(3))
    merged: list[Any] = [make_observer(method) for _ in parts]
    for part, one in zip(parts, merged, strict=True):
        forth.update(part)
        one.update(part)
    for part in parts[::-1]:
        back.update(part)
    for one in merged[1:]:
        merged[0].merge(one)
    broken.restore(merged[1].state())
    for index, part in enumerate(parts):
        if index != 1:
            broken.update(part)
    assert forth.range() == back.range() == merged[0].range()
    first = make_observer(method)
    first.update(parts[1])
    for index, part in enumerate(parts):
        if index != 1:
            first.update(part)
    assert forth.range() == first.range()


def divergence(counts: NDArray[np.int64], kept: int, levels: int) -> float:
    """KL divergence as NVIDIA's pytorch-quantization defines it, step by step, by scipy."""
    scipy_stats = pytest.importorskip("scipy.stats")
    reference = counts[:kept].astype(np.float64)
    level = np.digitize(np.arange(kept), np.linspace(0, kept, levels + 1)) - 1
    reference[-1] += counts[kept:].sum()
    quantized = np.zeros(kept)
    for number in range(levels):
        inside = (level == number) & (reference != 0)
        if inside.any():
            quantized[inside] = counts[:kept][level == number].sum() / inside.sum()
    if not quantized.any():
        return float("inf")
    return float(scipy_stats.entropy(reference, quantized))


@pytest.mark.parametrize("levels", [16, 25])
@pytest.mark.parametrize("seed", range(6))
def test_the_divergence_is_least_where_scipy_says(seed: int, levels: int) -> None:
    rng = np.random.default_rng(seed)
    counts, _ = np.histogram(np.abs(rng.standard_t(3, 4000)), bins=200)
    counts[rng.random(200) < 0.1] = 0  # holes, as quantized inputs make them
    divergences = {kept: divergence(counts, kept, levels) for kept in range(levels, 201)}
    found = kept_bins(counts, levels)
    assert divergences[found] == pytest.approx(min(divergences.values()), abs=1e-9)
    assert len({round(value, 6) for value in divergences.values()}) > 50


@pytest.mark.parametrize("kind", ["normal", "laplace", *AWAY_FROM_ZERO])
def test_entropy_agrees_with_onnxruntimes_calibrator(kind: str) -> None:
    calibrate = pytest.importorskip("onnxruntime.quantization.calibrate")
    values = samples(kind, 400_000)
    limit = float(np.abs(values).max())
    counts, edges = np.histogram(values, 2 * 1024 + 1, range=(-limit, limit))
    collector = calibrate.HistogramCollector("entropy", True, 2049, 255, 99.99, "same")
    low, high = collector.get_entropy_threshold((counts, edges, values.min(), values.max(), limit), 255)
    found = observed("entropy", values, symmetric=True)
    # Its range ends where the numbers do, ours is symmetric.
    assert found.high == pytest.approx(max(-float(low), float(high)), rel=0.2)
    assert found.low == -found.high


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("kind", KINDS + AWAY_FROM_ZERO[1:])
def test_entropy_does_not_clip_what_tensors_are_made_of(kind: str, symmetric: bool) -> None:
    values = samples(kind)
    found = observed("entropy", values, symmetric=symmetric)
    clipped = np.mean((values < found.low - 1e-6) | (values > found.high + 1e-6))
    assert clipped < 0.02


def test_what_one_bin_holds_is_not_like_all_the_rest() -> None:
    counts = np.zeros(200, np.int64)
    counts[120:] = 50  # the first of them alone would be distributed as itself
    assert kept_bins(counts, 16) == 200
    counts[120:] = 0
    counts[150] = 9  # all there is
    assert kept_bins(counts, 16) == 200


def error_of(values: Floats, low: float, high: float, *, symmetric: bool) -> float:
    """Mean squared error of QuantizeLinear and DequantizeLinear."""
    if symmetric:
        scale, zero, least, most = high / 127, 0.0, -127, 127
    else:
        scale, least, most = (high - low) / 255, 0, 255
        zero = round(-low / scale)
    integers = np.clip(np.round(values / scale) + zero, least, most)
    return float(np.mean(((integers - zero) * scale - values) ** 2))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_no_exhaustive_search_finds_a_smaller_error(kind: str, symmetric: bool) -> None:
    values = samples(kind, 30_000 if symmetric else 5000).astype(np.float64)
    found = observed("mse", values, symmetric=symmetric)
    whole = Range(float(values.min()), float(values.max())).with_zero()
    shares = np.concatenate([np.linspace(0.02, 1, 50), np.geomspace(1e-3, 0.02, 20)])
    if symmetric:
        limits = np.linspace(0, whole.absolute, 400)[1:]
        errors = [error_of(values, -limit, limit, symmetric=True) for limit in limits]
    else:
        lows = whole.low * (shares if whole.low < -0.01 * whole.high else np.ones(1))
        errors = [error_of(values, low, whole.high * share, symmetric=False) for low in lows for share in shares]
    assert error_of(values, found.low, found.high, symmetric=symmetric) <= 1.03 * min(errors)


def test_an_outlier_does_not_cost_the_others_their_resolution() -> None:
    values = samples("outliers", 100_000)
    found = observed("percentile", values, percentile=99.9, symmetric=True)
    # A linear histogram of 2,048 bins would put nearly all numbers into its first two.
    assert found.high == pytest.approx(np.percentile(np.abs(values), 99.9), rel=1e-3)
    assert found.high < 10
    assert np.abs(values).max() > 1000


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [0.0, 2.5, -2.5])
def test_constants_have_a_range_and_one_to_quantize_in(method: Method, value: float) -> None:
    found = observed(method, np.full(9, value))
    assert found == Range(value, value)
    wide = found.quantizable()
    assert wide.low <= value <= wide.high
    assert wide.high > wide.low


@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_finite_is_refused_and_nothing_taken_in(method: Method) -> None:
    observer = make_observer(method)
    for wrong in (np.nan, np.inf):
        with pytest.raises(NotFiniteError):
            observer.update(np.array([1, wrong], np.float32))
    with pytest.raises(ConversionError, match="No numbers"):
        observer.range()
    observer.update(np.zeros((0, 4), np.float32))
    with pytest.raises(ConversionError, match="No numbers"):
        observer.seen()


def test_memory_does_not_grow_with_the_data() -> None:
    observer = make_observer("percentile")
    rng = np.random.default_rng(0)
    sizes = set()
    for n in range(20):
        observer.update((rng.standard_normal(1000) * 10.0**n).astype(np.float32))
        sizes.add(sum(array.nbytes for array in observer.state().values()))
    assert len(sizes) == 1


@pytest.mark.parametrize("percentile", [0.0, -1.0, 100.1, float("nan")])
def test_percentiles_that_are_none_are_refused(percentile: float) -> None:
    with pytest.raises(UsageError, match="percentile"):
        make_observer("percentile", percentile=percentile)


def test_unknown_methods_are_refused() -> None:
    with pytest.raises(UsageError, match="no way to calibrate"):
        make_observer("median")  # type: ignore[arg-type]


def test_methods_have_observers_of_their_own() -> None:
    made: list[Observer] = [make_observer(method) for method in METHODS]
    assert len({type(one) for one in made}) == len(METHODS)
    assert isinstance(made[0], MinMaxObserver)
    assert all(isinstance(one, HistogramObserver) for one in made[1:])


@given(
    arrays.arrays(np.float32, (3, 4, 5), elements=st.floats(-100, 100, width=32)),
    st.integers(-3, 2),
)
def test_channels_are_numpys_minima_and_maxima(values: NDArray[np.float32], axis: int) -> None:
    observer = ChannelObserver(axis)
    assume(axis not in (0, -3))  # along which the data is split
    for part in values:
        observer.update(part[None])
    found = observer.ranges()
    rest = tuple(n for n in range(3) if n != axis % 3)
    assert np.array_equal(found.low, values.min(axis=rest))
    assert np.array_equal(found.absolute, np.abs(values).max(axis=rest))


def test_channels_must_stay_the_same() -> None:
    observer = ChannelObserver(-1)
    with pytest.raises(ConversionError, match="No numbers"):
        observer.ranges()
    observer.update(np.zeros((2, 3), np.float32))
    with pytest.raises(ConversionError, match="4 channels here and 3 before"):
        observer.update(np.zeros((2, 4), np.float32))
    with pytest.raises(ConversionError, match="no axis 2"):
        ChannelObserver(2).update(np.zeros((2, 4), np.float32))
    with pytest.raises(NotFiniteError):
        observer.update(np.full((2, 3), np.nan, np.float32))
