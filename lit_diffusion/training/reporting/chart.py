"""Line charts as inline SVG, with real text and the colours of the page.

A bitmap from a plotting library has its own background and fonts, which are unreadable on a phone
and too bright in dark mode. A line chart needs little more than two scales and a path.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from lit_diffusion.training.reporting.page import number, text
from lit_diffusion.training.reporting.scale import (
    BOTTOM,
    HEIGHT,
    RIGHT,
    TOP,
    WIDTH,
    Scale,
    axes,
    left_margin,
)

__all__ = ["Line", "Shade", "chart"]

POINTS = 300  # per line at most; more could not be distinguished
COLOURS = 6  # defined in the style sheet
WIDE = 20.0  # ratio of maximum to minimum above which the y axis is logarithmic

Points = list[tuple[float, float]]


class Line(NamedTuple):
    """A named line: its points from left to right."""

    name: str
    points: Points
    dashed: bool = False  # for a line that lies on another one


class Shade(NamedTuple):
    """Intervals of x with a grey background, and what that means."""

    name: str
    intervals: Sequence[tuple[float, float]]


def chart(
    title: str,
    lines: list[Line],
    x: str,
    *,
    ends: bool = True,
    zero: bool = False,
    logarithmic: bool | None = None,
    shade: Shade | None = None,
) -> str:
    """A chart of lines over a common x axis, as HTML; "" if there is no finite point.

    A line of more than `POINTS` points is averaged over neighbours.

    Args:
        title: The title above the chart.
        lines: The lines; colours repeat after `COLOURS` of them.
        x: The label of the x axis.
        ends: Whether the legend shows the last value of each line.
        zero: Whether the y axis contains 0.
        logarithmic: Whether the y axis is logarithmic, if all values are positive; None if they
            span a wide range, too.
        shade: Intervals of x to shade, explained in the legend.
    """
    shown = [line._replace(points=_thin(line.points)) for line in lines]
    shown = [line for line in shown if line.points]
    if not shown:
        return ""
    values = [p[1] for line in shown for p in line.points] + [0.0] * zero
    wide = max(values) > WIDE * min(values) if logarithmic is None else logarithmic
    up = Scale(values, HEIGHT - BOTTOM, TOP, logarithmic=wide and min(values) > 0, margin=0.04)
    left, right = left_margin(up), WIDTH - RIGHT
    across = Scale([p[0] for line in shown for p in line.points], left, right)
    parts = [
        *_shaded(shade, across),
        *axes(across, up, x),
        *(_path(i, line, across, up) for i, line in enumerate(shown)),
    ]
    keys = "".join(
        f'<li class="s{i % COLOURS}{" dashed" if line.dashed else ""}">{text(line.name)}'
        f"{_end(line) if ends else ''}</li>"
        for i, line in enumerate(shown)
    )
    if shade is not None and shade.intervals:
        keys += f'<li class="shade">{text(shade.name)}</li>'
    spoken = "; ".join(_spoken(line, x) for line in shown)
    return (
        f'<figure class="chart"><figcaption><h3>{text(title)}</h3><ul class="keys">{keys}</ul>'
        f'</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{text(f"{title}: {spoken}")}">{"".join(parts)}</svg></figure>'
    )


def _end(line: Line) -> str:
    return f" <b>{number(line.points[-1][1])}</b>"


def _spoken(line: Line, x: str) -> str:
    (first, begin), (last, end) = line.points[0], line.points[-1]
    if len(line.points) == 1:
        return f"{line.name} {number(end)} at {x} {number(last)}"
    return (
        f"{line.name} from {number(begin)} at {x} {number(first)} "
        f"to {number(end)} at {number(last)}"
    )


def _thin(points: Points) -> Points:
    """The finite points, averaged over neighbours if there are more than `POINTS`."""
    finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    size = math.ceil(len(finite) / POINTS)
    groups = [finite[i : i + size] for i in range(0, len(finite), max(1, size))]
    return [(sum(x) / len(x), sum(y) / len(y)) for x, y in (zip(*g, strict=True) for g in groups)]


def _shaded(shade: Shade | None, across: Scale) -> list[str]:
    parts = []
    for low, high in () if shade is None else shade.intervals:
        begin, end = max(across(low), across.begin), min(across(high), across.end)
        if end > begin:
            parts.append(
                f'<rect x="{begin:.1f}" y="{TOP}" width="{end - begin:.1f}" '
                f'height="{HEIGHT - BOTTOM - TOP}"/>'
            )
    return parts


def _path(i: int, line: Line, across: Scale, up: Scale) -> str:
    places = [(across(x), up(y)) for x, y in line.points]
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.2"/>'
        for x, y in places
        if len(places) <= 60 and not line.dashed
    )
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    kind = f"s{i % COLOURS}{' dashed' if line.dashed else ''}"
    return f'<g class="{kind}"><polyline points="{path}"/>{dots}</g>'
