"""What watches a tensor while data streams by, and says at the end which range to quantize it in.

Each holds as much after a million calls as after one, and gives the same range in whatever order the calls came.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.onnx.calibration.histogram import LogHistogram, NotFiniteError
from edgeq.converters.onnx.calibration.ranges import ChannelRanges, Range
from edgeq.converters.onnx.calibration.squared_error import mse_range
from edgeq.converters.onnx.calibration.thresholds import entropy_range, percentile_range
from edgeq.errors import ConversionError, UsageError

__all__ = [
    "METHODS",
    "ChannelObserver",
    "EntropyObserver",
    "HistogramObserver",
    "Method",
    "MinMaxObserver",
    "MseObserver",
    "Observer",
    "PercentileObserver",
    "make_observer",
]

Method = Literal["minmax", "percentile", "entropy", "mse"]
METHODS: tuple[Method, ...] = ("minmax", "percentile", "entropy", "mse")

_State = Mapping[str, NDArray[np.generic]]


class Observer(abc.ABC):
    """Watches one tensor.

    Args:
        symmetric: whether the range shall be symmetric around zero.
    """

    def __init__(self, *, symmetric: bool = False) -> None:
        self.symmetric = symmetric

    @abc.abstractmethod
    def update(self, values: NDArray[np.floating]) -> None:
        """Take in what one call made.

        Raises:
            NotFiniteError: NaN or infinity among the values; then none was taken in.
        """

    @abc.abstractmethod
    def state(self) -> dict[str, NDArray[np.generic]]:
        """What `restore` needs to go on from here."""

    @abc.abstractmethod
    def restore(self, state: _State) -> None:
        """Go on from where another observer of the same kind was."""

    @abc.abstractmethod
    def seen(self) -> Range:
        """From the smallest to the largest number.

        Raises:
            ConversionError: there was none.
        """

    @abc.abstractmethod
    def range(self) -> Range:
        """The range to quantize in.

        Raises:
            ConversionError: no number came by.
        """


class MinMaxObserver(Observer):
    """Clips nothing."""

    def __init__(self, *, symmetric: bool = False) -> None:
        super().__init__(symmetric=symmetric)
        self._low, self._high = np.inf, -np.inf

    def update(self, values: NDArray[np.floating]) -> None:
        """See `Observer.update`."""
        if not values.size:
            return
        low, high = float(values.min()), float(values.max())
        if not (np.isfinite(low) and np.isfinite(high)):
            raise NotFiniteError
        self._low, self._high = min(self._low, low), max(self._high, high)

    def merge(self, other: MinMaxObserver) -> None:
        """Take in what another one has seen."""
        self._low, self._high = min(self._low, other._low), max(self._high, other._high)

    def state(self) -> dict[str, NDArray[np.generic]]:
        """See `Observer.state`."""
        return {"limits": np.array([self._low, self._high])}

    def restore(self, state: _State) -> None:
        """See `Observer.restore`."""
        self._low, self._high = (float(limit) for limit in state["limits"].astype(np.float64))

    def seen(self) -> Range:
        """See `Observer.seen`."""
        return _range(self._low, self._high)

    def range(self) -> Range:
        """See `Observer.range`."""
        return self.seen().symmetric() if self.symmetric else self.seen()


class HistogramObserver(Observer):
    """Counts numbers in a histogram, from which a subclass finds where to clip."""

    def __init__(self, *, symmetric: bool = False) -> None:
        super().__init__(symmetric=symmetric)
        self.histogram = LogHistogram()

    def update(self, values: NDArray[np.floating]) -> None:
        """See `Observer.update`."""
        self.histogram.update(values)

    def merge(self, other: HistogramObserver) -> None:
        """Take in what another one has seen."""
        self.histogram.merge(other.histogram)

    def state(self) -> dict[str, NDArray[np.generic]]:
        """See `Observer.state`."""
        return self.histogram.state()

    def restore(self, state: _State) -> None:
        """See `Observer.restore`."""
        self.histogram = LogHistogram.restore(state)

    def seen(self) -> Range:
        """See `Observer.seen`."""
        return _range(self.histogram.low, self.histogram.high)

    def range(self) -> Range:
        """See `Observer.range`."""
        seen = self.seen()
        if seen.is_constant:  # nothing to weigh against clipping it
            return seen.symmetric() if self.symmetric else seen
        return self._clipped()

    @abc.abstractmethod
    def _clipped(self) -> Range:
        """The range to quantize in, of numbers that are not all the same."""


class PercentileObserver(HistogramObserver):
    """Clips what lies outside of the middle ``percentile`` percent."""

    def __init__(self, percentile: float = 99.99, *, symmetric: bool = False) -> None:
        super().__init__(symmetric=symmetric)
        if not 0 < percentile <= 100:
            raise UsageError(f"{percentile} is no percentile to calibrate with", "Give one above 0, at most 100")
        self.percentile = percentile

    def _clipped(self) -> Range:
        return percentile_range(self.histogram, self.percentile, symmetric=self.symmetric)


class EntropyObserver(HistogramObserver):
    """Clips where the divergence of the quantized numbers' distribution is least, as TensorRT's calibrator does."""

    def _clipped(self) -> Range:
        return entropy_range(self.histogram, symmetric=self.symmetric)


class MseObserver(HistogramObserver):
    """Clips where the mean squared error of the quantized numbers is least."""

    def _clipped(self) -> Range:
        return mse_range(self.histogram, symmetric=self.symmetric)


class ChannelObserver:
    """Keeps the smallest and the largest number of each channel.

    Args:
        axis: of the channels; negative ones count from the last.
    """

    def __init__(self, axis: int) -> None:
        self.axis = axis
        self._low: NDArray[np.float32] | None = None
        self._high: NDArray[np.float32] | None = None

    def update(self, values: NDArray[np.floating]) -> None:
        """Take in what one call made.

        Raises:
            NotFiniteError: NaN or infinity among the values.
            ConversionError: no such axis, or another number of channels than before.
        """
        if not -values.ndim <= self.axis < values.ndim:
            raise ConversionError(f"A tensor of {values.ndim} axes has no axis {self.axis}", "Name another axis")
        rest = tuple(n for n in range(values.ndim) if n != self.axis % values.ndim)
        if not values.size:
            return
        low, high = (limit.astype(np.float32) for limit in (values.min(axis=rest), values.max(axis=rest)))
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise NotFiniteError
        if self._low is None or self._high is None:
            self._low, self._high = low, high
        elif len(low) != len(self._low):
            raise ConversionError(
                f"Axis {self.axis} has {len(low)} channels here and {len(self._low)} before",
                "Name an axis whose size does not depend on the inputs",
            )
        else:
            self._low, self._high = np.minimum(self._low, low), np.maximum(self._high, high)

    def ranges(self) -> ChannelRanges:
        """The range of each channel.

        Raises:
            ConversionError: no number came by.
        """
        if self._low is None or self._high is None:
            raise _no_numbers()
        return ChannelRanges(self._low, self._high)


def make_observer(method: Method, *, percentile: float = 99.99, symmetric: bool = False) -> Observer:
    """An observer by the name of its method.

    Args:
        method: one of `METHODS`.
        percentile: for ``"percentile"``; see `percentile_range`.
        symmetric: whether the range shall be symmetric around zero.

    Raises:
        UsageError: no such method or percentile.
    """
    if method == "minmax":
        return MinMaxObserver(symmetric=symmetric)
    if method == "percentile":
        return PercentileObserver(percentile, symmetric=symmetric)
    if method == "entropy":
        return EntropyObserver(symmetric=symmetric)
    if method == "mse":
        return MseObserver(symmetric=symmetric)
    raise UsageError(f"{method!r} is no way to calibrate", f"Choose one of: {', '.join(METHODS)}")


def _range(low: float, high: float) -> Range:
    if low > high:
        raise _no_numbers()
    return Range(low, high)


def _no_numbers() -> ConversionError:
    return ConversionError(
        "No numbers came by to take a range from", "Give more calibration inputs, none of them empty"
    )
