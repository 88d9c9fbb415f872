"""The parts of a page as plain data: paragraphs, tables, pictures, charts.

A part contains no HTML; each kind has a template of its name in `templates/`. To add a kind, write
a dataclass here and a template there.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import yaml

__all__ = [
    "COLUMNS",
    "Card",
    "Cards",
    "Charts",
    "Code",
    "Facts",
    "Fold",
    "Heading",
    "Paragraph",
    "Part",
    "Picture",
    "Strip",
    "Table",
    "picture",
    "protocol",
]

LARGE = 150_000  # bytes of a picture; a larger one is made smaller
COLUMNS = "Columns"  # key of the names of a grid's columns, in its file
EDGE = 1000  # pixels at most along its longer side


class Part:
    """Anything that has a template of its class's name."""


@dataclass(frozen=True)
class Paragraph(Part):
    """A paragraph of text; `kind` is its class in the style sheet, such as soft or fault."""

    text: str
    kind: str = ""


@dataclass(frozen=True)
class Heading(Part):
    """A heading within a section."""

    text: str


@dataclass(frozen=True)
class Code(Part):
    """Preformatted lines in a box."""

    text: str


@dataclass(frozen=True)
class Fold(Part):
    """Parts that are hidden until the reader clicks on the summary."""

    summary: str
    parts: Sequence[Part]


@dataclass(frozen=True)
class Table(Part):
    """A table that scrolls horizontally in its own box.

    Floats are right-aligned with four digits, None is an empty cell, and all else is text. The
    title is read aloud by a screen reader and not shown.
    """

    LONG: ClassVar[int] = 48  # characters; a longer cell is wrapped

    title: str
    heads: Sequence[Any]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Picture(Part):
    """A picture; `source` is a data URI, `alt` a description for readers who cannot see it.

    `picture` reads one from a file. One with a `name`, which no other has, fills the window when
    it is clicked on. `columns` are names of the columns of a grid, shown below them.
    """

    source: str
    width: int
    height: int
    alt: str
    caption: str
    kind: str = ""
    name: str = ""
    columns: Sequence[str] = ()


@dataclass(frozen=True)
class Charts(Part):
    """Charts in a grid, each the SVG that `chart` or `heat_map` returns."""

    figures: Sequence[str]


@dataclass(frozen=True)
class Strip(Part):
    """Pictures in a row that scrolls on a small screen."""

    title: str
    pictures: Sequence[Picture]


@dataclass(frozen=True)
class Facts(Part):
    """Short facts with their names."""

    facts: Mapping[str, str]


@dataclass(frozen=True)
class Card:
    """One headline number with notes, and further parts below it."""

    title: str
    value: float
    notes: Sequence[str] = ()
    more: Sequence[Part] = field(default=())


@dataclass(frozen=True)
class Cards(Part):
    """The headline numbers of a run."""

    cards: Sequence[Card]


def protocol(data: Any, summary: str = "protocol") -> Fold:
    """Plain data, folded away as YAML.

    Args:
        data: Dictionaries, lists, strings and numbers.
        summary: The line to click on.

    Example:
        >>> print(protocol({"samples": 1500, "reference": {"split": "test"}}).parts[0].text)
        samples: 1500
        reference:
          split: test
    """
    lines = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=80).strip()
    return Fold(summary, [Code(lines)])


def picture(file: Path, alt: str, caption: str, kind: str = "", name: str = "") -> Picture:
    """Read a picture; one of more than `LARGE` bytes is scaled down and stored as JPEG.

    Args:
        file: A PNG or JPEG.
        alt: A description of what it shows.
        caption: The text below it.
        kind: Its class in the style sheet.
        name: A name that no other picture of the page has; it then fills the window on a click.

    Raises:
        OSError: If the file is not a readable picture.
    """
    from PIL import Image

    data, coding = file.read_bytes(), "png"
    with Image.open(io.BytesIO(data)) as opened:
        opened.load()  # a damaged picture must fail here, not in the browser
        columns = json.loads(opened.info.get(COLUMNS, "[]"))
        image: Image.Image = opened
        if len(data) > LARGE:
            image = image.convert("RGB")
            image.thumbnail((EDGE, EDGE))
            smaller = io.BytesIO()
            image.save(smaller, format="JPEG", quality=85, optimize=True)
            data, coding = smaller.getvalue(), "jpeg"
        elif opened.format == "JPEG":
            coding = "jpeg"
        width, height = image.size
    source = f"data:image/{coding};base64,{base64.b64encode(data).decode()}"
    if columns:
        alt += f"; columns: {', '.join(columns)}"
    return Picture(source, width, height, alt, caption, kind, name, columns)
