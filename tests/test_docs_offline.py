"""The documentation reads without a network: formulas are MathML, and nothing is fetched."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def theory(tmp_path_factory):
    """The page of the theory, built by the documentation's own settings but the gallery's."""
    pytest.importorskip("sphinx")
    folder = tmp_path_factory.mktemp("docs")
    settings = (ROOT / "docs/conf.py").read_text(encoding="utf-8")
    settings = settings.replace("Path(__file__).parent", repr(str(ROOT / "docs")))
    settings = settings.replace('    "sphinx_gallery.gen_gallery",\n', "")
    (folder / "conf.py").write_text(f"from pathlib import Path\n{settings}", encoding="utf-8")
    text = (ROOT / "docs/theory.md").read_text(encoding="utf-8")
    (folder / "index.md").write_text(text, encoding="utf-8")
    (folder / "_static").mkdir()
    (folder / "_static/math.css").write_text("")
    words = [sys.executable, "-m", "sphinx", "-q", "-b", "html", str(folder), str(folder / "out")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return text, (folder / "out/index.html").read_text(encoding="utf-8")


def test_every_formula_is_mathml(theory):
    text, page = theory
    blocks = len(re.findall(r"^\$\$\n.*?\n\$\$", text, re.MULTILINE | re.DOTALL))
    assert blocks > 10
    assert page.count('display="block"') >= blocks
    assert page.count("<math") > 200
    assert "merror" not in page
    for formula in re.findall(r"<math.*?</math>", page, re.DOTALL):
        assert "\\" not in formula, formula  # a macro that was not understood


def test_a_page_fetches_nothing(theory):
    tags = re.findall(r"<(?:script|link|img)\b[^>]*>", theory[1])
    assert tags
    assert not [tag for tag in tags if "http:" in tag or "https:" in tag]
