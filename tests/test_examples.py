"""The examples run in an empty folder, and what they print is close to the truth."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name, folder):
    """Run an example; return the pairs of numbers (found, truth) it prints."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / name], cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    pattern = r"(-?[\d.]+)(?:  \(truth |, of data )(-?[\d.]+)"
    return [(float(found), float(truth)) for found, truth in re.findall(pattern, done.stdout)]


@pytest.mark.slow
def test_minimal(tmp_path):
    share, mean, along_x, along_y = run("minimal.py", tmp_path)
    assert abs(share[0] - share[1]) < 0.05
    assert abs(mean[0] - mean[1]) < 0.05
    assert abs(along_x[0] - along_x[1]) < 0.06
    assert abs(along_y[0] - along_y[1]) < 0.05
    text = (EXAMPLES / "minimal.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 80
    assert set(re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE)) == {
        "torch",
        "lit_diffusion",
    }


@pytest.mark.slow
def test_with_lightning(tmp_path):
    for found, truth in run("with_lightning.py", tmp_path):
        assert abs(found - truth) < 0.2
