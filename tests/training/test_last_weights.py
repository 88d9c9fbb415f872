"""A fit measures its last weights once, whatever ends it, and training does not notice."""

import csv
import os
import shutil
import signal
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
import warm
from lightning.pytorch.callbacks import EarlyStopping
from test_fid import Flat
from test_module import tiny_data, tiny_model, trainer

from lit_diffusion.training import (
    EMA,
    FID,
    LastCheckpoint,
    Likelihood,
    NoiseLevelLoss,
    SampleGrid,
)
from lit_diffusion.training.callbacks import noise_level_loss
from lit_diffusion.training.run.checkpoints import load_checkpoint
from lit_diffusion.training.run.measurements import read_measurements
from lit_diffusion.training.run.metrics_csv import RunLogger
from lit_diffusion.training.run.noise_levels import read_table

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import resume

pytestmark = pytest.mark.usefixtures("alone")


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch):
    """They would take most of the time."""
    monkeypatch.setattr(noise_level_loss, "save_figure", lambda figure, path: None)
    monkeypatch.setattr(noise_level_loss, "plot_noise_levels", lambda records: None)


class Validations(L.Callback):
    """Keeps the steps that were validated, and whether the average was in use."""

    def __init__(self):
        self.steps = []
        self.weights = set()

    def on_validation_epoch_end(self, trainer, pl_module):
        self.steps.append(trainer.global_step)
        self.weights.add(pl_module.weights)


class StopsAt(L.Callback):
    """Ends the fit in some hook of some step."""

    def __init__(self, hook, step):
        setattr(self, hook, self._stop)
        self.step = step

    def _stop(self, trainer, pl_module, *args):
        trainer.should_stop |= trainer.global_step >= self.step


def fit(folder, *callbacks, data=None, ckpt_path=None, **arguments):
    """A fit with everything that measures; FID only at every third validation."""
    step = None if ckpt_path is None else load_checkpoint(ckpt_path)["global_step"]
    seen = Validations()
    every = [
        seen, EMA(0.9), SampleGrid(2, 2), FID(8, Flat(), "test", every_n_validations=3),
        Likelihood(), NoiseLevelLoss(3), LastCheckpoint(), *callbacks,
    ]  # fmt: skip
    run = trainer(folder, callbacks=every, logger=RunLogger(folder, step), **arguments)
    model = tiny_model(lr_scheduler=None)
    loaders = {"steps_per_epoch": 10, "val_examples": 16, **(data or {})}
    run.fit(model, tiny_data(**loaders), ckpt_path=ckpt_path)
    return run, seen


def steps_of(folder):
    """At which steps each thing was measured."""
    found = {}
    for one in read_measurements(folder):
        if one.name in ("fid", "bpd"):
            found.setdefault(one.name, []).append(one.step)
    grids = sorted((folder / "samples").glob("step-*.png"))
    found["grid"] = [int(path.stem[5:]) for path in grids]
    for one in read_table(folder / "noise_levels.csv"):
        found.setdefault(one.stage, []).append(one.step)
    with (folder / "metrics.csv").open() as lines:
        rows = [(name, int(row["step"])) for row in csv.DictReader(lines) for name in row
                if row[name] and name in ("val/loss", "val/fid")]  # fmt: skip
    for name in ("val/loss", "val/fid"):
        found[name] = [step + 1 for column, step in rows if column == name]
    return found


ENDS = {
    "max_steps": ([], {"max_steps": 7}, 7),
    "max_steps, in the middle of an epoch": ([], {"max_steps": 17}, 17),
    "max_steps, with the last validation": ([], {"max_steps": 20}, 20),
    "max_steps, accumulated": ([], {"max_steps": 7, "accumulate_grad_batches": 3}, 7),
    "max_epochs": ([], {"max_epochs": 1, "check_val_every_n_epoch": 2}, 10),
    "max_epochs, accumulated": ([], {"max_epochs": 1, "accumulate_grad_batches": 3}, 4),
    "max_epochs, validated before": ([], {"max_epochs": 1, "val_check_interval": 4}, 10),
    "early stopping": ([lambda: EarlyStopping("val/loss", 1e9, patience=1)], {}, 20),
    "early stopping on training": (
        [lambda: EarlyStopping("train/loss", 1e9, patience=0, check_on_train_epoch_end=True)],
        {"check_val_every_n_epoch": 3}, 20,
    ),
    "should_stop in a step": ([lambda: StopsAt("on_train_batch_end", 3)], {}, 3),
    "should_stop at the end of an epoch": (
        [lambda: StopsAt("on_train_epoch_end", 10)], {"check_val_every_n_epoch": 3}, 10,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ENDS)
def test_the_last_weights_are_measured_once(tmp_path, name):
    callbacks, arguments, last = ENDS[name]
    run, seen = fit(tmp_path, *(make() for make in callbacks), **arguments)
    assert run.global_step == last
    found = steps_of(tmp_path)
    assert seen.steps[-1] == last
    assert len(set(seen.steps)) == len(seen.steps)
    assert seen.weights == {"EMA(decay=0.9)"}
    assert found["fid"] == found["val/fid"] == [last]  # not due before: there is no third
    assert found["grid"] == found["bpd"] == found["val"] == found["val/loss"] == seen.steps
    assert found["train"] == seen.steps
    fid, bound = (one for one in run.callbacks if isinstance(one, (FID, Likelihood)))
    assert fid.summary.startswith(f"val/fid at step {last}: ")
    assert bound.summary.startswith(f"val/bpd at step {last}: ")
    saved = load_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    assert saved["global_step"] == last
    assert saved["average"] == "EMA(decay=0.9)"
    assert float(run.callback_metrics["val/fid"]) > 0


@pytest.mark.parametrize("data", [{"val_split": None}, {}])
@pytest.mark.filterwarnings("ignore:Likelihood. this fit has no validation data")
@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")  # Lightning's
def test_without_validation_data_epochs_count(tmp_path, data):
    """There is no `val/loss` and no bound; everything else is measured."""
    limit = {} if data else {"limit_val_batches": 0}
    fit(tmp_path, data={"steps_per_epoch": 2, **data}, max_steps=9, **limit)
    found = steps_of(tmp_path)
    assert found["grid"] == [2, 4, 6, 8, 9]
    assert found["fid"] == found["val/fid"] == [6, 9]
    assert found["train"] == [2, 4, 6, 8, 9]
    assert "bpd" not in found
    assert not found["val/loss"]


def test_a_bound_without_validation_data_is_missed_before_the_first_step(tmp_path):
    def refuse(*_):
        raise AssertionError("too late")

    run = trainer(tmp_path, callbacks=[Likelihood()], max_steps=1, limit_val_batches=0)
    model = tiny_model()
    model.training_step = refuse
    with (
        pytest.warns(UserWarning, match="Likelihood: this fit has no validation data"),
        pytest.raises(AssertionError, match="too late"),
    ):
        run.fit(model, tiny_data())


def test_grids_of_a_model_with_conditions_need_no_validation(tmp_path, monkeypatch):
    """They then have the conditions of the first training examples."""
    seen = []
    monkeypatch.setattr(
        SampleGrid, "sample", lambda *args: seen.append(args[3]) or torch.zeros(4, 1, 8, 8)
    )
    grid = SampleGrid(2, 2)
    run = trainer(tmp_path, callbacks=[grid], max_steps=2, limit_val_batches=0)
    model = tiny_model()
    model.conditions = ("label",)
    monkeypatch.setattr(type(model), "condition", lambda self, batch: {"label": batch["label"]})
    data = tiny_data()
    run.fit(model, data)
    first = next(data.examples("train", 4))["label"]
    assert [one["label"].tolist() for one in seen] == [first.tolist()]


@pytest.mark.parametrize("arguments", [{"accumulate_grad_batches": 2}, {"val_check_interval": 2}])
def test_a_fit_that_continues_was_never_measured(tmp_path, arguments):
    """Four steps, measured, and three more are seven: every counter and every bit is the same."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    path, first = parts / "checkpoints" / "last.ckpt", tmp_path / "first.ckpt"
    arguments = {"data": {"steps_per_epoch": 5}, **arguments}

    def patience():
        return EarlyStopping("val/loss", 1e9, patience=50)

    fit(whole, patience(), max_steps=7, **arguments)
    _, seen = fit(parts, patience(), max_steps=4, **arguments)
    assert seen.steps[-1] == 4
    shutil.copy(path, first)
    fit(parts, patience(), max_steps=7, ckpt_path=first, **arguments)
    ours, theirs = load_checkpoint(path), load_checkpoint(whole / "checkpoints" / "last.ckpt")
    assert list(resume.differences(ours, theirs)) == []
    ours, theirs = ((run / "noise_levels.csv").read_text() for run in (parts, whole))
    assert ours == theirs


TINY = """
trainer:
  accelerator: cpu
  max_steps: 7
  log_every_n_steps: 2
  enable_progress_bar: false
  callbacks:
    - {class_path: EMA, init_args: {decay: 0.9}}
    - {class_path: SampleGrid, init_args: {rows: 2, columns: 2}}
    - class_path: Likelihood
    - class_path: LastCheckpoint
data: {batch_size: 16, steps_per_epoch: 10, val_examples: 64}
model:
  network: {class_path: UNet, init_args: {channels: [8], attention: [], num_classes: 10}}
  sampler: {class_path: DDIMSampler, init_args: {steps: 2}}
  optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 2e-3}}
"""


def test_a_run_that_is_resumed_from_its_end_is_measured_again(cli, tmp_path, monkeypatch):
    """As after a kill in its last measurement; each number says of which step it is."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    words = ["fit", "--config", "tiny.yaml", "--ckpt_path", "last"]
    with monkeypatch.context() as patch:
        patch.setattr(Likelihood, "bound", lambda *_: sys.exit(3))  # the moment of the kill
        code, _, _ = cli(*words)
    assert code == 3
    (run,) = (tmp_path / "runs" / "run").iterdir()
    assert load_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"] == 7
    assert not (run / "metrics.json").exists()
    code, out, err = cli(*words)
    assert code == 0, err
    assert "Step 7 was the last one" in err
    assert "Steps: 7" in out
    assert "val/loss at step 7: " in out
    assert "val/bpd at step 7: " in out
    assert [one.step for one in read_measurements(run) if one.name == "bpd"] == [7]
    assert [path.name for path in (run / "samples").iterdir()] == ["step-0000007.png"]
    code, again, err = cli(*words)  # the same numbers, once
    assert code == 0, err
    assert [one.step for one in read_measurements(run) if one.name == "bpd"] == [7]
    assert again == out


def test_the_printed_training_loss_is_that_of_the_last_logged_step(cli, tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    code, out, err = cli("fit", "--config", "tiny.yaml")
    assert code == 0, err
    assert "train/loss at step 6: " in out
    code, out, err = cli("validate", "--config", "tiny.yaml", "--ckpt_path", "last")
    assert code == 0, err
    assert "val/loss at step 7: " in out
    assert "val/bpd at step 7: " in out


@pytest.fixture
def foreground():
    """Ctrl-C as in a terminal, even if the tests run in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_ends_the_last_measurement_at_once(tmp_path, monkeypatch, foreground, name):
    """The weights are saved, and whoever resumes the run measures them."""
    number = getattr(signal, name)
    monkeypatch.setattr(Likelihood, "bound", lambda *_: os.kill(os.getpid(), number))
    before = signal.getsignal(number)
    with (
        pytest.warns(UserWarning, match=f"{name}: step 2 is saved"),
        pytest.raises(SystemExit) as e,
    ):
        fit(tmp_path, max_steps=2)
    assert e.value.code == 128 + number
    assert signal.getsignal(number) == before
    assert load_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 2


def test_a_signal_in_the_last_step_leaves_without_a_measurement(tmp_path):
    class Tell(L.Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.warns(UserWarning, match="SIGTERM: step 2 is saved"), pytest.raises(SystemExit):
        fit(tmp_path, Tell(), max_steps=2)
    assert not (tmp_path / "samples").exists()


def test_ctrl_c_before_training_has_the_code_that_shells_expect(cli, tmp_path, monkeypatch):
    from lit_diffusion.training import DataModule

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    (tmp_path / "tiny.yaml").write_text(TINY)
    monkeypatch.setattr(DataModule, "setup", interrupt)
    before = signal.getsignal(signal.SIGINT)  # Lightning ignores it from here on
    code, _, _ = cli("fit", "--config", "tiny.yaml")
    signal.signal(signal.SIGINT, before)
    assert code == 130


TWO = """
import sys
sys.path[:0] = [{tests!r}, {tests!r} + "/../../benchmarks"]
from test_last_weights import fit
from pathlib import Path
if __name__ == "__main__":
    fit(Path({folder!r}), max_steps=7, devices=2, strategy="ddp")
"""


@pytest.mark.slow
def test_two_ranks_measure_the_same_last_weights(tmp_path):
    script = tmp_path / "job.py"
    script.write_text(TWO.format(folder=str(tmp_path / "two"), tests=str(Path(__file__).parent)))
    done = warm.run([sys.executable, script], timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = steps_of(tmp_path / "two")
    assert found["fid"] == found["bpd"] == found["grid"] == found["val/loss"] == [7]
