"""Configs by their short names, from any folder, also of an installed wheel."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from lit_diffusion.training.commands.shell.errors import UsageError
from lit_diffusion.training.commands.shell.shipped_configs import (
    shipped_configs,
    with_shipped_configs,
)

ROOT = Path(__file__).parents[2]


def test_all_configs_have_a_short_name():
    files = {path.resolve() for path in (ROOT / "configs").rglob("*.yaml")}
    assert {path.resolve() for path in shipped_configs().values()} == files
    assert {"digits", "objective/edm", "with/ema"} < set(shipped_configs())


def test_short_names_become_paths_and_all_else_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    known = shipped_configs()
    words = [
        "fit",
        "--config",
        "digits",
        "--config=objective/edm",
        "-c",
        "my.yaml",
        "--name",
        "digits",
    ]
    assert with_shipped_configs(words) == [
        "fit", "--config", str(known["digits"]), f"--config={known['objective/edm']}", "-c",
        "my.yaml", "--name", "digits",
    ]  # fmt: skip
    for value in ("nowhere/my.yaml", "./digits", "{name: a}", "name: a"):
        assert with_shipped_configs(["fit", "--config", value])[2] == value
    assert with_shipped_configs(["fit", "--config"]) == ["fit", "--config"]
    with pytest.raises(UsageError, match=r"comes with the package\. Did you mean digits"):
        with_shipped_configs(["fit", "--config", "digts"])


def test_it_is_said_which_was_taken_and_a_file_here_wins(cli):
    words = ["objective", "--config", "objective/p2"]
    code, _, err = cli(*words)
    assert code == 0
    assert f"Config objective/p2: {shipped_configs()['objective/p2']}.\n" in err
    Path("objective").mkdir()
    Path("objective/p2").write_text("model: {weighting: EDMWeighting}\n")
    code, _, err = cli(*words, "--model.weighting=ELBOWeighting")
    assert code == 0
    assert "Config objective/p2: the file of that name here, not the one of the package." in err
    code, _, err = cli("objective", "--config=objctive/p2")
    assert code == 2
    assert err.startswith("lit-diffusion: error: --config objctive/p2: there is no such file")


@pytest.mark.slow
def test_a_wheel_has_them(tmp_path):
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "-w", tmp_path, ROOT]
    subprocess.run(pip, check=True)
    (wheel,) = tmp_path.glob("lit_diffusion-*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path / "installed")
    folder = tmp_path / "empty"
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "lit_diffusion", "objective", "--config", "digits"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "installed"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert f"Config digits: {tmp_path}/installed/lit_diffusion/configs/digits.yaml." in done.stderr
