"""The two axes of a plot: from values to coordinates of an SVG, with ticks at round numbers."""

from __future__ import annotations

import math
from itertools import pairwise

from lit_diffusion.training.reporting.page import number, text

__all__ = ["BOTTOM", "HEIGHT", "RIGHT", "TOP", "WIDTH", "Scale", "axes", "left_margin"]

WIDTH, HEIGHT = 440, 246
RIGHT, TOP, BOTTOM = 14, 8, 42  # margins; the left one has room for the labels
CHARACTER = 8.6  # width of a digit, at the size of the text on a phone


class Scale:
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
        """The coordinate of a value."""
        share = (self._straight(value) - self.low) / (self.high - self.low)
        return self.begin + share * (self.end - self.begin)

    def ticks(self, few: int) -> list[float]:
        """About `few` round numbers on the scale."""
        if self.logarithmic:
            decades = range(math.floor(self.low), math.ceil(self.high) + 1)
            digits = (1,) if self.high - self.low > 2 else (1, 2, 5)
            marks = [digit * 10.0**power for power in decades for digit in digits]
            marks = [m for m in marks if self.low - 1e-9 <= math.log10(m) <= self.high + 1e-9]
            if len(marks) > 2:
                return marks[:: math.ceil(len(marks) / (2 * few))]
            low, high = (
                10.0**self.low,
                10.0**self.high,
            )  # at most two marks: a linear axis has more
        else:
            low, high = self.low, self.high
        rough = (high - low) / few
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(digit * power for digit in (1, 2, 5, 10) if digit * power >= rough * 0.99)
        first = math.ceil(low / step - 1e-9)
        last = math.floor(high / step + 1e-9)
        return [float(f"{i * step:.10g}") for i in range(first, last + 1)]


def labels(ticks: list[float]) -> list[str]:
    """The ticks as text, with as many digits as are needed to distinguish them.

    Args:
        ticks: Increasing numbers.

    Example:
        >>> labels([1000.0, 1000.2, 1000.4]), labels([0.0, 50000.0])
        (['1000.0', '1000.2', '1000.4'], ['0', '50k'])
    """
    short = [number(tick) for tick in ticks]
    if len(set(short)) == len(short):
        return short
    step = min(b - a for a, b in pairwise(ticks))
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [f"{tick:.{decimals}f}".replace("-", "−") for tick in ticks]


def left_margin(up: Scale) -> float:
    """The width of the labels of a vertical axis.

    Args:
        up: The axis.
    """
    return max(40.0, 8 + CHARACTER * max((len(label) for label in labels(up.ticks(4))), default=0))


def axes(across: Scale, up: Scale, x: str, lines: bool = True) -> list[str]:
    """Labels at the ticks of both axes, and horizontal lines; each within the picture.

    Args:
        across: The horizontal axis.
        up: The vertical axis.
        x: The label of the horizontal axis.
        lines: Whether there are horizontal lines at the ticks.
    """
    parts = []
    left = across.begin
    for tick, label in zip(up.ticks(4), labels(up.ticks(4)), strict=True):
        y = up(tick)
        if lines:
            parts.append(f'<line x1="{left:.1f}" y1="{y:.1f}" x2="{across.end}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 5:.1f}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    middle = (across.begin + across.end) / 2
    parts.append(f'<text x="{middle:.0f}" y="{HEIGHT - 3}" text-anchor="middle">{text(x)}</text>')
    for tick, label in zip(across.ticks(5), labels(across.ticks(5)), strict=True):
        place = min(across(tick), WIDTH - CHARACTER / 2 * len(label))
        parts.append(
            f'<text x="{place:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{label}</text>'
        )
    return parts
