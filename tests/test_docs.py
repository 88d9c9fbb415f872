"""What the documentation says can be done: its Python runs, its files and commands exist.

A code block is marked by a comment on the line above its fence: `<!-- run -->` runs it, after the
marked ones before it on the same page; `<!-- file: NAME -->` puts it into a file beside them. The
README needs no marks: all of it runs. All Python blocks are compiled. Trainings are cut to two
steps.
"""

import os
import re
import shlex
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import warm
import yaml

from lit_diffusion.training.commands.shell.shipped_configs import shipped_configs
from lit_diffusion.training.commands.table import COMMANDS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += sorted((ROOT / "docs/guide").glob("*.md"))
PAGES = [pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES if page.is_file()]
BLOCK = re.compile(r"(?:<!-- *([^\n]*?) *-->\n)?^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FOLDERS = "configs|docs|tests|benchmarks|lit_diffusion"
MENTIONED = re.compile(rf"(?<![\w./<-])((?:{FOLDERS})/[\w./*-]*[\w*/])")
MADE = ("docs/_build", "docs/gallery_built", "docs/api/generated")


def blocks(page, *languages):
    """(mark, code) of every block in one of the languages."""
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [(mark, code) for mark, language, code in found if language in languages]


def write_files(page, folder):
    """Write the files that a page makes, some of them in several blocks; return their marks."""
    made = [(mark, code) for mark, code in blocks(page, "python", "yaml") if "file: " in mark]
    for mark, code in made:
        with (folder / mark.removeprefix("file: ")).open("a", encoding="utf-8") as file:
            file.write(code)
    return {mark for mark, _ in made}


def commands(page):
    """The words of every shell command, continued lines joined."""
    for _, code in blocks(page, "bash", "console", "sh", "shell"):
        for line in code.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words = words[1:]
            if words:
                yield words


@pytest.mark.parametrize("page", PAGES)
def test_python_compiles(page):
    for _, code in blocks(page, "python"):
        compile(code, str(page), "exec")


@pytest.mark.parametrize("page", PAGES)
def test_yaml_parses(page):
    for _, code in blocks(page, "yaml"):
        assert isinstance(yaml.safe_load(code), dict)


@pytest.mark.parametrize("page", PAGES)
def test_marked_python_runs(page, tmp_path):
    unknown = {mark for mark, _ in blocks(page, "python", "yaml")} - {"", "run"}
    assert not unknown - write_files(page, tmp_path)
    script = [
        re.sub(r"\bmax_steps=[\d_]+", "max_steps=2", code)
        for mark, code in blocks(page, "python")
        if mark == "run" or page.name == "README.md"
    ]
    if not script:
        pytest.skip("nothing to run on this page")
    (tmp_path / "page.py").write_text("\n".join(script), encoding="utf-8")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"WANDB_MODE": "disabled", "CUDA_VISIBLE_DEVICES": ""}
    done = warm.run(
        [sys.executable, "page.py"],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": path.rstrip(os.pathsep), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("page", PAGES)
def test_files_exist(page):
    text = page.read_text(encoding="utf-8")
    for name in sorted(set(MENTIONED.findall(text))):
        if not name.startswith(MADE):
            assert list(ROOT.glob(name)), f"{name} is mentioned and does not exist"
    prose = re.sub(r"`[^`\n]*`", "", BLOCK.sub("", text))
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", prose):
        if "://" in link or link.startswith("mailto:"):
            continue
        target = page.parent / link
        # A link within the documentation may leave out .md, or point to what the build makes.
        made = str(os.path.relpath(target, ROOT)).startswith(MADE)
        assert made or target.exists() or target.with_suffix(".md").exists(), link


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist(page):
    made = {mark.removeprefix("file: ") for mark, _ in blocks(page, "yaml")}
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for words in commands(page):
        if words[0].endswith("make"):
            assert set(words[1:]) <= set(targets), words
        if not words[0].endswith("lit-diffusion"):
            continue
        assert words[1] in (*COMMANDS, "--help", "--version"), words
        for flag, value in pairwise(words):
            if words[1] == "new" and flag == "--out":
                made.add(value)
            if flag == "--config":
                known = value in made or value in shipped_configs()
                assert known or (ROOT / value).is_file(), value


def test_commands_are_found():
    assert {"fit", "validate", "test", "predict", "sample", "plugins"} <= set(COMMANDS)


def test_every_module_of_the_mathematics_has_its_page():
    text = (ROOT / "docs/api/index.md").read_text(encoding="utf-8")
    for path in sorted((ROOT / "lit_diffusion").rglob("[!_]*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if not re.search(r"\.(training|testing|conftest)\b", module):
            assert f"   {module}\n" in text, f"docs/api/index.md does not name {module}"


def test_every_objective_is_documented():
    """The table of the theory names every weighting and prediction that the library has."""
    import lit_diffusion
    from lit_diffusion import PREDICTIONS, SCHEDULES, WEIGHTINGS

    text = (ROOT / "docs/theory.md").read_text(encoding="utf-8")
    wrappers = {"ShiftedWeighting"}
    for family in (SCHEDULES, WEIGHTINGS, PREDICTIONS):
        for cls in family.classes():
            ours = getattr(lit_diffusion, cls.__name__, None) is cls  # not one of a doctest
            if ours and cls.__name__ not in wrappers:
                assert f"`{cls.__name__}" in text, f"docs/theory.md does not name {cls.__name__}"
