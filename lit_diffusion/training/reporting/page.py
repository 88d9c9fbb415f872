"""One HTML file that needs nothing else: text, numbers, tables, pictures, and their style.

Everything that comes from a run goes through `text`, `number` or `picture`. Nothing on the page
is asked of a network: no script, no font, and pictures are within the file.
"""

from __future__ import annotations

import base64
import html
import io
import math
import os
import re
from pathlib import Path
from typing import Any

import yaml

__all__ = [
    "code",
    "fold",
    "markdown",
    "number",
    "page",
    "paragraph",
    "picture",
    "plain",
    "table",
    "text",
]

LARGE = 150_000  # bytes of a picture; above, it is made smaller
LONG = 48  # letters of a cell; above, it has several lines
EDGE = 1000  # pixels at most of one that is made smaller
# The browser is told, too, that nothing here runs and nothing is fetched.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
# A report is shown to others, and a user's name is often that of a folder.
HOME = re.compile(
    r"(?<![\w.~])(?:/home/|/Users/|[A-Za-z]:\\Users\\)[^/\\\s'\"]+|(?<![\w.~/])/root\b"
)


def text(value: Any) -> str:
    """A value as text of a page; home folders are shortened to ~.

    Args:
        value: Whatever has a str.

    Example:
        >>> text("<b> & /home/ann/digits")
        '&lt;b&gt; &amp; ~/digits'
    """
    said, here = str(value), os.path.expanduser("~")
    if len(here) > 1:
        said = said.replace(here, "~")
    return html.escape(HOME.sub("~", said))


def number(value: float | None) -> str:
    """A number of at most four digits.

    Args:
        value: Any; of None nothing is said.

    Example:
        >>> number(-0.0125), number(2500.0), number(1.5e6), number(2e-5), number(float("nan"))
        ('−0.0125', '2500', '1.5M', '2e−5', 'nan')
    """
    if value is None:
        return ""
    if not math.isfinite(value):
        return str(value)
    size, letter = 1.0, ""
    if 1e4 <= abs(value) < 1e12:
        scales = ((1e9, "G"), (1e6, "M"), (1e3, "k"))
        size, letter = next(pair for pair in scales if abs(value) >= pair[0])
    said = re.sub(r"e([+-])0*", r"e\1", f"{value / size:.4g}{letter}")
    return said.replace("e+", "e").replace("-", "−")


def paragraph(value: Any, kind: str = "") -> str:
    """A paragraph of text.

    Args:
        value: The text.
        kind: Its class in the style.
    """
    return f'<p class="{kind}">{text(value)}</p>' if kind else f"<p>{text(value)}</p>"


def code(value: str) -> str:
    """Lines as they are, in a box of their own.

    Args:
        value: The lines.
    """
    return f'<pre tabindex="0">{text(value)}</pre>'


def plain(data: Any) -> str:
    """Plain data as lines to read.

    Args:
        data: Dictionaries, lists, strings and numbers.

    Example:
        >>> print(plain({"samples": 1500, "reference": {"split": "test"}}))
        samples: 1500
        reference:
          split: test
    """
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=80).strip()


def fold(summary: str, inner: str) -> str:
    """What is shown when its line is clicked.

    Args:
        summary: The line.
        inner: HTML.
    """
    return f"<details><summary>{text(summary)}</summary>{inner}</details>"


def table(heads: list[Any], rows: list[list[Any]], title: str) -> str:
    """A table that scrolls in a box of its own; floats are numbers, all else is text.

    Args:
        heads: Of the columns.
        rows: Of as many cells.
        title: What the box is called where it is read aloud.
    """

    def cell(value: Any) -> str:
        if isinstance(value, float):
            return f'<td class="number">{number(value)}</td>'
        said = "" if value is None else str(value)
        kind = ' class="long"' if len(said) > LONG else ""
        return f"<td{kind}>{text(said)}</td>"

    head = "".join(f'<th scope="col">{text(name)}</th>' for name in heads)
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{text(title)}"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def picture(file: Path, alt: str, caption: str, kind: str = "") -> str:
    """A figure with a picture in it.

    Args:
        file: A PNG or JPEG.
        alt: What is to be seen, for those who cannot.
        caption: Below it.
        kind: Its class in the style.

    Raises:
        OSError: If it is no picture that can be read.
    """
    from PIL import Image

    data, coding = file.read_bytes(), "png"
    with Image.open(io.BytesIO(data)) as image:
        image.load()  # a damaged picture is found here, not by the reader
        if len(data) > LARGE:
            image = image.convert("RGB")
            image.thumbnail((EDGE, EDGE))
            smaller = io.BytesIO()
            image.save(smaller, format="JPEG", quality=85, optimize=True)
            data, coding = smaller.getvalue(), "jpeg"
        elif image.format == "JPEG":
            coding = "jpeg"
        size = f'width="{image.width}" height="{image.height}"'
    source = f"data:image/{coding};base64,{base64.b64encode(data).decode()}"
    return (
        f'<figure class="picture {kind}"><div class="scroll">'
        f'<img src="{source}" {size} alt="{text(alt)}"></div>'
        f"<figcaption>{text(caption)}</figcaption></figure>"
    )


def markdown(lines: str) -> str:
    r"""Headings, tables and paragraphs of a Markdown file; all else stays as it is written.

    Args:
        lines: The file.

    Example:
        >>> markdown("# A\n\nIt *is*.")
        '<h3>A</h3><p>It is.</p>'
    """
    found = []
    for block in re.split(r"\n\s*\n", lines.strip()):
        rows = [re.sub(r"[*`]", "", row.strip()) for row in block.splitlines()]
        if rows[0].startswith("!["):  # pictures are the page's own affair
            continue
        if rows[0].startswith("#"):
            found.append(f"<h3>{text(rows.pop(0).lstrip('# '))}</h3>")
        if len(rows) > 1 and all(row.startswith("|") for row in rows):
            cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
            found.append(table(cells[0], [list(row) for row in cells[2:]], "Table"))
        elif rows:
            found.append(paragraph(" ".join(rows)))
    return "".join(found)


def page(title: str, head: str, sections: dict[str, str]) -> str:
    """The whole page, in ASCII, so that it is the same in any encoding.

    Args:
        title: Of the page.
        head: HTML below the title.
        sections: Heading → HTML; those without any are left out.
    """
    there = {name: inner for name, inner in sections.items() if inner}
    names = {name: re.sub(r"\W+", "-", name.lower()) for name in there}
    links = "".join(f'<li><a href="#{names[name]}">{text(name)}</a></li>' for name in there)
    body = "".join(
        f'<section id="{names[name]}"><h2>{text(name)}</h2>{inner}</section>'
        for name, inner in there.items()
    )
    whole = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f'<link rel="icon" href="data:,">\n<title>{text(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<header><h1>{text(title)}</h1>{head}</header>\n"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav>\n<main>{body}</main>\n'
        "</body>\n</html>\n"
    )
    return whole.encode("ascii", "xmlcharrefreplace").decode("ascii")


STYLE = """
:root { color-scheme: light dark;
  --paper: #ffffff; --ink: #1c1e22; --soft: #596070; --line: #dfe3ea; --box: #f5f6f9;
  --s0: #17407f; --s1: #b45f06; --s2: #2d7d46; --s3: #8a3a86; --s4: #0b7285; --s5: #a11d33; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #15171b; --ink: #e6e8ec; --soft: #a3abb9; --line: #343944; --box: #1e2127;
  --s0: #8ab4f8; --s1: #eba45c; --s2: #7bc894; --s3: #d79ad4; --s4: #68c3d4; --s5: #f28b9b; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 1120px; padding: 0 16px 48px; overflow-wrap: anywhere;
  background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 28px 0 4px; }
h2 { font-size: 1.3rem; margin: 40px 0 8px; padding-top: 12px; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 24px 0 4px; }
figcaption h3 { margin: 0; }
p { margin: 8px 0; max-width: 72ch; }
.soft, figcaption, figure p { color: var(--soft); font-size: .875rem; }
.fault { color: var(--s5); }
a { color: var(--s0); }
nav ul, .cards, .keys { list-style: none; margin: 0; padding: 0; display: flex; flex-wrap: wrap; }
nav ul { gap: 4px 16px; margin-top: 20px; font-size: .9375rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(164px, 1fr));
  gap: 10px 20px; margin: 16px 0; }
.facts dt { color: var(--soft); font-size: .8125rem; }
.facts dd { margin: 0; }
ul.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(196px, 1fr));
  gap: 12px; margin: 20px 0 0; }
.cards > li { min-width: 0; background: var(--box); border-radius: 8px;
  padding: 12px 16px; }
.cards b { display: block; font-size: 1.7rem; line-height: 1.2;
  font-variant-numeric: tabular-nums; }
.cards small { display: block; color: var(--soft); font-size: .8125rem; }
figure { margin: 16px 0; min-width: 0; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr));
  gap: 8px 32px; }
.chart { margin: 12px 0; max-width: 560px; }
.chart h3 { color: var(--ink); }
.chart svg { display: block; width: 100%; height: auto; margin-top: 6px; }
.chart text { fill: var(--soft); font-size: 12px; }
.chart line { stroke: var(--line); }
.chart polyline { fill: none; stroke: currentColor; stroke-width: 1.8; stroke-linejoin: round; }
.chart circle { fill: currentColor; }
.keys { gap: 0 16px; font-size: .875rem; }
.keys li::before { content: ""; display: inline-block; width: 14px; height: 3px;
  border-radius: 2px; background: currentColor; vertical-align: middle; margin-right: 6px; }
.keys b { font-weight: 600; font-variant-numeric: tabular-nums; }
.s0 { color: var(--s0); } .s1 { color: var(--s1); } .s2 { color: var(--s2); }
.s3 { color: var(--s3); } .s4 { color: var(--s4); } .s5 { color: var(--s5); }
img { display: block; height: auto; background: #fff; border-radius: 6px; }
.scroll { overflow-x: auto; }
.picture .scroll img { width: 100%; max-width: 1000px; min-width: 640px; }
.picture.small .scroll img { max-width: 640px; min-width: 480px; }
.strip { display: flex; gap: 16px; overflow-x: auto; scroll-snap-type: x proximity;
  padding-bottom: 8px; }
.strip .picture { flex: 0 0 min(84%, 340px); margin: 8px 0; scroll-snap-align: start; }
.strip .picture .scroll img { min-width: 0; max-width: none; }
@media (min-width: 720px) {
  .strip { display: grid; grid-template-columns: repeat(auto-fill, minmax(250px, 1fr)); } }
@media (max-width: 480px) { body { padding: 0 12px 32px; } .chart text { font-size: 15px; } }
table { border-collapse: collapse; font-size: .875rem; overflow-wrap: normal; }
th, td { text-align: left; padding: 5px 16px 5px 0; border-bottom: 1px solid var(--line);
  vertical-align: top; white-space: nowrap; }
td.long { min-width: 32ch; max-width: 60ch; white-space: normal; overflow-wrap: anywhere; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
details { margin: 8px 0; }
summary { cursor: pointer; color: var(--s0); }
pre { margin: 8px 0; padding: 12px; overflow: auto; max-height: 32rem; background: var(--box);
  border-radius: 8px; font: .8125rem/1.45 ui-monospace, SFMono-Regular, Menlo, monospace; }
.cards pre { padding: 8px 0; white-space: pre-wrap; }
@media print { nav { display: none; } section { break-inside: avoid; } }
"""
