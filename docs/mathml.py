"""Formulas as MathML, which browsers show by themselves: no script, no font, no network."""

from docutils import nodes
from latex2mathml.converter import convert


def inline(self, node):
    """$…$ within a sentence."""
    self.body.append(convert(node.astext()))
    raise nodes.SkipNode


def block(self, node):
    """A formula on its own lines, numbered if it has a label."""
    self.body.append(self.starttag(node, "div", CLASS="math"))
    if number := node.get("number"):
        self.body.append(f'<span class="eqno">({number})</span>')
    self.body.append(convert(node.astext(), display="block"))
    self.body.append("</div>")
    raise nodes.SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
