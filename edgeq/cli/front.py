"""Bytes against quality as a picture of characters, and the table that belongs to it."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from edgeq.cli.tables import format_table, terminal_width
from edgeq.units import format_bytes, format_ms

if TYPE_CHECKING:
    from edgeq.planner.front import Front, FrontPoint

__all__ = ["CAPTION", "Scale", "chosen_name", "front_text", "short_name", "shown", "size_unit"]

CAPTION = "Predicted, not measured. A preset's point is the preset's types, rounded by edgeq."
_ROWS = 20
_WIDEST = 110
_NAMES = 3
_BOLD_GREEN, _YELLOW, _RESET = "\x1b[1;32m", "\x1b[33m", "\x1b[0m"


@dataclasses.dataclass(frozen=True)
class _Glyphs:
    mix: str
    chosen: str
    preset: str
    vertical: str
    tick: str
    corner: str
    horizontal: str
    foot: str


_UNICODE = _Glyphs("•", "◆", "+", "│", "┤", "└", "─", "┬")
_ASCII = _Glyphs(".", "#", "+", "|", "+", "+", "-", "+")


@dataclasses.dataclass(frozen=True)
class Scale:
    """From a quantity to a place between 0 and 1; in powers of ten if ``log``."""

    low: float
    high: float
    log: bool = False

    @classmethod
    def around(cls, values: Iterable[float], *, log: bool = False) -> Scale:
        """All values with a little air at both ends; those of a log scale are above zero."""
        found = [math.log10(v) if log else v for v in values]
        low, high = min(found), max(found)
        air = 0.04 * (high - low) or abs(high) * 0.05 or 1.0
        return cls(low - air, high + air, log)

    def at(self, value: float) -> float:
        """0 at the low end, 1 at the high one."""
        return ((math.log10(value) if self.log else value) - self.low) / (self.high - self.low)

    def ticks(self, most: int) -> list[float]:
        """Round numbers on the scale, ``most`` at the most and at least one."""
        if not self.log:
            choices = map(self._multiples, _round_steps(self.high - self.low))
            return next(found for found in choices if len(found) <= most)
        for mantissas in ((1, 2, 5), (1, 3), (1,)):
            powers = range(math.floor(self.low), math.ceil(self.high) + 1)
            found = [m * 10.0**e for e in powers for m in mantissas if self.low <= math.log10(m) + e <= self.high]
            if 1 <= len(found) <= most:
                return found
        return [10.0**e for e in range(math.ceil(self.low), math.floor(self.high) + 1, 2)]

    def _multiples(self, step: float) -> list[float]:
        return [n * step for n in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]


def _round_steps(span: float) -> Iterator[float]:
    """1, 2, 5, 10, 20 and so on times a power of ten far below the span."""
    power = math.floor(math.log10(span)) - 2
    while True:
        yield from (mantissa * 10.0**power for mantissa in (1, 2, 5))
        power += 1


def shown(points: Iterable[FrontPoint]) -> list[FrontPoint]:
    """Those that have a place on a logarithmic axis."""
    return [point for point in points if point.predicted_kld > 0]


def short_name(point: FrontPoint) -> str:
    """The presets of a point; only the first where they are many, because rows leave few types to choose from."""
    more = len(point.labels) - _NAMES
    return ", ".join(point.labels[:_NAMES]) + (f" and {more} more" if more > 0 else "")


def chosen_name(point: FrontPoint) -> str:
    """What stands at the plan's point; one without loss stands at the foot, since log 0 is nowhere."""
    return "chosen" if point.predicted_kld > 0 else "chosen (KL 0)"


def _chosen_row(point: FrontPoint) -> str:
    return f"chosen ({short_name(point)})" if point.labels else "chosen"


def size_unit(largest_bytes: float) -> tuple[str, int]:
    """The unit of an axis, and its bytes."""
    return next(((u, n) for u, n in (("GiB", 2**30), ("MiB", 2**20)) if largest_bytes >= 4 * n), ("KiB", 2**10))


def front_text(front: Front, *, colour: bool) -> str:
    """The picture as wide as the terminal, a legend, and a table of the plan and the presets. Ends with a newline."""
    glyphs = _UNICODE if _takes(sys.stdout.encoding) else _ASCII
    lines = [
        *_picture(front, glyphs, colour=colour),
        "",
        _legend(front, glyphs),
        CAPTION,
        "",
        *_table(front),
    ]
    if not front.mixes:
        lines.append("no mix keeps the device's budget by the times of this picture")
    if front.left_out:
        lines.append(f"left out: {', '.join(front.left_out)}, whose types were not priced")
    return "\n".join(lines) + "\n"


def _legend(front: Front, glyphs: _Glyphs) -> str:
    mix, chosen = "best mix of its size on this device", chosen_name(front.chosen)
    return f"{glyphs.mix} {mix}  {glyphs.chosen} {chosen}  {glyphs.preset} llama.cpp's preset"


def _takes(encoding: str | None) -> bool:
    try:
        "".join(dataclasses.astuple(_UNICODE)).encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _table(front: Front) -> list[str]:
    points = sorted(
        [*((point, ", ".join(point.labels)) for point in front.presets), (front.chosen, _chosen_row(front.chosen))],
        key=lambda entry: (entry[0].predicted.file_bytes, -entry[0].predicted_kld),
    )
    rows = [
        [
            name,
            format_bytes(point.predicted.file_bytes),
            f"{point.predicted_kld:.4g}",
            format_bytes(point.predicted.peak_memory_bytes),
            format_ms(point.predicted.itl_ms),
        ]
        for point, name in points
    ]
    return format_table(["types", "file", "predicted KL", "peak memory", "a token"], rows, right=(1, 2, 3, 4))


class _Canvas:
    """Characters in rows and columns, each with a colour or none."""

    def __init__(self, rows: int, columns: int) -> None:
        self.rows, self.columns = rows, columns
        self._cells = [[" "] * columns for _ in range(rows)]
        self._colours = [[""] * columns for _ in range(rows)]

    def put(self, row: int, column: int, text: str, colour: str = "") -> None:
        for offset, character in enumerate(text):
            self._cells[row][column + offset] = character
            self._colours[row][column + offset] = colour

    def free(self, row: int, column: int, length: int) -> bool:
        """Whether so many cells are there and blank, and their neighbours too."""
        if not (0 <= row < self.rows and column >= 0 and column + length <= self.columns):
            return False
        return all(cell == " " for cell in self._cells[row][max(0, column - 1) : column + length + 1])

    def lines(self, *, colour: bool) -> Iterator[str]:
        for cells, colours in zip(self._cells, self._colours, strict=True):
            pairs = zip(cells, colours, strict=True)
            yield "".join(f"{code}{cell}{_RESET}" if code and colour else cell for cell, code in pairs).rstrip()


def _picture(front: Front, glyphs: _Glyphs, *, colour: bool) -> list[str]:
    mixes, presets, chosen = shown(front.mixes), shown(front.presets), front.chosen
    on_scale = [*mixes, *presets, *shown([chosen])]
    points = [*mixes, *presets, chosen]
    if not on_scale:
        return ["(nothing to draw: every point is the unquantized model)"]
    unit, unit_bytes = size_unit(max(point.predicted.file_bytes for point in points))
    x = Scale.around(point.predicted.file_bytes / unit_bytes for point in points)
    y = Scale.around((point.predicted_kld for point in on_scale), log=True)
    y_ticks = {round((1 - y.at(v)) * (_ROWS - 1)): f"{v:g}" for v in y.ticks(_ROWS // 3)}
    margin = max(map(len, y_ticks.values()))
    canvas = _Canvas(_ROWS, min(terminal_width(), _WIDEST) - margin - 3)

    def place(point: FrontPoint) -> tuple[int, int]:
        column = x.at(point.predicted.file_bytes / unit_bytes) * (canvas.columns - 1)
        height = y.at(point.predicted_kld) if point.predicted_kld > 0 else 0.0
        return round((1 - height) * (_ROWS - 1)), round(column)

    for kind, style, glyph in ((mixes, "", glyphs.mix), (presets, _YELLOW, glyphs.preset)):
        for point in kind:
            canvas.put(*place(point), glyph, style)
    canvas.put(*place(chosen), glyphs.chosen, _BOLD_GREEN)
    _label(canvas, place(chosen), chosen_name(chosen), _BOLD_GREEN)
    for point in sorted(presets, key=lambda p: -len(short_name(p))):
        _label(canvas, place(point), short_name(point), "")
    lines = ["predicted mean KL divergence in nats", ""]
    for row, line in enumerate(canvas.lines(colour=colour)):
        edge = glyphs.tick if row in y_ticks else glyphs.vertical
        lines.append(f"{y_ticks.get(row, ''):>{margin}} {edge}{line}")
    return [*lines, *_foot(x, canvas.columns, margin, unit, glyphs)]


def _label(canvas: _Canvas, at: tuple[int, int], text: str, colour: str) -> None:
    """Write a name beside its point, where there is room; the table has those for which there is none."""
    row, column = at
    left, right = column - 1 - len(text), column + 2
    for line, start in ((row, right), (row, left), (row - 1, column + 1), (row + 1, column + 1), (row - 1, left + 1)):
        # The neighbour on the side of the point is the point itself, one cell away.
        if canvas.free(line, start, len(text)):
            canvas.put(line, start, text, colour)
            return


def _foot(x: Scale, columns: int, margin: int, unit: str, glyphs: _Glyphs) -> list[str]:
    """The horizontal axis, its numbers, and what it is."""
    axis, numbers = _Canvas(1, columns), _Canvas(1, columns + 8)
    axis.put(0, 0, glyphs.horizontal * columns)
    for value in x.ticks(max(2, columns // 12)):
        column, text = round(x.at(value) * (columns - 1)), f"{value:g}"
        axis.put(0, column, glyphs.foot)
        start = max(0, column - len(text) // 2)
        if numbers.free(0, start, len(text)):
            numbers.put(0, start, text)
    indent = " " * (margin + 2)
    name = f"file in {unit}"
    return [
        f"{' ' * (margin + 1)}{glyphs.corner}{next(axis.lines(colour=False))}",
        f"{indent}{next(numbers.lines(colour=False))}",
        f"{indent}{name.rjust(columns)}",
    ]
