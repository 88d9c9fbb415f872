"""The texts of the images of a grid, stored in the picture itself, which then says what it shows.

PNG files have text chunks beside the pixels; one of them, in UTF-8, has the texts as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["add_texts", "texts_of"]

TEXTS = "Texts"


def add_texts(note: Any, texts: Sequence[str], columns: int) -> None:
    """Add the texts of a grid to the chunks of its file.

    Args:
        note: A `PngInfo` of PIL.
        texts: The text of each image, row by row.
        columns: Images per row.
    """
    rows = [list(texts[i : i + columns]) for i in range(0, len(texts), columns)]
    note.add_itxt(TEXTS, json.dumps(rows, ensure_ascii=False))


def texts_of(path: Path) -> list[list[str]]:
    """The texts of the images of a grid, row by row; none if it was saved without.

    Args:
        path: The PNG file.
    """
    from PIL import Image

    with Image.open(path) as picture:
        picture.load()  # a chunk may follow the pixels
        rows: list[list[str]] = json.loads(picture.info.get(TEXTS, "[]"))
    return rows
