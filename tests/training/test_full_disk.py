"""A full disk costs a warning and not the run; and files that neither grow nor lose anything."""

import csv
import errno
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import warm
from test_fid import Flat
from test_module import tiny_data, tiny_model, trainer

from lit_diffusion.training import FID, LastCheckpoint, Likelihood, NoiseLevelLoss, SampleGrid
from lit_diffusion.training.callbacks import noise_level_loss
from lit_diffusion.training.data.reading.bad_examples import Bad, BadExamples
from lit_diffusion.training.run import measurements, tolerance, whole_file
from lit_diffusion.training.run.checkpoints import load_checkpoint
from lit_diffusion.training.run.measurements import (
    Measurement,
    add_measurements,
    read_measurements,
)
from lit_diffusion.training.run.metrics_csv import RunLogger
from lit_diffusion.training.run.noise_levels import read_table

LIMITED = """
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_full_disk import fit
import lightning as L
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
class Full(L.Callback):
    def on_train_start(self, *_):  # when the caches of the data are written
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
fit(Path(sys.argv[1]), Full(), checkpoints=False)
print("done")
"""


def fit(folder, *callbacks, checkpoints=True, **arguments):
    """A run that writes every kind of file."""
    every = [*callbacks, SampleGrid(2, 2), FID(8, Flat(), "test"), Likelihood(), NoiseLevelLoss(3)]
    every += [LastCheckpoint(2)] if checkpoints else []
    run = trainer(folder, callbacks=every, logger=RunLogger(folder), max_steps=5, **arguments)
    run.fit(tiny_model(), tiny_data(steps_per_epoch=2, val_examples=8))
    return run


@pytest.mark.usefixtures("alone")
def test_no_file_but_a_checkpoint_can_end_a_run(tmp_path, monkeypatch):
    """Each file is reported once; what could not be written is written when there is space."""
    whole, full = whole_file.Path.replace, [True]

    def replace(self, target):
        kept = {"checkpoints", "cache"} & {*self.parts}
        if full[0] and tmp_path in self.parents and not kept:
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(self, target)

    monkeypatch.setattr(whole_file.Path, "replace", replace)
    said = []
    monkeypatch.setattr(tolerance, "warn", said.append)
    run = fit(tmp_path)
    assert run.global_step == 5
    names = {message.split()[0].rpartition("/")[2] for message in said}
    assert names == {
        "metrics.csv", "metrics.json", "noise_levels.csv", "noise_levels.png",
        "step-0000002.png", "step-0000004.png", "step-0000005.png",
    }  # fmt: skip
    assert len(said) == len(names)
    assert all("No space left on device" in message for message in said)
    assert load_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 5
    assert not list(tmp_path.rglob("*.tmp"))
    full[0] = False
    run.logger.log_metrics({"later": 1.0}, step=5)
    with (tmp_path / "metrics.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert [int(row["step"]) for row in rows if row["train/loss"]] == [0, 1, 2, 3, 4]
    assert rows[-1]["later"] == "1.0"


@pytest.mark.slow
def test_a_run_goes_on_where_the_system_refuses_to_write(tmp_path):
    words = [sys.executable, "-c", LIMITED, tmp_path, Path(__file__).parent]
    done = warm.run(list(map(str, words)), timeout=300)
    assert done.stdout.splitlines()[-1] == "done", done.stderr[-3000:]
    assert not (tmp_path / "metrics.csv").exists()


def test_a_row_that_does_not_fit_leaves_no_part_of_itself(tmp_path):
    """RLIMIT_FSIZE lets a write end in the middle, as a full disk does."""
    code = """
import resource, signal, sys
from pathlib import Path
from lit_diffusion.training.run.metrics_csv import RunLogger
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder = Path(sys.argv[1])
logger = RunLogger(folder)
logger.log_metrics({"loss": 0.25}, step=0)
size = (folder / "metrics.csv").stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 3, resource.RLIM_INFINITY))
logger.log_metrics({"loss": 0.5}, step=1)
logger.log_metrics({"loss": 0.75}, step=2)
print((folder / "metrics.csv").read_text())
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
logger.log_metrics({"loss": 1.0}, step=3)
print((folder / "metrics.csv").read_text())
"""
    done = warm.run([sys.executable, "-c", code, str(tmp_path)], timeout=100)
    small, whole = "loss,step\n0.25,0\n", "loss,step\n0.25,0\n0.5,1\n0.75,2\n1.0,3\n"
    text = done.stdout.replace("step,loss", "loss,step")
    rows = [sorted(line.split(",")) for line in text.splitlines() if line]
    expected = [sorted(line.split(",")) for line in (small + whole).splitlines()]
    assert rows == expected, done.stderr[-2000:]


def test_the_list_of_bad_examples_can_fail(tmp_path):
    (tmp_path / "bad_examples.csv").mkdir()  # a name that cannot be written to
    bad = BadExamples("train", 0.5, tmp_path)
    with (
        pytest.warns(UserWarning, match="skipped"),
        pytest.warns(UserWarning, match=r"bad_examples\.csv cannot be written"),
    ):
        bad.add([Bad("file", 3, 1, "broken", 0)])


# What must not grow ---------------------------------------------------------------------------


def one(step, value, name="fid", stage="val", **protocol):
    return Measurement(name, value, None, step, stage, {"samples": 8, **protocol})


def test_the_validations_in_metrics_json_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(measurements, "MOST", 8)
    for step in range(100):
        best = -1.0 if step == 7 else 1.0 + step
        add_measurements(tmp_path, [one(step, best), one(step, best, "bpd")])
    add_measurements(tmp_path, [one(step, 0.0, stage="evaluate") for step in range(20)])
    found = read_measurements(tmp_path)
    for name in ("fid", "bpd"):
        steps = [m.step for m in found if m.name == name and m.stage == "val"]
        assert len(steps) <= 10
        assert steps[0] == 0
        assert 7 in steps  # the best one
        assert steps[-4:] == [96, 97, 98, 99]
    assert sum(m.stage == "evaluate" for m in found) == 20


def test_a_repeated_measurement_replaces_the_earlier_one(tmp_path):
    add_measurements(tmp_path, [one(1, 2.0, interval=(1, 2)), one(1, 2.0, interval=None)])
    add_measurements(tmp_path, [one(1, 3.0, interval=(1, 2))])
    assert sorted(m.value for m in read_measurements(tmp_path)) == [2.0, 3.0]


@pytest.mark.usefixtures("alone")
def test_noise_levels_are_bounded_and_a_resumed_run_has_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(noise_level_loss, "MOST", 4)
    monkeypatch.setattr(noise_level_loss, "save_figure", lambda figure, path: None)
    drawn = []
    monkeypatch.setattr(noise_level_loss, "plot_noise_levels", lambda every: drawn.append(every))

    def run(folder, steps, ckpt_path=None):
        last = LastCheckpoint(1)
        trainer(folder, callbacks=[NoiseLevelLoss(2), last], max_steps=steps).fit(
            tiny_model(lr_scheduler=None), tiny_data(steps_per_epoch=2, val_examples=8),
            ckpt_path=ckpt_path,
        )  # fmt: skip
        return last._path, folder / "noise_levels.csv"

    _, whole = run(tmp_path / "whole", 21)
    steps = list(dict.fromkeys(record.step for record in read_table(whole)))
    assert len(steps) == 4
    assert steps[0] == 2
    assert steps[-2:] == [20, 21]
    assert max(map(len, drawn)) <= 8
    path, part = run(tmp_path / "part", 13)
    run(tmp_path / "part", 21, path)
    assert part.read_text() == whole.read_text()


WRITER = """
import sys
from pathlib import Path
from lit_diffusion.training.run.measurements import Measurement, add_measurements
for step in range(40):
    one = Measurement("fid", 1.0, None, step, "evaluate", {"writer": sys.argv[2]})
    add_measurements(Path(sys.argv[1]), [one])
"""


def test_processes_that_measure_at_the_same_time_lose_nothing(tmp_path):
    def write(name):
        return warm.run([sys.executable, "-c", WRITER, str(tmp_path), name], timeout=100)

    with ThreadPoolExecutor(3) as pool:
        done = list(pool.map(write, "abc"))
    assert [one.returncode for one in done] == [0, 0, 0]
    found = {(m.step, m.protocol["writer"]) for m in read_measurements(tmp_path)}
    assert len(found) == len(json.loads((tmp_path / "metrics.json").read_text())) == 120
