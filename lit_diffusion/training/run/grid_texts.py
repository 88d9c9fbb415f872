"""The texts of the images of a grid, stored in the picture itself, which then says what it shows.

PNG files have text chunks beside the pixels; one of them, in UTF-8, has the texts as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["text_chunk", "texts_of"]

NAME = "Texts"


def text_chunk(texts: Sequence[str], columns: int) -> Any:
    """The chunk with the texts of a grid, as PIL's argument `pnginfo`.

    Args:
        texts: The text of each image, row by row.
        columns: Images per row.
    """
    from PIL.PngImagePlugin import PngInfo

    rows = [list(texts[i : i + columns]) for i in range(0, len(texts), columns)]
    chunk = PngInfo()
    chunk.add_itxt(NAME, json.dumps(rows, ensure_ascii=False))
    return chunk


def texts_of(path: Path) -> list[list[str]]:
    """The texts of the images of a grid, row by row; none if it was saved without.

    Args:
        path: The PNG file.
    """
    from PIL import Image

    with Image.open(path) as picture:
        picture.load()  # a chunk may follow the pixels
        rows: list[list[str]] = json.loads(picture.info.get(NAME, "[]"))
    return rows
