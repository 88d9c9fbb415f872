"""Line charts as inline SVG, with real text and the colours of the page.

A bitmap from a plotting library has its own background and fonts, which are unreadable on a phone
and too bright in dark mode. A line chart needs little more than two scales and a path.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from lit_diffusion.training.reporting.page import number, text

__all__ = ["Line", "chart"]

WIDTH, HEIGHT = 440, 246
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 8, 42  # margins
POINTS = 300  # per line at most; more could not be distinguished
COLOURS = 6  # defined in the style sheet
WIDE = 20.0  # ratio of maximum to minimum above which the y axis is logarithmic

Points = list[tuple[float, float]]


class Line(NamedTuple):
    """A named line: its points from left to right."""

    name: str
    points: Points


def chart(title: str, lines: list[Line], x: str, ends: bool = True, zero: bool = False) -> str:
    """A chart of lines over a common x axis, as HTML; "" if there is no finite point.

    The y axis is logarithmic if all values are positive and span a wide range. A line of more than
    `POINTS` points is averaged over neighbours.

    Args:
        title: The title above the chart.
        lines: The lines; colours repeat after `COLOURS` of them.
        x: The label of the x axis.
        ends: Whether the legend shows the last value of each line.
        zero: Whether the y axis starts at 0.
    """
    shown = [Line(line.name, _thin(line.points)) for line in lines]
    shown = [line for line in shown if line.points]
    if not shown:
        return ""
    across = _Scale([p[0] for line in shown for p in line.points], LEFT, WIDTH - RIGHT)
    values = [p[1] for line in shown for p in line.points] + [0.0] * zero
    wide = min(values) > 0 and max(values) > WIDE * min(values)
    up = _Scale(values, HEIGHT - BOTTOM, TOP, logarithmic=wide, margin=0.04)
    parts = [*_grid(across, up), *(_path(i, line, across, up) for i, line in enumerate(shown))]
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle:.0f}" y="{HEIGHT - 3}" text-anchor="middle">{text(x)}</text>')
    keys = "".join(
        f'<li class="s{i % COLOURS}">{text(line.name)}{_end(line) if ends else ""}</li>'
        for i, line in enumerate(shown)
    )
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


class _Scale:
    """Maps values to coordinates, linearly in the value or in its logarithm."""

    def __init__(
        self,
        values: list[float],
        begin: float,
        end: float,
        logarithmic: bool = False,
        margin: float = 0.0,
    ) -> None:
        self.logarithmic = logarithmic
        low, high = self._straight(min(values)), self._straight(max(values))
        if not logarithmic and margin and 0 < low < 0.4 * high:
            low = 0.0  # a scale of positive values that nearly reaches zero starts there
        if high - low < 1e-9 * max(abs(low), abs(high), 1e-300):
            low, high = low - (abs(low) / 2 or 0.5), high + (abs(high) / 2 or 0.5)
        room = margin * (high - low)
        self.low, self.high = low if low == 0 else low - room, high + room
        self.begin, self.end = begin, end

    def _straight(self, value: float) -> float:
        return math.log10(value) if self.logarithmic else value

    def __call__(self, value: float) -> float:
        share = (self._straight(value) - self.low) / (self.high - self.low)
        return self.begin + share * (self.end - self.begin)

    def ticks(self, few: int) -> list[float]:
        """About `few` round numbers on the scale."""
        if self.logarithmic:
            decades = range(math.floor(self.low), math.ceil(self.high) + 1)
            digits = (1,) if self.high - self.low > 2 else (1, 2, 5)
            marks = [digit * 10.0**decade for decade in decades for digit in digits]
            marks = [mark for mark in marks if self.low <= math.log10(mark) <= self.high]
            return marks[:: math.ceil(len(marks) / (2 * few))]
        rough = (self.high - self.low) / few
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(digit * power for digit in (1, 2, 5, 10) if digit * power >= rough * 0.99)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [float(f"{i * step:.10g}") for i in range(first, last + 1)]


def _grid(across: _Scale, up: _Scale) -> list[str]:
    parts = []
    for tick in up.ticks(4):
        y = up(tick)
        parts.append(
            f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>'
            f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{number(tick)}</text>'
        )
    for tick in across.ticks(5):
        x = across(tick)
        parts.append(
            f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">'
            f"{number(tick)}</text>"
        )
    return parts


def _path(i: int, line: Line, across: _Scale, up: _Scale) -> str:
    places = [(across(x), up(y)) for x, y in line.points]
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.2"/>' for x, y in places if len(places) <= 60
    )
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return f'<g class="s{i % COLOURS}"><polyline points="{path}"/>{dots}</g>'
