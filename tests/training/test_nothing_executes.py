"""Files of strangers are data: a checkpoint, an export and a run folder that name other code."""

import json
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import yaml
from test_cli import FAST
from torch import nn

import lit_diffusion as ld
from lit_diffusion.description import allowed_modules
from lit_diffusion.training import LitDiffusion, evaluate
from lit_diffusion.training.run.checkpoints import load_checkpoint

CONFIG = Path(__file__).parents[2] / "configs" / "digits.yaml"


class Unpickles(nn.Module):
    """Stands for any class of the process whose constructor executes the file it is given."""

    def __init__(self, shape: tuple[int, int, int] = (1, 8, 8), file: str = "") -> None:
        super().__init__()
        Path("executed").touch()


EVIL = {"class_path": "a_library.Unpickles", "init_args": {"file": "evil.pkl"}}


@pytest.fixture
def imported(monkeypatch, tmp_path):
    """A library that the process has imported for its own purposes, and an empty folder."""
    monkeypatch.chdir(tmp_path)
    library = types.ModuleType("a_library")
    library.Unpickles = Unpickles
    monkeypatch.setattr(Unpickles, "__module__", "a_library")
    monkeypatch.setitem(sys.modules, "a_library", library)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run and its export, made by nobody with bad intentions."""
    from lit_diffusion.training.cli import main

    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["lit-diffusion", "fit", "--config", str(CONFIG), *FAST])
        main()
        (run,) = Path("runs/digits").iterdir()
        patch.setattr(sys, "argv", ["lit-diffusion", "export", str(run), "--out", "export"])
        main()
        run.rename("run")
    return folder


@pytest.fixture
def run(trained, imported):
    """A copy of the run, in the working directory of the test."""
    shutil.copytree(trained / "run", "run")
    return Path("run")


def poison(run, argument):
    """Let the checkpoint and the config of a run name the class for an argument of the model."""
    path = run / "checkpoints" / "last.ckpt"
    checkpoint = load_checkpoint(path)
    checkpoint[LitDiffusion.CHECKPOINT_HYPER_PARAMS_KEY][argument] = EVIL
    torch.save(checkpoint, path)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"][argument] = EVIL
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    return path


COMMANDS = [
    ["sample", "--ckpt_path", "{path}", "--out", "grid.png"],
    ["validate", "--config", str(CONFIG), "--ckpt_path", "{path}"],
    ["predict", "--config", str(CONFIG), "--ckpt_path", "{path}"],
    ["evaluate", "--ckpt_path", "{path}", "--num_samples=16"],
    ["export", "run", "--out", "elsewhere"],
    ["objective", "--ckpt_path", "{path}"],
    ["report", "run"],
]


@pytest.mark.parametrize("argument", ["network", "schedule", "weighting"])
@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[0])
def test_no_command_constructs_what_a_checkpoint_names(cli, run, words, argument):
    path = poison(run, argument)
    code, _, err = cli(*(word.format(path=path) for word in words))
    assert not Path("executed").exists()
    if words[0] not in ("report", "objective"):  # which build the objective alone
        assert code == 2
        assert "a_library.Unpickles" in err


def test_nor_does_loading_it_in_python(run):
    path = poison(run, "network")
    with pytest.raises(ValueError, match=r"may not name a_library\.Unpickles"):
        LitDiffusion.load_from_checkpoint(path)
    assert not Path("executed").exists()


def test_nor_does_loading_an_export(trained, imported):
    shutil.copytree(trained / "export", "export")
    (path,) = [p for p in Path("export").glob("*.json") if "class_path" in p.read_text()]
    config = json.loads(path.read_text())
    config["model"]["init_args"]["network"] = EVIL
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"may not name a_library\.Unpickles"):
        ld.load_pretrained("export")
    assert not Path("executed").exists()


@pytest.mark.parametrize("features", [EVIL, "a_library.Unpickles", "Unpickles"], ids=str)
def test_evaluate_constructs_no_features_that_the_config_of_a_run_names(cli, run, features):
    config = yaml.safe_load((run / "config.yaml").read_text())
    fid = {"class_path": "lit_diffusion.training.FID", "init_args": {"features": features}}
    config["trainer"]["callbacks"] = [fid]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    words = ["--num_samples=16", "--bound=false"]
    code, _, err = cli("evaluate", "--ckpt_path", run / "checkpoints" / "last.ckpt", *words)
    assert not Path("executed").exists()
    assert code == 2
    assert "Unpickles" in err
    with pytest.raises(ValueError, match="Unpickles"):
        evaluate(run / "checkpoints" / "last.ckpt", num_samples=16, bound=False)
    assert not Path("executed").exists()


def test_a_plugin_that_cannot_be_imported_is_not_allowed(cli):
    Path("broken_plugin.py").write_text("raise ImportError('for want of a package')")
    with pytest.raises(ImportError, match="for want of a package"):
        cli("plugins", "--plugins", "broken_plugin")
    assert "broken_plugin" not in allowed_modules()


def test_a_replay_imports_what_the_user_names_only(cli, run):
    folder = run / "non_finite"
    folder.mkdir()
    Path("evil_plugin.py").write_text("open('executed', 'w')")
    config = yaml.safe_load((run / "config.yaml").read_text()) | {"plugins": ["evil_plugin"]}
    (folder / "step-0000001.yaml").write_text(yaml.safe_dump(config))
    record = {
        "step": 1, "batches": [], "checkpoint": None, "config": "step-0000001.yaml",
        "world_size": 1, "not_finite": "loss", "seed": 0, "accumulate_grad_batches": 1,
    }  # fmt: skip
    (folder / "step-0000001.json").write_text(json.dumps(record))
    cli("replay", folder / "step-0000001.json")
    assert not Path("executed").exists()


# The working directory is not code -----------------------------------------------------------


SCRIPT = Path(sys.executable).with_name("lit-diffusion")
STRANGERS = ("yaml", "torch", "lightning", "numpy", "PIL", "datasets", "json", "difflib", "random")


@pytest.fixture
def strangers(tmp_path, monkeypatch):
    """Files of a folder that have the names of modules, and a package's record that lies there."""
    monkeypatch.chdir(tmp_path)
    for name in (*STRANGERS, "stranger"):
        Path(f"{name}.py").write_text("open('executed', 'a').write(__name__)\n")
    info = Path("stranger-1.0.dist-info")
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[lit_diffusion.plugins]\nstranger = stranger\n")


@pytest.mark.parametrize(
    "start",
    [
        pytest.param([SCRIPT], marks=pytest.mark.skipif(not SCRIPT.is_file(), reason="no script")),
        [sys.executable, "-m", "lit_diffusion"],
    ],
    ids=["script", "module"],
)
def test_no_file_of_the_working_directory_is_executed(strangers, start):
    for words in (["plugins"], ["sample", "--ckpt_path", "last", "--out", "grid.png"]):
        done = subprocess.run([*start, *words], capture_output=True, text=True)
        assert done.returncode == (0 if words == ["plugins"] else 2), done.stderr
        assert not Path("executed").exists(), Path("executed").read_text()
        assert "stranger" not in done.stdout


def test_what_the_user_names_is_imported_from_there_and_an_installed_package_comes_first(
    strangers,
):
    Path("mine.py").write_text("import yaml, torch\nprint('mine', bool(yaml.safe_load))\n")
    words = ["plugins", "--plugins", "mine"]
    done = subprocess.run(
        [sys.executable, "-m", "lit_diffusion", *words], capture_output=True, text=True
    )
    assert "mine True" in done.stdout, done.stderr
    assert not Path("executed").exists()


def test_a_python_program_loads_no_package_that_lies_in_its_folder(strangers):
    for name in STRANGERS:
        Path(f"{name}.py").unlink()  # those are Python's own business
    code = "import lit_diffusion as ld; print(len(ld.SCHEDULES), *ld.registry.load_plugins())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "stranger" not in done.stdout
    assert not Path("executed").exists()
