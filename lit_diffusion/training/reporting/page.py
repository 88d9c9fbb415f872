"""Render a page as one self-contained HTML file, from templates, a style sheet and pictures.

Every value that a template prints is escaped, home folders in it are shortened to ~, and secrets
of addresses are masked. The page makes no network request: it has no script and no font, and its
pictures are part of the file.
"""

from __future__ import annotations

import html
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from lit_diffusion.training.reporting.parts import Part
from lit_diffusion.training.run.secrets import without_secrets

__all__ = ["number", "page", "render", "text"]

# The browser is told as well to run no script and to fetch nothing.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
# A report is shared with others, and a home folder often has the name of its user.
HOME = re.compile(
    r"(?<![\w.~])(?:/home/|/Users/|[A-Za-z]:\\Users\\)[^/\\\s'\"]+|(?<![\w.~/])/root\b"
)


def text(value: Any) -> str:
    """A value as escaped text, with home folders shortened to ~.

    Args:
        value: Anything that has a str.

    Example:
        >>> text("<b> & /home/ann/digits")
        '&lt;b&gt; &amp; ~/digits'
    """
    return html.escape(_shown(str(value)))


def _shown(value: Any) -> Any:
    """Mask secrets and shorten home folders in a text; applied to each value of a template."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    value = without_secrets(value)
    here = os.path.expanduser("~")
    if len(here) > 1:
        value = value.replace(here, "~")
    return HOME.sub("~", value)


def number(value: float | None) -> str:
    """A number with at most four digits; None gives an empty string.

    Args:
        value: Any number.

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
    digits = re.sub(r"e([+-])0*", r"e\1", f"{value / size:.4g}{letter}")
    return digits.replace("e+", "e").replace("-", "−")


@cache
def _environment() -> Environment:
    templates = Environment(
        loader=PackageLoader("lit_diffusion.training.reporting"),
        autoescape=select_autoescape(["html"]),
        finalize=_shown,
        undefined=StrictUndefined,
        keep_trailing_newline=False,
    )
    templates.filters |= {"anchor": _anchor, "html": _html, "number": number}
    return templates


def render(template: str, **values: Any) -> str:
    """Fill in a template of this package.

    Args:
        template: Its file name in `templates/`; values are escaped if it ends in .html.
        **values: The values that it names.
    """
    return _environment().get_template(template).render(**values)


def _html(parts: Iterable[Part]) -> Markup:
    """The HTML of parts, each from the template with the name of its class."""
    return Markup("").join(
        Markup(render(f"{type(part).__name__.lower()}.html", part=part)) for part in parts
    )


def _anchor(heading: str) -> str:
    return re.sub(r"\W+", "-", heading.lower())


def page(title: str, head: Sequence[Part], sections: Mapping[str, Sequence[Part]]) -> str:
    """Render the whole page in ASCII, which is the same in any encoding.

    Args:
        title: The title of the page.
        head: The parts below the title.
        sections: Heading → parts; a section without parts is left out.
    """
    filled = {name: parts for name, parts in sections.items() if parts}
    whole = render("page.html", title=title, head=head, sections=filled, policy=POLICY)
    return whole.encode("ascii", "xmlcharrefreplace").decode("ascii") + "\n"
