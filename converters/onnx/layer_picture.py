"""Where the error of a quantized model enters, as a picture: layers from left to right, errors upwards."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

from edgeq.converters.onnx.layers import LayerError, worst_layers
from edgeq.errors import UsageError, require_package

__all__ = ["draw_layers"]

_SUFFIXES = (".svg", ".png")
_SIZE_IN, _DPI = (10.0, 5.2), 160
_INK, _QUIET, _GRID = "#1a1a1a", "#6b6b6b", "#e4e4e4"
_ACCUMULATED, _ALONE, _WORST = "#0072b2", "#9a9a9a", "#b35900"  # told apart by colour-blind eyes too
_NAMED = 8
_LONGEST_NAME = 34
_DECADES = 5  # shown at most, below the largest error
_FEW = 40  # up to so many layers each has a tick


def draw_layers(layers: Sequence[LayerError], title: str, suffix: str) -> bytes:
    """The picture as the bytes of a file.

    A line shows the error that has accumulated, stems show what each layer adds by itself, both relative to the
    float model's numbers, in percent (root mean square, on a logarithmic scale). The worst layers have numbers, and
    their names are listed beside.

    Args:
        layers: of `compare_layers`, from 1 to several hundred.
        title: model and device.
        suffix: ``".svg"`` or ``".png"``.

    Raises:
        UsageError: another suffix, or no layers.
        MissingPackageError: no matplotlib.
    """
    if suffix.lower() not in _SUFFIXES:
        raise UsageError(f"{suffix!r} is no kind of picture", f"Choose {' or '.join(_SUFFIXES)}")
    if not layers:
        raise UsageError("There are no layers to draw", "Compare models first")
    import logging

    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells stderr of its caches
    mpl = require_package("matplotlib", "plot", "to draw pictures")
    agg = require_package("matplotlib.backends.backend_agg", "plot", "to draw pictures")
    figures = require_package("matplotlib.figure", "plot", "to draw pictures")
    is_svg = suffix.lower() == ".svg"
    # Text stays text, and the same layers make the same file: no date, and ids that are not random.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "edgeq", "font.size": 10}):
        figure = figures.Figure(figsize=_SIZE_IN, dpi=_DPI, layout="constrained")
        agg.FigureCanvasAgg(figure)
        _fill(figure, layers, title)
        out = io.BytesIO()
        figure.savefig(out, format=suffix[1:].lower(), metadata={"Date": None} if is_svg else None)
    return out.getvalue()


def _fill(figure: Any, layers: Sequence[LayerError], title: str) -> None:  # noqa: ANN401 - optional package
    axes, names = figure.subplots(1, 2, width_ratios=[3, 1])
    accumulated, alone = ([100 * math.sqrt(n) for n in noise] for noise in _noises(layers))
    floor, ceiling = _limits(accumulated, alone)
    worst = worst_layers(layers, _NAMED)
    places = {layer.name: n for n, layer in enumerate(layers, 1)}
    marked = {places[layer.name] for layer in worst}
    axes.set_yscale("log")
    axes.set_ylim(floor, ceiling)
    axes.set_xlim(0.2, len(layers) + 0.8)
    width = min(4.0, max(0.7, 240 / len(layers)))
    stems = [(place, error) for place, error in enumerate(alone, 1) if error > floor]
    colours = [_WORST if place in marked else _ALONE for place, _ in stems]
    axes.vlines([place for place, _ in stems], floor, [error for _, error in stems], colors=colours, lw=width, zorder=2)
    shown = [(place, error) for place, error in enumerate(accumulated, 1) if error > floor]
    line: dict[str, Any] = {"color": _ACCUMULATED, "lw": 1.3, "marker": "o", "ms": min(3.0, width), "zorder": 3}
    axes.plot([place for place, _ in shown], [error for _, error in shown], **line)
    heads = [max(errors) for errors in zip(alone, accumulated, [floor] * len(layers), strict=True)]
    _number(axes, [places[layer.name] for layer in worst], heads)
    _dress(axes, layers, title)
    _list_names(names, layers, worst, places)


def _number(axes: Any, places: Sequence[int], heads: Sequence[float]) -> None:  # noqa: ANN401 - optional package
    """Write 1, 2, … above the layers at these places; numbers of neighbours stand above each other."""
    near = len(heads) / 30
    for number, place in enumerate(places, 1):
        around = [head for n, head in enumerate(heads, 1) if abs(n - place) < near]
        height = 6 + 10 * sum(1 for other in places[: number - 1] if abs(other - place) < near)
        axes.annotate(
            str(number),
            (place, max(around)),
            (0, height),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=_WORST,
            zorder=5,
        )


def _noises(layers: Sequence[LayerError]) -> tuple[list[float], list[float]]:
    return [layer.noise for layer in layers], [layer.alone for layer in layers]


def _limits(*errors: Sequence[float]) -> tuple[float, float]:
    """Whole decades around what there is, five at most."""
    positive = [error for some in errors for error in some if error > 0] or [1.0]
    most = math.ceil(math.log10(max(positive)) + 0.15)
    least = max(math.floor(math.log10(min(positive))), most - _DECADES)
    return 10.0 ** min(least, most - 1), 10.0**most


def _dress(axes: Any, layers: Sequence[LayerError], title: str) -> None:  # noqa: ANN401 - optional package
    axes.set_title(title, loc="left", color=_INK, fontsize=11)
    axes.set_ylabel("error relative to the float model (%, RMS)", color=_INK)
    axes.set_xlabel("layers, from input to output", color=_INK)
    axes.yaxis.set_major_formatter(lambda value, _position: f"{value:g}")
    axes.grid(visible=True, axis="y", which="major", color=_GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_QUIET, which="both", length=3)
    if len(layers) <= _FEW:
        names = [_short(layer, 18) for layer in layers]
        axes.set_xticks(range(1, len(layers) + 1), names, rotation=90, fontsize=6)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_QUIET)
    for colour, text, y in ((_ACCUMULATED, "accumulated", 0.98), (_ALONE, "of the layer alone", 0.93)):
        axes.text(0.01, y, text, color=colour, fontsize=8, transform=axes.transAxes, va="top")


def _list_names(
    axes: Any,  # noqa: ANN401 - optional package
    layers: Sequence[LayerError],
    worst: Sequence[LayerError],
    places: dict[str, int],
) -> None:
    """Which layers the numbers stand for, and what came of it all."""
    axes.set_axis_off()
    axes.text(0, 1, "Most error of their own", color=_INK, fontsize=9, va="top", transform=axes.transAxes)
    for number, layer in enumerate(worst, 1):
        y = 1 - 0.1 * number
        head = f"{number}  {_short(layer, _LONGEST_NAME)}"
        tail = f"{layer.op_type}, layer {places[layer.name]}: {_percent(layer.alone)} %"
        axes.text(0, y, head, color=_WORST, fontsize=7.5, va="top", transform=axes.transAxes)
        axes.text(0.07, y - 0.04, tail, color=_QUIET, fontsize=7, va="top", transform=axes.transAxes)
    last = layers[-1]
    decibel = "no error" if last.sqnr_db is None else f"{last.sqnr_db:.1f} dB"
    axes.text(
        0,
        0.0,
        f"last layer: {decibel}, cosine {last.cosine:.5f}",
        color=_ACCUMULATED,
        fontsize=8,
        va="bottom",
        transform=axes.transAxes,
    )


def _percent(noise: float) -> str:
    """The root of a ratio of energies, to two digits."""
    share = 100 * math.sqrt(noise)
    return f"{share:.0f}" if share >= 10 else f"{share:.2g}"


def _short(layer: LayerError, longest: int) -> str:
    """The end of the node's name, where names differ."""
    name = layer.node or layer.name
    if len(name) <= longest:
        return name
    tail = name[1 - longest :]
    cut = tail.find(".")
    return f"…{tail[cut + 1 :] if 0 <= cut < longest // 3 else tail}"
