"""The guide to plug-ins, followed to the letter: its files and commands, in an empty folder."""

import glob
import os
import re
import shlex
import sys
from pathlib import Path

import pytest
import warm

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/guide/write-a-plugin.md").read_text(encoding="utf-8")
FILES = re.findall(r"^<!-- file: (\S+) -->\n```\w+\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
BLOCKS = re.findall(r"^```bash\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
TINY = [
    "--trainer.max_steps=2",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.log_every_n_steps=1",
    "--data.steps_per_epoch=2",
    "--data.batch_size=4",
    "--data.val_examples=6",
    "--data.num_workers=0",
    "--model.sampler.steps=2",
]
PROGRAMS = {"lit-diffusion": ["-m", "lit_diffusion"], "python": []}


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What each command of the page prints, in order."""
    folder = tmp_path_factory.mktemp("guide")
    (folder / "configs").symlink_to(ROOT / "configs")
    for name, text in FILES:
        with (folder / name).open("a", encoding="utf-8") as file:
            file.write(text)
    found = {}
    for line in "".join(BLOCKS).splitlines():
        program, *words = shlex.split(line)
        done = warm.run(
            [sys.executable, *PROGRAMS[program], *words, *(TINY if "fit" in words else [])],
            cwd=folder,
            env=os.environ | {"WANDB_MODE": "disabled", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{line}\n{done.stderr[-2000:]}"
        found[line] = done.stdout + done.stderr
    metrics = sorted(glob.glob(f"{folder}/runs/digits/*/metrics.csv"))
    found["metrics"] = [Path(path).read_text(encoding="utf-8") for path in metrics]
    return found


def of(said, *words):
    """The output of the one command that has these words."""
    (text,) = [text for line, text in said.items() if all(word in line for word in words)]
    return text


def test_the_list_has_all_families(said):
    listed = of(said, "plugins --plugins").splitlines()
    for name in ("RampSchedule", "BumpWeighting", "DifferencePrediction", "AveragingSampler"):
        assert any(re.match(f"  {name} +my_plugins ", line) for line in listed)


def test_a_run_has_all_of_them(said):
    assert "BumpWeighting(centre=0, width=2)" in of(said, "my_run.yaml")
    assert "RampSchedule(logsnr_min=-10, " in of(said, "my_run.yaml")
    with_callback, without, *_ = said["metrics"]
    assert "samples/mean" in with_callback
    assert "samples/mean" not in without
    assert "width=3" in of(said, "--model.weighting.width 3")


def test_a_command_of_ones_own(said):
    assert "`last` is the newest in runs/" in of(said, "sample_mean.py --help")
    assert re.search(r"^mean -?\d\.\d+, standard", of(said, "sample_mean.py last"), re.MULTILINE)
