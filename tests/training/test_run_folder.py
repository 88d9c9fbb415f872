"""A run has a folder of its own, whatever it is called and logged to, and one way to be named."""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from PIL import Image

from lit_diffusion.training import export, objective, report, sample
from lit_diffusion.training.cli import main
from lit_diffusion.training.commands.shell.choices import find_run, resolve_checkpoint
from lit_diffusion.training.run import dashboard
from lit_diffusion.training.run.checkpoints import WholeCheckpointIO
from lit_diffusion.training.run.dashboard import Dashboard, show
from lit_diffusion.training.run.folder import new_run_folder, run_loggers
from lit_diffusion.training.run.newest import last_checkpoint

CONFIG = Path(__file__).parents[2] / "configs" / "digits.yaml"
FAST = [
    "--trainer.max_steps=1", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
    "--trainer.callbacks=[]", "--trainer.log_every_n_steps=1", "--data.batch_size=4",
    "--data.val_examples=6", "--data.steps_per_epoch=2", "--model.sampler.steps=2",
    "--model.network.channels=[8,8]", "--model.network.attention=[]", "--model.network.blocks=1",
]  # fmt: skip


def fit(cli, *words):
    code, out, err = cli("fit", "--config", CONFIG, *FAST, *words)
    assert code == 0, err
    return Path(out.strip().splitlines()[-1].removeprefix("Run folder: ")), err


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with one run, runs/digits/<time>."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["lit-diffusion", "fit", "--config", str(CONFIG), *FAST])
        main()
    return folder


@pytest.fixture
def run(home, tmp_path, monkeypatch):
    """A copy of that run below the current folder; its path, relative."""
    shutil.copytree(home / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    (folder,) = Path("runs/digits").iterdir()
    return folder


# Making it -------------------------------------------------------------------------------------


def test_runs_that_start_at_once_have_a_folder_each(tmp_path):
    found, barrier = [], threading.Barrier(8)

    def start():
        barrier.wait()
        found.append(new_run_folder(tmp_path / "sweep" / "a").path)

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 8
    assert all(folder.is_dir() for folder in found)


def test_a_root_that_is_a_file_is_an_error(tmp_path):
    (tmp_path / "runs").touch()
    with pytest.raises(OSError, match="runs"):
        new_run_folder(tmp_path / "runs")


def test_a_failing_start_removes_only_what_it_has_made(cli, tmp_path):
    (tmp_path / "runs" / "digits").mkdir(parents=True)
    code, _, err = cli("fit", "--config", CONFIG, *FAST, "--data.path=./nowhere")
    assert code == 2, err
    assert [path.name for path in (tmp_path / "runs").rglob("*")] == ["digits"]


def test_removing_a_run_keeps_the_folder_that_holds_another(tmp_path):
    mine = new_run_folder(tmp_path / "runs" / "a")
    other = new_run_folder(tmp_path / "runs" / "a")
    mine.remove()
    assert not mine.path.exists()
    assert other.path.is_dir()
    other.remove()
    assert [path.name for path in tmp_path.rglob("*")] == ["runs", "a"]  # the first one's
    again = new_run_folder(tmp_path / "runs" / "b")
    again.remove()
    assert [path.name for path in tmp_path.rglob("*")] == ["runs", "a"]


# Logging ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "further"),
    [
        (["--trainer.logger=false"], 0),
        (["--trainer.logger=CSVLogger"], 1),
        (["--trainer.logger+=CSVLogger", "--trainer.logger+=CSVLogger"], 2),
    ],
    ids=["none", "one", "two"],
)
def test_the_run_folder_does_not_depend_on_the_loggers(cli, monkeypatch, words, further):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    words = [*words, "--trainer.callbacks=[SampleGrid]"]
    folder, _ = fit(cli, *words, "--trainer.max_steps=2")
    expected = ("config.yaml", "metrics.csv", "report.html", "environment.json", "samples")
    assert all((folder / name).exists() for name in (*expected, "checkpoints/last.ckpt"))
    assert {path.name for path in Path().iterdir()} == {"runs"}
    assert len(list(folder.glob("lightning_logs/version_*/metrics.csv"))) == further
    again, err = fit(cli, *words, "--ckpt_path=last", "--trainer.max_steps=3")
    assert again == folder
    assert f"Resuming from {folder}/checkpoints/last.ckpt, step 2." in err
    # The written config is itself a config, of another run with another folder.
    code, _, err = cli("fit", "--config", folder / "config.yaml")
    assert code == 0, err
    other = max(Path("runs/digits").iterdir())
    assert other != folder
    assert len(list(other.glob("lightning_logs/version_*/metrics.csv"))) == further


def test_a_logger_writes_where_its_config_says(cli, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    fit(cli, "--trainer.logger=CSVLogger", "--trainer.logger.save_dir=elsewhere")
    assert list(Path("elsewhere").glob("lightning_logs/version_0/metrics.csv"))


def test_there_is_one_run_of_wandb_and_none_without_loggers(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    started = []
    monkeypatch.setattr(Dashboard, "__init__", lambda self, *_: started.append(self))
    own = WandbLogger(offline=True)
    assert run_loggers(tmp_path, given=[own])[1:] == [own]
    assert len(run_loggers(tmp_path, given=[own], further=False)) == 1
    assert not started
    beside = CSVLogger(tmp_path)
    assert run_loggers(tmp_path, given=[beside])[1:] == [beside, *started]
    assert len(started) == 1


def test_pictures_reach_tensorboard(tmp_path, monkeypatch):
    shown = []

    class Watched(TensorBoardLogger):
        def __init__(self):
            """Without the package tensorboard, which is optional."""

        experiment = SimpleNamespace(add_image=lambda *args, **words: shown.append((args, words)))

    monkeypatch.setattr(dashboard, "logged_step", lambda trainer: 7)
    Image.new("RGB", (3, 2), (255, 0, 0)).save(tmp_path / "grid.png")
    trainer = SimpleNamespace(global_step=8, loggers=[Watched()])
    show(trainer, "samples", tmp_path / "grid.png")
    (((name, pixels, step), words),) = shown
    assert (name, step, words) == ("samples", 7, {"dataformats": "HWC"})
    assert np.array_equal(pixels, np.full((2, 3, 3), (255, 0, 0), np.uint8))


# Finding the newest ----------------------------------------------------------------------------


def written(root, run, **more):
    """A checkpoint of the run root/run, with nothing in it but what makes it one."""
    path = root / run / "checkpoints" / "last.ckpt"
    parts = dict.fromkeys(("schedule", "weighting", "prediction"))
    state = {"LastCheckpoint": {"run": str(path.parents[1])}}
    checkpoint = {"hyper_parameters": parts, "callbacks": state, "global_step": 1, **more}
    WholeCheckpointIO().save_checkpoint(checkpoint, path)
    return path


def test_runs_of_any_depth_are_found(tmp_path):
    deep = written(tmp_path, "sweep/a/b/now")
    assert last_checkpoint(tmp_path) == deep
    assert last_checkpoint(tmp_path, "sweep/a/b") == deep
    assert last_checkpoint(tmp_path, "sweep") is None
    (tmp_path / "link").symlink_to(tmp_path)  # a circle
    assert last_checkpoint(tmp_path) == deep


@pytest.mark.parametrize("copy", ["a/now_backup", "a_backup/now", "0/now"])
def test_a_copy_of_a_run_is_not_newer_than_the_run(tmp_path, copy):
    older = written(tmp_path, "a/before")
    original = written(tmp_path, "a/now")
    shutil.copytree(original.parents[1], tmp_path / copy)
    shutil.copytree(older.parents[1], tmp_path / "a" / "older_backup")
    assert last_checkpoint(tmp_path) == original
    # A run that continues is the newest, wherever it lies.
    continued = written(tmp_path, copy)
    assert last_checkpoint(tmp_path) == continued


def test_without_a_time_in_the_checkpoint_that_of_the_folder_decides(tmp_path, monkeypatch):
    monkeypatch.setattr("lit_diffusion.training.run.checkpoints.SAVED_AT", "other")
    newer = written(tmp_path, "a/2026-02-01_00-00-00_1")
    older = written(tmp_path, "a/2026-01-01_00-00-00")
    os.utime(newer, (2e9, 2e9))
    assert newer.stat().st_mtime > older.stat().st_mtime
    assert last_checkpoint(tmp_path) == newer


def test_a_folder_of_the_name_of_a_checkpoint_is_none(tmp_path):
    path = written(tmp_path, "a/1")
    (tmp_path / "a" / "2" / "checkpoints" / "last.ckpt").mkdir(parents=True)
    assert last_checkpoint(tmp_path) == path
    assert last_checkpoint(tmp_path, "a") == path


# One word, one meaning -------------------------------------------------------------------------


def test_a_checkpoint_and_a_run_are_named_in_three_ways(run):
    path = run / "checkpoints" / "last.ckpt"
    for given in (path, run, "last", str(run)):
        assert resolve_checkpoint(given) == path
        assert find_run(given) == run
    for look_up in (resolve_checkpoint, find_run):
        assert look_up("last", name="digits") in (path, run)
        assert look_up("last", root="runs") in (path, run)
        with pytest.raises(ValueError, match="no checkpoint below runs/other"):
            look_up("last", name="other")
        with pytest.raises(ValueError, match="no checkpoint below elsewhere"):
            look_up("last", root="elsewhere")
        with pytest.raises(ValueError, match="--name and --root say"):
            look_up(run, name="digits")
        with pytest.raises(ValueError, match="--name must be"):
            look_up("last", name="..")


COMMANDS = {
    "sample": ["sample", "--ckpt_path", "RUN", "--num_samples", "1"],
    "evaluate": [
        *("evaluate", "--ckpt_path", "RUN", "--num_samples", "10", "--batch_size", "10"),
        *("--samplers", "[DDIMSampler]", "--steps", "[2]", "--features", "ClassifierFeatures"),
    ],
    "objective": ["objective", "--ckpt_path", "RUN"],
    "export": ["export", "RUN", "--out", "exported"],
    "ema": ["ema", "RUN"],
    "validate": ["validate", "--config", str(CONFIG), "--ckpt_path", "RUN", *FAST],
    "fit": ["fit", "--config", str(CONFIG), "--ckpt_path", "RUN", *FAST],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_takes_a_run_folder_and_names_the_file(cli, run, command, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    words = [str(run) if word == "RUN" else word for word in COMMANDS[command]]
    code, _, err = cli(*words)
    assert code == 0, err
    verb = "Resuming from" if command == "fit" else "Using"
    assert err.count(f"{verb} {run}/checkpoints/last.ckpt, step 1") == 1


def test_the_report_names_the_run_of_last(cli, run):
    code, out, err = cli("report", "last")
    assert (code, out.strip()) == (0, f"{run}/report.html"), err
    assert f"Using {run}." in err


def test_in_python_as_on_the_command_line(run):
    assert sample(run, num_samples=1).images.shape[0] == 1
    assert export(run, out="exported").is_dir()
    assert report("last", name="digits", root="runs") == run / "report.html"
    assert objective(ckpt_path="last", root="runs").objective is not None
    with pytest.raises(ValueError, match="no checkpoint below runs/sweep/a"):
        sample("last", name="sweep/a")


def test_the_config_of_a_run_keeps_the_loggers(cli, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    folder, _ = fit(cli, "--trainer.logger=CSVLogger")
    logger = yaml.safe_load((folder / "config.yaml").read_text())["trainer"]["logger"]
    assert logger["init_args"]["save_dir"] == "<run folder>"


# A working directory that is removed ------------------------------------------------------------

REMOVES = """
import lightning as L, os, shutil


class RemovesTheFolder(L.Callback):
    def on_train_batch_start(self, *args):
        shutil.rmtree(os.environ["REMOVED"], ignore_errors=True)
"""


def test_a_run_goes_on_when_its_working_directory_is_removed(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.setenv("REMOVED", str(here))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "removes_plugin.py").write_text(REMOVES)
    monkeypatch.chdir(here)
    code, out, err = cli(
        "fit", "--model.sampler=DDIMSampler", "--model.network=UNet", *FAST,
        "--plugins=removes_plugin", "--trainer.limit_val_batches=0",
        "--trainer.callbacks=[LastCheckpoint,removes_plugin.RemovesTheFolder]",
    )  # fmt: skip
    assert code == 0, err
    folder = Path(out.splitlines()[-1].removeprefix("Run folder: "))
    assert folder.is_relative_to(here)
    assert (folder / "checkpoints" / "last.ckpt").is_file()


def test_a_command_in_a_removed_folder_is_one_sentence(tmp_path):
    code = (
        f"import os, sys; os.chdir({str(tmp_path)!r}); os.mkdir('x'); os.chdir('x'); "
        "os.rmdir('../x'); python = sys.executable; "
        "os.execv(python, [python, '-m', 'lit_diffusion', 'fit'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        "lit-diffusion: error: the working directory no longer exists: change to one that does, "
        "with cd.\n"
    )
