"""Write matplotlib figures atomically."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["save_figure"]


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure atomically; parent folders are created.

    Args:
        figure: A matplotlib figure.
        path: The file; its suffix determines the format.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    try:
        figure.savefig(unfinished, format=path.suffix[1:])
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
