"""A package of plug-ins, from its folder to a checkpoint: the guide's page in a fresh venv."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest
import yaml
from filelock import FileLock
from PIL import Image

import lit_diffusion
from lit_diffusion import SCHEDULES, WEIGHTINGS
from lit_diffusion.training.run.checkpoints import load_checkpoint

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/guide/plugin-package.md").read_text(encoding="utf-8")
SENTENCES = " ".join(PAGE.split())
COMMANDS = [
    shlex.split(line)
    for block in re.findall(r"^```bash\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
]
OVERLAY = "tests/plugin_package/rectified-flow.yaml"
TRAIN = ["fit", "--config", "configs/digits.yaml"]
TINY = [
    "--trainer.max_steps=3",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--data.steps_per_epoch=3",
    "--data.batch_size=4",
    "--data.val_examples=6",
    "--data.num_workers=0",
    "--model.sampler.steps=2",
    "--model.network.channels=[8,8]",
    "--model.network.attention=[]",
]


def offline(words):
    """What a command of the page is given besides: no index to install from, no long training."""
    if words[:3] == ["python", "-m", "pip"]:
        return ["--no-index", "--no-build-isolation", "--no-deps"]
    return TINY if "fit" in words and "--config" in words else []


class Desk:
    """A reader's desk: a fresh venv, a copy of the package's folder, and the configs."""

    def __init__(self, folder):
        self.folder = folder
        self.python = folder / "venv/bin/python"

    def lay(self):
        """Make all of it."""
        folder = self.folder
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
        # Python 3.11's venv comes with a setuptools that is older than the project asks for.
        self.run("python", "-m", "pip", "uninstall", "--yes", "setuptools").check_returncode()
        # The heavy packages are those of this interpreter: seen from there, not installed again.
        seen = [path for path in sys.path if path.endswith("-packages")]
        seen.append(str(Path(lit_diffusion.__file__).parents[1]))
        (site,) = (folder / "venv/lib").glob("python*/site-packages")
        (site / "seen.pth").write_text("\n".join(seen))
        package = folder / "tests/plugin_package"
        leave = shutil.ignore_patterns("build", "*.egg-info", "__pycache__")
        shutil.copytree(ROOT / "tests/plugin_package", package, ignore=leave)
        (folder / "configs").symlink_to(ROOT / "configs")

    def run(self, *words, **more):
        """Run a command of the page; `more` is of the environment."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYT", "PIP"))}
        environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **more}
        programs = {"python": [], "lit-diffusion": ["-m", "lit_diffusion"]}
        return subprocess.run(
            [self.python, *programs[words[0]], *words[1:]],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )


@pytest.fixture(scope="module")
def visit(tmp_path_factory, worker_id):
    """The desk, and what each command of the page said there, in order; once for all workers."""
    root = tmp_path_factory.getbasetemp()
    root = root if worker_id == "master" else root.parent
    desk, record = Desk(root / "desk"), root / "said.json"
    with FileLock(root / "desk.lock"):
        if not record.exists():
            shutil.rmtree(desk.folder, ignore_errors=True)  # of a worker that failed at it
            desk.lay()
            said = {}
            for words in COMMANDS:
                done = desk.run(*words, *offline(words))
                where = f"{shlex.join(words)}\n{done.stdout[-2000:]}{done.stderr}"
                assert done.returncode == 0, where
                said[shlex.join(words)] = done.stdout, done.stderr
            record.write_text(json.dumps(said))
    return desk, json.loads(record.read_text())


@pytest.fixture(scope="module")
def desk(visit):
    return visit[0]


@pytest.fixture(scope="module")
def said(visit):
    """What the command with some words in it said: (stdout, stderr)."""

    def find(part):
        (found,) = [texts for command, texts in visit[1].items() if part in command]
        return found

    return find


@pytest.fixture
def run_folder(desk):
    (folder,) = (desk.folder / "runs/digits").iterdir()
    return folder


def test_the_list_shows_both_with_their_package(said):
    listed, family = {}, None
    for line in said("plugins")[0].splitlines():
        if re.fullmatch(r"\w+", line):
            family = line
        elif "lit_diffusion_flow" in line.split():
            listed[family] = line.split()[0]
    assert listed == {"NoiseSchedule": "ModeSchedule", "Weighting": "RectifiedFlowWeighting"}
    assert "ModeSchedule" not in SCHEDULES  # it is the venv's, not ours
    assert "RectifiedFlowWeighting" not in WEIGHTINGS


def test_its_own_tests_pass_on_what_is_installed(said):
    summary = said("pytest")[0].splitlines()[-1]
    assert re.search(r"\b\d\d passed", summary)
    assert "failed" not in summary
    assert "skipped" not in summary


def test_its_docstring_is_the_help(said):
    text, _ = said("--model.weighting.help")
    assert "The flow-matching loss under the density p" in text
    assert "Schedule whose density is the weight; None means" in text


def test_the_overlay_draws_its_objective(said, desk):
    assert "RectifiedFlowWeighting" in said("objective")[0]
    with Image.open(desk.folder / "objective.png") as image:
        assert image.width > 500


def test_a_run_by_bare_names_is_of_the_package(said, run_folder):
    _, text = said(f"fit --config digits --config {OVERLAY}")
    assert "Objective: RectifiedFlowWeighting(" in text
    assert "sampled from ModeSchedule(scale=1.29, logsnr_min=-10, logsnr_max=13.3)" in text
    assert "Warning: Plug-in" not in text
    described = load_checkpoint(run_folder / "checkpoints/last.ckpt")["hyper_parameters"]
    assert described["schedule"]["class_path"] == "lit_diffusion_flow.ModeSchedule"
    assert described["weighting"]["class_path"] == "lit_diffusion_flow.RectifiedFlowWeighting"
    inner = described["weighting"]["init_args"]["schedule"]
    assert inner["class_path"] == "lit_diffusion_flow.ModeSchedule"
    config = yaml.safe_load((run_folder / "config.yaml").read_text())
    assert config["model"]["schedule"]["class_path"].startswith("lit_diffusion_flow.")
    assert not config["plugins"]


def test_its_checkpoint_draws_in_a_new_process(said, desk):
    assert said("sample")[0].splitlines()[-1] == "samples.png"
    with Image.open(desk.folder / "samples.png") as image:
        assert len(image.getcolors(100_000)) > 10


def test_the_wheel_holds_the_package_and_its_entry_point_alone(said, desk):
    (wheel,) = (desk.folder / "dist").glob("lit_diffusion_flow-*.whl")
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        assert {name.split("/")[0].split("-")[0] for name in names} == {"lit_diffusion_flow"}
        (entry_points,) = [name for name in names if name.endswith("entry_points.txt")]
        assert b"[lit_diffusion.plugins]" in file.read(entry_points)
    modules = {Path(name).name for name in names if name.endswith(".py")}
    folder = ROOT / "tests/plugin_package/lit_diffusion_flow"
    assert modules == {path.name for path in folder.glob("*.py")}


# Without the package: this interpreter does not have it ---------------------------------------


def only_line(err):
    """The one line of a mistake."""
    (line,) = [line for line in err.splitlines() if "error:" in line]
    assert "Traceback" not in err
    return line


@pytest.mark.parametrize(
    "words", [["sample"], ["validate", "--config", ROOT / "configs/digits.yaml"]]
)
def test_a_checkpoint_without_the_package_says_what_is_missing(words, run_folder, cli):
    code, _, err = cli(*words, "--ckpt_path", run_folder / "checkpoints/last.ckpt")
    assert code == 2
    assert "lit_diffusion_flow.ModeSchedule needs the package lit_diffusion_flow" in only_line(err)
    assert not list(Path().iterdir())
    if words == ["sample"]:
        told = only_line(err).removeprefix("lit-diffusion: error: ").partition(" (LIT_")[0]
        assert told in SENTENCES


def test_a_config_without_the_package_says_what_is_missing(run_folder, cli):
    code, _, err = cli("fit", "--config", run_folder / "config.yaml")
    assert code == 2
    assert "needs the package lit_diffusion_flow, which is not installed" in only_line(err)
    code, _, err = cli(*TRAIN[:-1], ROOT / TRAIN[-1], "--config", ROOT / OVERLAY)
    assert code == 2
    assert "install the package" in only_line(err)
    assert not list(Path().iterdir())


# Beside other packages ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Two more packages, as an importer sees them: one is broken, one has a name of ours."""
    folder = tmp_path_factory.mktemp("others")
    code = '''
        """A rival."""
        import torch
        from lit_diffusion import Weighting

        class SigmoidWeighting(Weighting):
            """A rival's weighting: 2."""

            def forward(self, logsnr):
                """2."""
                return 2 * torch.ones_like(logsnr)
    '''
    for name, text in {"rival": textwrap.dedent(code), "broken": "import does_not_exist"}.items():
        (folder / f"{name}_flow.py").write_text(text)
        info = folder / f"{name}_flow-1.0.dist-info"
        info.mkdir()
        metadata = f"Metadata-Version: 2.1\nName: {name}-flow\nVersion: 1.0\n"
        (info / "METADATA").write_text(metadata)
        entry = f"[lit_diffusion.plugins]\n{name} = {name}_flow\n"
        (info / "entry_points.txt").write_text(entry)
    return {"PYTHONPATH": str(folder)}


def test_a_broken_package_is_named_and_the_rest_is_listed(desk, others):
    done = desk.run("lit-diffusion", "plugins", **others)
    assert done.returncode == 0
    (line,) = [line for line in done.stderr.splitlines() if "Plug-in" in line]
    assert line.partition("Warning: ")[2] in SENTENCES
    assert "ModeSchedule" in done.stdout
    packages = re.findall(r"^  SigmoidWeighting +(\w+)", done.stdout, re.MULTILINE)
    assert packages == ["lit_diffusion", "rival_flow"]


def test_a_name_of_two_packages_is_refused_in_one_line_and_a_full_path_is_not(desk, others):
    words = ["lit-diffusion", *TRAIN, *TINY, "--model.weighting"]
    done = desk.run(*words, "SigmoidWeighting", **others)
    assert done.returncode == 2
    assert only_line(done.stderr).removeprefix("lit-diffusion: error: ") in SENTENCES
    for package in ("lit_diffusion", "rival_flow"):
        path = f"{package}.SigmoidWeighting"
        done = desk.run(*words, path, "--print_config", **others)
        assert done.returncode == 0, done.stderr
        weighting = yaml.safe_load(done.stdout)["model"]["weighting"]
        assert weighting["class_path"].startswith(package)
