"""Figures written to files, in the colours of the report.

with figure_style():                 text, axes and colours of all figures
    figure = new_figure(9, 5)        without a window, and without a list that keeps it alive
    …
save_figure(figure, path)
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from lit_diffusion.training.run.whole_file import replacing

__all__ = ["INK", "LINE", "PALETTE", "SOFT", "figure_style", "new_figure", "save_figure"]

# Those of the lines in the report's style sheet, in daylight; the first is the main one.
PALETTE = ("#17407f", "#b45f06", "#2d7d46", "#8a3a86", "#0b7285", "#a11d33")
INK, SOFT, LINE = "#1c1e22", "#596070", "#dfe3ea"


def figure_style() -> AbstractContextManager[None]:
    """The style of everything that is plotted within the context."""
    import matplotlib

    return matplotlib.rc_context(
        {
            "axes.edgecolor": SOFT,
            "axes.grid": True,
            "axes.grid.axis": "y",
            "axes.axisbelow": True,
            "axes.labelcolor": SOFT,
            "axes.prop_cycle": f"cycler('color', {list(PALETTE)})",
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.titlesize": 10,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "font.family": "sans-serif",
            "font.size": 9,
            "grid.color": LINE,
            "legend.frameon": False,
            "text.color": INK,
            "xtick.color": SOFT,
            "ytick.color": SOFT,
        }
    )


def new_figure(width: float, height: float, dpi: int = 100) -> Any:
    """An empty figure of matplotlib, not of pyplot, which opens a window and keeps it alive.

    Args:
        width: Width in inches.
        height: Height in inches.
        dpi: Pixels per inch.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure, whole or not at all.

    Args:
        figure: A figure of matplotlib.
        path: The file, whose suffix gives the format; its folder is created if it is missing.
    """
    with replacing(path) as unfinished:
        figure.savefig(unfinished, format=path.suffix[1:])
