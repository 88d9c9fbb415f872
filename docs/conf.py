"""How the documentation is built: `make docs`, with every warning an error and no network."""

import re
import sys
from pathlib import Path

import lit_diffusion

sys.path.insert(0, str(Path(__file__).parent))  # for mathml.py

project = "lit_diffusion"
author = "the lit_diffusion developers"
copyright = author
version = release = lit_diffusion.__version__
language = "en"

extensions = [
    "mathml",
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
]
templates_path = ["_templates"]
exclude_patterns = ["_build", "gallery"]
myst_enable_extensions = ["dollarmath", "amsmath", "deflist"]
myst_heading_anchors = 3

html_theme = "furo"
html_math_renderer = "mathml"
html_title = "lit_diffusion"
html_static_path = ["_static"]
html_css_files = ["math.css"]
html_show_copyright = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

autosummary_generate = True
autosummary_ignore_module_all = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_preserve_defaults = True
default_role = "py:obj"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # or the fields of a NamedTuple would be described twice
napoleon_custom_sections = ["Shapes"]

sphinx_gallery_conf = {
    "examples_dirs": "gallery",
    "gallery_dirs": "gallery_built",
    "filename_pattern": "/plot_",
    "within_subsection_order": "FileNameSortKey",
    "download_all_examples": False,
    "write_computation_times": False,
    "min_reported_time": 60,
    "abort_on_example_error": True,
    "image_scrapers": ("matplotlib",),
}

# Docstrings are written for the editor and the terminal first: plain Unicode, shapes such as
# (B, *) and |x| as they are, diagrams simply indented. To reStructuredText a lone * or | would
# begin markup, and an indented diagram would be a quotation; so both are made plain here.
_CODE = re.compile(r"(``.*?``|`[^`]*`|(?<![\w*])\*\w[\w -]*\w?\*(?![\w*]))")
_ARGUMENT = re.compile(r"^\s*\*{1,2}\w+:")


def _plain(line):
    parts = _CODE.split(line)
    parts[::2] = [re.sub(r"(?<!\\)([*|])", r"\\\1", part) for part in parts[::2]]
    return "".join(parts)


def _make_plain(app, what, name, obj, options, lines):
    out, literal, doctest = [], None, False
    for i, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        blank = not line.strip()
        doctest = not blank and (doctest or line.lstrip().startswith(">>>"))
        if literal is not None and not blank and indent <= literal:
            literal = None
        if what == "module" and literal is None and indent and i and not lines[i - 1].strip():
            out += ["::", ""]
            literal = 0
        out.append(
            line if literal is not None or doctest or _ARGUMENT.match(line) else _plain(line)
        )
        if literal is None and line.rstrip().endswith("::"):
            literal = indent
    lines[:] = out


def setup(app):
    app.connect("autodoc-process-docstring", _make_plain, priority=100)  # before napoleon
