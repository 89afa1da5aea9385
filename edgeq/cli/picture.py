"""Bytes against quality as an SVG or PNG."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeq.cli.front import CAPTION, chosen_name, short_name, shown, size_unit
from edgeq.errors import UsageError, require_package

if TYPE_CHECKING:
    from edgeq.planner.front import Front, FrontPoint

__all__ = ["check_picture", "draw"]

Point = tuple[float, float]
Box = tuple[float, float, float, float]  # left, bottom, right, top in pixels

_SUFFIXES = (".svg", ".png")
_SIZE_IN, _DPI = (8.0, 5.4), 160
_INK, _QUIET, _GRID = "#1a1a1a", "#6b6b6b", "#e4e4e4"
_MIX, _PRESET, _CHOSEN = "#0072b2", "#b35900", "#009e73"  # told apart by colour-blind eyes too
_CHOSEN_STYLE: dict[str, Any] = {"ms": 8, "ls": "", "mec": "white", "mew": 1.2}
_NEAR_PT, _DIRECTIONS = 7.0, 16


def check_picture(path: Path) -> None:
    """Find out before any work whether `draw` can make that kind of file.

    Raises:
        UsageError: another suffix.
        MissingPackageError: no matplotlib.
    """
    if path.suffix.lower() not in _SUFFIXES:
        raise UsageError(f"{path} is no picture's name: it ends in neither .svg nor .png", "Give it one of these")
    require_package("matplotlib", "plot", "to draw pictures")


def draw(front: Front, title: str, suffix: str) -> bytes:
    """The picture as the bytes of a file.

    Args:
        front: its points.
        title: model and device.
        suffix: ``".svg"`` or ``".png"``.

    Raises:
        MissingPackageError: no matplotlib.
    """
    import logging

    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells stderr of its caches
    mpl = require_package("matplotlib", "plot", "to draw pictures")
    agg = require_package("matplotlib.backends.backend_agg", "plot", "to draw pictures")
    figures = require_package("matplotlib.figure", "plot", "to draw pictures")
    is_svg = suffix.lower() == ".svg"
    # Text stays text, and the same points make the same file: no date, and ids that are not random.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "edgeq", "font.size": 10}):
        figure = figures.Figure(figsize=_SIZE_IN, dpi=_DPI, layout="constrained")
        agg.FigureCanvasAgg(figure)  # measures text
        _fill(figure, front, title)
        out = io.BytesIO()
        figure.savefig(out, format=suffix[1:].lower(), metadata={"Date": None} if is_svg else None)
    return out.getvalue()


def _fill(figure: Any, front: Front, title: str) -> None:  # noqa: ANN401 - optional package
    axes = figure.add_subplot()
    mixes, presets = shown(front.mixes), shown(front.presets)
    unit, unit_bytes = size_unit(max(p.predicted.file_bytes for p in (*mixes, *presets, front.chosen)))

    def places(points: Sequence[FrontPoint]) -> list[Point]:
        return [(point.predicted.file_bytes / unit_bytes, point.predicted_kld) for point in points]

    axes.set_yscale("log")
    axes.margins(x=0.06, y=0.06)
    for points, style, colour, order in (
        (mixes, {"marker": "o", "ms": 3, "ls": "-", "lw": 1.2}, _MIX, 2),
        (presets, {"marker": "x", "ms": 6, "ls": "", "mew": 1.4}, _PRESET, 3),
        (shown([front.chosen]), {"marker": "D", **_CHOSEN_STYLE}, _CHOSEN, 4),
    ):
        at = places(points)
        axes.plot([x for x, _ in at], [y for _, y in at], color=colour, zorder=order, **style)
    chosen = places([front.chosen])[0]
    if front.chosen.predicted_kld <= 0:  # below every power of ten: an arrow at the foot
        chosen = chosen[0], float(axes.get_ylim()[0])
        axes.set_ylim(bottom=chosen[1])
        axes.plot(*([value] for value in chosen), color=_CHOSEN, zorder=4, clip_on=False, marker="v", **_CHOSEN_STYLE)
    _dress(axes, unit, title)
    figure.supxlabel(CAPTION, fontsize=8, color=_QUIET, x=0.99, ha="right")
    names = [(chosen, chosen_name(front.chosen), _CHOSEN)]
    if mixes:
        names.append((places(mixes)[len(mixes) // 4], "best mix of its size", _MIX))
    names += [(place, short_name(p), _PRESET) for place, p in zip(places(presets), presets, strict=True)]
    _name(figure, axes, names, places(mixes))


def _dress(axes: Any, unit: str, title: str) -> None:  # noqa: ANN401 - optional package
    axes.set_title(title, loc="left", color=_INK, fontsize=11)
    axes.set_xlabel(f"file size ({unit})", color=_INK)
    axes.set_ylabel("predicted mean KL divergence (nats)", color=_INK)
    axes.yaxis.set_major_formatter(lambda value, _position: f"{value:g}")
    axes.grid(visible=True, axis="y", which="major", color=_GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_QUIET, which="both", length=3)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_QUIET)


def _name(
    figure: Any,  # noqa: ANN401 - optional package
    axes: Any,  # noqa: ANN401 - optional package
    names: Sequence[tuple[Point, str, str]],
    curve: Sequence[Point],
) -> None:
    """Write names beside their points, where they cover neither each other nor a point nor the curve."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # what is measured now shall stay
    pixels = figure.dpi / 72

    def to_pixels(place: Point) -> Point:
        x, y = axes.transData.transform(place)
        return float(x), float(y)

    marks = [_around(to_pixels(place), 4 * pixels) for place, _, _ in names]
    marks += [_around(at, 2 * pixels) for at in _along([to_pixels(place) for place in curve])]
    room = axes.get_window_extent()
    frame = (room.x0, room.y0, room.x1, room.y1)
    written: list[Box] = []
    for place, text, colour in names:
        label = axes.annotate(text, place, (0, 0), textcoords="offset points", fontsize=8, color=colour, zorder=5)
        size = label.get_window_extent()
        at = to_pixels(place)
        boxes = list(_places_around(at, size.width + 2 * pixels, size.height, _NEAR_PT * pixels))
        box = next((b for b in boxes if _inside(b, frame) and _is_free(at, b, marks, written)), boxes[0])
        written.append(box)
        label.set_position(((box[0] - at[0]) / pixels + 1, (box[1] - at[1]) / pixels))
        end = _nearest(at, box)
        if math.dist(at, end) > 1.5 * _NEAR_PT * pixels:  # too far to be obvious
            marks += [_around(step, pixels) for step in _along([at, end])]
            to = axes.transData.inverted().transform(end)
            axes.plot([place[0], to[0]], [place[1], to[1]], color=colour, lw=0.5, zorder=1)


def _is_free(at: Point, box: Box, marks: Sequence[Box], written: Sequence[Box]) -> bool:
    """Whether a name can stand there, and the line from its point to it too."""
    if any(_overlap(box, other) for other in (*marks, *written)):
        return False
    line = [_around(step, 1.0) for step in _along([at, _nearest(at, box)])]
    return not any(_overlap(piece, other) for piece in line for other in written)


def _around(at: Point, half: float) -> Box:
    return at[0] - half, at[1] - half, at[0] + half, at[1] + half


def _along(corners: Sequence[Point]) -> Iterator[Point]:
    """Points on straight lines between corners, close to each other."""
    for (x0, y0), (x1, y1) in itertools.pairwise(corners):
        steps = max(1, round(math.hypot(x1 - x0, y1 - y0) / 6))
        yield from ((x0 + (x1 - x0) * n / steps, y0 + (y1 - y0) * n / steps) for n in range(steps + 1))


def _places_around(at: Point, width: float, height: float, near: float) -> Iterator[Box]:
    """Where a label can stand, the nearest first; at each distance to the right first."""
    for distance in range(1, 14):
        for n in range(_DIRECTIONS):
            turn = (n + 1) // 2 * (1 if n % 2 else -1) * 2 * math.pi / _DIRECTIONS
            x = at[0] + math.cos(turn) * (near * distance + width / 2)
            y = at[1] + math.sin(turn) * (near * distance + height / 2)
            yield x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _nearest(at: Point, box: Box) -> Point:
    """The point of a box that is nearest to another point."""
    return min(max(at[0], box[0]), box[2]), min(max(at[1], box[1]), box[3])


def _inside(box: Box, frame: Box) -> bool:
    return box[0] >= frame[0] and box[1] >= frame[1] and box[2] <= frame[2] and box[3] <= frame[3]


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
