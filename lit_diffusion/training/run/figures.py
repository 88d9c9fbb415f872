"""Figures written to files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lit_diffusion.training.run.whole_file import replacing

__all__ = ["save_figure"]


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure, whole or not at all.

    Args:
        figure: A figure of matplotlib.
        path: The file, whose suffix gives the format; its folder is created if it is missing.
    """
    with replacing(path) as unfinished:
        figure.savefig(unfinished, format=path.suffix[1:])
