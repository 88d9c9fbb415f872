"""Heat maps as inline SVG: a small picture of one pixel per cell, between axes of real text."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence

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

__all__ = ["heat_map"]

CELLS = 200  # rows of the picture at most; the steps between two rows then have one row


def heat_map(
    title: str,
    columns: Sequence[float],
    rows: Sequence[float],
    values: Sequence[Sequence[float]],
    x: str,
    y: str,
) -> str:
    """A heat map of positive values on a logarithmic scale of colours; "" if there is none.

    Args:
        title: The title above the map.
        columns: The edges of the columns, increasing and equally spaced.
        rows: The edges of the rows, increasing; not necessarily equally spaced.
        values: A row of values for each interval of `rows`; one that is not positive is left out.
        x: The label of the horizontal axis.
        y: What the rows are, as in "steps".
    """
    shown = [v for row in values for v in row if math.isfinite(v) and v > 0]
    if not shown:
        return ""
    low, high = min(shown), max(shown)
    up = Scale([rows[0], rows[-1]], HEIGHT - BOTTOM, TOP)
    left, right = left_margin(up), WIDTH - RIGHT
    across = Scale([columns[0], columns[-1]], left, right)
    place = f'x="{left:.1f}" y="{TOP}" width="{right - left:.1f}" height="{HEIGHT - BOTTOM - TOP}"'
    parts = [
        f"<rect {place}/>",
        f'<image {place} preserveAspectRatio="none" href="{_pixels(rows, values, low, high)}"/>',
        *axes(across, up, x, lines=False),
    ]
    said = f"{title}, over {x} and {y}, from {number(low)} (dark) to {number(high)} (bright)"
    key = (
        f'<ul class="keys"><li class="ramp">{number(low)} to {number(high)}, logarithmic; '
        f"upwards: {text(y)}</li></ul>"
    )
    return (
        f'<figure class="chart"><figcaption><h3>{text(title)}</h3>{key}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text(said)}">'
        f"{''.join(parts)}</svg></figure>"
    )


def _pixels(
    rows: Sequence[float], values: Sequence[Sequence[float]], low: float, high: float
) -> str:
    """The cells as a PNG in a data URI, the last row on top; empty cells are transparent."""
    import numpy as np
    from matplotlib import colormaps
    from PIL import Image

    table = np.asarray(values, dtype=np.float64)
    seen = np.isfinite(table) & (table > 0)
    span = math.log(high / low) or 1.0
    share = np.log(np.where(seen, table, low) / low) / span
    colours = (colormaps["viridis"](share) * 255).round().astype(np.uint8)
    colours[..., 3] = np.where(seen, 255, 0)
    # One row of pixels for equal shares of the axis, since records need not be equally spaced.
    middles = rows[0] + (np.arange(CELLS) + 0.5) * (rows[-1] - rows[0]) / CELLS
    index = np.clip(
        np.searchsorted(np.asarray(rows), middles, side="right") - 1, 0, len(table) - 1
    )
    out = io.BytesIO()
    Image.fromarray(colours[index][::-1], "RGBA").save(out, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"
