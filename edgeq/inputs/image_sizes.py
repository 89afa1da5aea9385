"""To which size an image is brought, by the rules that transformers' processors have.

Sizes are (height, width) in pixels. Divisions are rounded towards zero where transformers rounds so.
"""

from __future__ import annotations

__all__ = ["Size", "fit_both", "fit_inside", "fit_multiple", "fit_shortest"]

Size = tuple[int, int]


def fit_shortest(image: Size, edge: int) -> Size:
    """The shorter edge becomes ``edge``, the other keeps the ratio."""
    height, width = image
    if width <= height:
        return int(edge * height / width), edge
    return edge, int(edge * width / height)


def fit_both(image: Size, shortest: int, longest: int, *, yolos: bool = False) -> Size:
    """The shorter edge becomes ``shortest``, unless the longer one would exceed ``longest``: then that one counts.

    Args:
        image: its size.
        shortest: of the shorter edge.
        longest: the most of the longer edge.
        yolos: as YOLOS does it: down to multiples of 16, and an upright image is always computed anew.
    """
    height, width = image
    edge, exact = shortest, float(shortest)
    low, high = float(min(image)), float(max(image))
    if high / low * shortest > longest:
        exact = longest * low / high
        edge = round(exact)
    if min(image) == edge and not (yolos and width < height):
        result = image
    elif width < height:
        result = int(exact * height / width), edge
    else:
        result = edge, int(exact * width / height)
    return (result[0] // 16 * 16, result[1] // 16 * 16) if yolos else result


def fit_inside(image: Size, bound: Size) -> Size:
    """As large as fits into ``bound`` with the same ratio; smaller images grow."""
    scale = min(bound[0] / image[0], bound[1] / image[1])
    return int(image[0] * scale), int(image[1] * scale)


def fit_multiple(image: Size, wanted: Size, multiple: int, *, keep_ratio: bool) -> Size:
    """The nearest multiples of ``multiple`` to ``wanted``; with ``keep_ratio``, the scale nearer to 1 counts for both.

    The rule of DPT and Depth Anything.
    """
    scales = [wanted[0] / image[0], wanted[1] / image[1]]
    if keep_ratio:
        scales = [scales[1] if abs(1 - scales[1]) < abs(1 - scales[0]) else scales[0]] * 2
    height, width = (round(scale * size / multiple) * multiple for scale, size in zip(scales, image, strict=True))
    return height, width
