"""Weights & Biases: what is in its offline file, how a run goes on in it, and how it may fail."""

import json
import os
import pickle
import resource
import signal
import warnings
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
import wandb
import wandb_file
import yaml
from PIL import Image
from test_module import tiny_data, tiny_model, trainer

import lit_diffusion as ld
from lit_diffusion.training import LastCheckpoint, Overview
from lit_diffusion.training.lightning_internals import wandb_process
from lit_diffusion.training.run.checkpoints import load_checkpoint
from lit_diffusion.training.run.dashboard import Dashboard
from lit_diffusion.training.run.folder import run_loggers
from lit_diffusion.training.run.measurements import (
    Measurement,
    add_measurements,
    read_measurements,
)

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """W&B as a user has it who has not said anything."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_CONSOLE", "off")  # it would wrap what pytest has wrapped
    yield
    assert wandb.run is None, "a run was left open"


# What is in the file ---------------------------------------------------------------------------

CALLBACKS = [
    {"class_path": "EMA"},
    {"class_path": "Likelihood"},
    {"class_path": "SampleGrid", "init_args": {"rows": 2, "columns": 2}},
    {"class_path": "NoiseLevelLoss", "init_args": {"bins": 4}},
    {"class_path": "LastCheckpoint"},
]
SMALL = [
    "--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.enable_progress_bar=false",
    "--trainer.log_every_n_steps=1", "--trainer.num_sanity_val_steps=0", "--data.batch_size=4",
    "--data.steps_per_epoch=3", "--data.val_examples=6", "--model.sampler=DDIMSampler",
    "--model.sampler.steps=2", "--model.network=UNet", "--model.network.channels=[8,8]",
    "--model.network.attention=[]", "--model.network.num_classes=10", "--name=tiny",
]  # fmt: skip


def fit(cli, steps, *words):
    Path("callbacks.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": CALLBACKS}}))
    code, out, err = cli(
        "fit", "--config=callbacks.yaml", f"--config={CONFIGS / 'with' / 'adaptive.yaml'}",
        *SMALL, f"--trainer.max_steps={steps}", *words,
    )  # fmt: skip
    assert code == 0, err
    return Path(out.strip().splitlines()[-1].removeprefix("Run folder: "))


@pytest.mark.slow
def test_a_run_and_how_it_goes_on(cli):
    folder = fit(cli, 3)
    checkpoint = load_checkpoint(folder / "checkpoints" / "last.ckpt")
    (first,) = wandb_file.read_all(folder)
    assert first.id == checkpoint["wandb_id"]
    assert first.id.startswith(f"tiny-{folder.name}-")

    # The config is whole: all that config.yaml has, every default written out.
    config = yaml.safe_load((folder / "config.yaml").read_text())
    shape = first.config["model"].pop("shape")
    config["model"].pop("shape", None)
    assert shape == [1, 8, 8]
    assert first.config == config
    assert config["model"]["network"]["init_args"]["downsample"] is True  # a default

    # Numbers, with one axis for all.
    assert first.axes["*"] == "trainer/global_step"
    assert {row["trainer/global_step"] for row in first.rows} == {0, 1, 2}
    for name in ("train/loss", "val/loss", "val/bpd", "val/bpd_prior", "val/bpd_diffusion"):
        assert first.column(name), name
    for name in ("images_per_s", "step_ms", "data_wait"):
        assert all(value >= 0 for value in first.column(f"throughput/{name}")), name
        assert len(first.column(f"throughput/{name}")) == 2  # the first step does not count

    # Pictures, as they are in the run folder.
    pictures = {
        "objective": "objective.png",
        "samples": "samples/step-0000003.png",
        "noise_levels": "noise_levels.png",
        "schedule": "schedule.png",
    }
    (files,) = folder.glob("wandb/offline-run-*/files")
    for name, path in pictures.items():
        (shown,) = first.column(f"{name}/filenames")[-1]
        assert (files / shown).read_bytes() == (folder / path).read_bytes(), name
        with Image.open(files / shown) as image:
            image.load()
            assert image.width == first.column(f"{name}/width")[-1]
    assert first.column("samples/captions")[-1] == ["after 3 steps"]

    # Measurements, with their protocols.
    table = json.loads((files / first.column("measurements/path")[-1]).read_text())
    assert table["columns"] == list(Measurement._fields)
    rows = [Measurement(*row[:-1], json.loads(row[-1])) for row in table["data"]]
    assert rows == read_measurements(folder)
    assert "bpd" in {row.name for row in rows}

    assert list(folder.glob("wandb/artifacts/staging/*"))  # not at home

    # It goes on: in the same folder, and in the same W&B run, where it stopped.
    assert fit(cli, 6, "--ckpt_path=last") == folder
    first, second = wandb_file.read_all(folder)
    assert second.id == first.id
    steps = first.column("trainer/global_step") + second.column("trainer/global_step")
    assert steps == sorted(steps)
    assert [row["trainer/global_step"] for row in second.rows if "train/loss" in row] == [3, 4, 5]

    # From a copy elsewhere, too, in a folder of its own.
    Path("elsewhere").mkdir()
    copy = Path("elsewhere/copy.ckpt")
    copy.write_bytes((folder / "checkpoints" / "last.ckpt").read_bytes())
    other = fit(cli, 7, f"--ckpt_path={copy}")
    (file,) = wandb_file.read_all(other)
    assert other != folder
    assert file.id == first.id


def test_a_run_without_wandb_keeps_the_id_for_one_with_it():
    shown, checkpoint = Overview(), {}
    shown.on_load_checkpoint(None, None, {"wandb_id": "tiny-1"})
    shown.on_save_checkpoint(SimpleNamespace(loggers=[]), None, checkpoint)
    assert checkpoint == {"wandb_id": "tiny-1"}


def test_a_trainer_that_cannot_be_made_leaves_nothing(cli):
    code, _, err = cli("fit", *SMALL, "--trainer.max_steps=1", "--trainer.devices=0")
    assert code == 2, err
    assert not Path("runs").exists()


def test_jobs_of_one_second_are_different_runs(tmp_path):
    ids = []
    for _ in range(2):
        logger = Dashboard(tmp_path / "a b:c" / "2026-01-01_00-00-00")
        ids.append(logger.version)
        logger.finish(0)
    assert ids[0] != ids[1]
    assert all(id.startswith("a-b-c-2026-01-01_00-00-00-") for id in ids)


def test_a_spawned_rank_writes_into_the_same_run(tmp_path):
    logger = Dashboard(tmp_path / "tiny" / "1")
    spawned = pickle.loads(pickle.dumps(logger))
    assert spawned.version == logger.version
    with pytest.warns(UserWarning, match="run already in progress"):  # it is no other process
        spawned.log_metrics({"a": 1.0}, step=3)
    logger.finish(0)
    (file,) = wandb_file.read_all(tmp_path / "tiny" / "1")
    assert file.column("a") == [1.0]


# How it may fail -------------------------------------------------------------------------------


class At(L.Callback):
    """Does something after a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            self.action(trainer.loggers[-1])


def train(folder, action=None, step=2, steps=6):
    """A training beside W&B, which must come to its end; the warnings there were."""
    loggers = run_loggers(folder)
    run = trainer(
        folder, max_steps=steps, logger=loggers, callbacks=[At(step, action or (lambda _: None))]
    )
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run.fit(tiny_model(), tiny_data(steps_per_epoch=3))
        loggers[-1].finish(0)
    assert run.global_step == steps
    rows = (folder / "metrics.csv").read_text().splitlines()
    assert len(rows) == 1 + steps + steps // 3
    return [str(w.message) for w in told if "Weights & Biases" in str(w.message)], loggers[-1]


def refuse(*args, **kwargs):
    raise OSError("No space left on device")


def test_nothing_is_said_if_nothing_fails(tmp_path):
    told, _ = train(tmp_path / "tiny" / "1")
    assert told == []
    (file,) = wandb_file.read_all(tmp_path / "tiny" / "1")
    assert len(file.column("train/loss")) == 6


CIRCLE = {}
CIRCLE["a"] = CIRCLE

FAILURES = {
    "log": lambda logger: setattr(logger.experiment, "log", refuse),
    "finish": lambda logger: setattr(logger.experiment, "finish", refuse),
    "log_image": lambda logger: logger.log_image("samples", ["nowhere.png"]),
    "log_table": lambda logger: logger.log_table("t", ["a"], [[1, 2]]),
    "config": lambda logger: logger.log_config(CIRCLE),
    "killed": lambda logger: wandb_process().kill(),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_costs_one_warning(tmp_path, failure):
    told, logger = train(tmp_path / "tiny" / "1", FAILURES[failure])
    assert len(told) == 1, told
    assert "left out of this run from here on" in told[0]
    # Whoever speaks to W&B directly is heard by nobody, and does no harm.
    logger.experiment.config.update({"a": 1})
    logger.experiment.summary["a"] = 1
    # The next run of this process has its own.
    told, again = train(tmp_path / "tiny" / "2")
    assert told == []
    assert again.version != logger.version
    assert len(wandb_file.read_all(tmp_path / "tiny" / "2")[0].column("train/loss")) == 6


def test_a_process_that_stands_still_does_not_hold_up_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(Dashboard, "PATIENCE", 0.3)
    held = []

    def stop(logger):
        held.append(wandb_process())
        os.kill(held[0].pid, signal.SIGSTOP)
        for _ in range(3000):  # more than a socket takes
            logger.log_metrics({"text": os.urandom(500).hex()})

    told, _ = train(tmp_path / "tiny" / "1", stop)
    assert told == ["Weights & Biases is left out of this run from here on: it does not answer."]
    assert held[0].poll() == -signal.SIGKILL  # at its end the program would wait for it
    assert train(tmp_path / "tiny" / "2")[0] == []


def test_a_full_disk_is_told_at_the_end(tmp_path):
    def fill(logger):
        resource.prlimit(wandb_process().pid, resource.RLIMIT_FSIZE, (3000, 3000))
        for _ in range(100):
            logger.log_metrics({"text": os.urandom(500).hex()})

    told, _ = train(tmp_path / "tiny" / "1", fill)
    assert len(told) == 1
    assert "file too large" in told[0]
    wandb_process().kill()  # its limit is not for the other tests
    wandb_file.read_all(tmp_path / "tiny" / "1", ended=False)  # what there is can be read


def test_a_run_that_was_killed_at_once_has_a_file(tmp_path):
    logger = Dashboard(tmp_path / "tiny" / "1")
    wandb_process().kill()
    with pytest.warns(UserWarning, match="left out"):
        logger.finish(0)
    (file,) = wandb_file.read_all(tmp_path / "tiny" / "1", ended=False)
    assert file.rows == []
    assert not file.ended


def test_without_a_network_it_is_written_for_later(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))  # no login of whoever runs the tests
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    folder = tmp_path / "tiny" / "1"
    with pytest.warns(UserWarning, match="written offline") as told:
        logger = Dashboard(folder)
    assert len(told) == 1
    logger.log_metrics({"a": 1.0}, step=3)
    logger.finish(0)
    (file,) = wandb_file.read_all(folder)
    assert file.column("trainer/global_step") == [3]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "tiny").write_text("a file where a folder should be")
    with pytest.warns(UserWarning, match="left out"):
        logger = Dashboard(tmp_path / "tiny" / "1")
    logger.log_metrics({"a": 1.0})
    logger.log_image("samples", ["nowhere.png"])
    logger.finish(0)


def test_disabled_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert len(run_loggers(tmp_path / "tiny" / "1")) == 1


# The overview ----------------------------------------------------------------------------------


class LogisticSchedule(ld.NoiseSchedule):
    """Only λ(t) is known, its inverse is found by bisection."""

    def _logsnr(self, t):
        return torch.log1p(-t) - torch.log(t)


def overview(folder, callback=None, **model):
    run = trainer(
        folder, max_steps=2, logger=run_loggers(folder)[:1], limit_val_batches=0,
        callbacks=[Overview(), LastCheckpoint(), *([callback] if callback else [])],
    )  # fmt: skip
    run.fit(tiny_model(**model), tiny_data())
    assert run.global_step == 2


def test_the_objective_of_a_schedule_without_closed_form_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    folder = tmp_path / "tiny" / "1"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*cannot be kept in checkpoints")
        overview(folder, schedule=LogisticSchedule(-10.0, 10.0))
    with Image.open(folder / "objective.png") as image:
        image.load()
    path = folder / "checkpoints" / "last.ckpt"
    assert "wandb_id" not in torch.load(path, weights_only=True)


def test_a_picture_that_fails_ends_no_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr("lit_diffusion.training.callbacks.overview.save_objective", refuse)
    with pytest.warns(UserWarning, match="could not be plotted: OSError: No space left"):
        overview(tmp_path / "tiny" / "1")


def test_measurements_that_cannot_be_read_end_no_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    folder = tmp_path / "tiny" / "1"
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text("{")
    with pytest.warns(UserWarning, match="expected the measurements of a run"):
        overview(folder)


def test_the_table_follows_the_measurements(tmp_path):
    class Shown:
        def __init__(self):
            self.tables = []

        def log_table(self, key, columns, data, step):
            self.tables.append((key, columns, data, step))

    folder, logger = tmp_path, Shown()

    run = SimpleNamespace(
        loggers=[logger],
        sanity_checking=False,
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(_batches_that_stepped=7)),
    )
    shown = Overview()
    shown._folder = folder
    shown.on_validation_end(run, None)
    assert logger.tables == []
    add_measurements(folder, [Measurement("fid", 2.5, None, 8, "val", {"reference": "train"})])
    shown.on_validation_end(run, None)
    shown.on_train_end(run, None)  # nothing new
    columns = ["name", "value", "error", "step", "stage", "protocol"]
    row = ["fid", 2.5, None, 8, "val", '{"reference": "train"}']
    assert logger.tables == [("measurements", columns, [row], 7)]
