"""Real processes, killed or told to leave at any moment, and what they leave behind."""

import contextlib
import functools
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import warm

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import resume

from lit_diffusion.training.run.checkpoints import load_checkpoint
from lit_diffusion.training.run.whole_file import unfinished_path

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}


@pytest.mark.slow
def test_killed_runs_end_as_if_nothing_had_happened():
    words = [sys.executable, resume.__file__, "--runs", "5", "--seed", "1", "--kills", "4"]
    done = warm.run(words, env=ENVIRONMENT, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "5 of 5 equal bit for bit" in done.stdout, done.stdout
    assert "0 unreadable checkpoints" in done.stdout
    assert int(re.search(r"(\d+) kills", done.stdout)[1]) >= 5


CYCLES = [  # (micro-batches to a step, batches to an epoch, trainer arguments)
    (1, 5, {}),
    (1, 5, {"val_check_interval": 2}),
    pytest.param(1, 4, {"check_val_every_n_epoch": 2}, marks=pytest.mark.slow),
    pytest.param(2, 7, {"val_check_interval": 3}, marks=pytest.mark.slow),
    (2, 6, {"val_check_interval": 5, "check_val_every_n_epoch": None}),
    pytest.param(3, 4, {"limit_val_batches": 0}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("accumulate", "epoch", "arguments"), CYCLES)
def test_a_run_goes_on_from_any_of_its_checkpoints(
    tmp_path, monkeypatch, accumulate, epoch, arguments
):
    from test_module import tiny_data, tiny_model, trainer

    from lit_diffusion.training import EMA, LastCheckpoint, NoiseLevelLoss
    from lit_diffusion.training.last_weights import measure_again
    from lit_diffusion.training.run.metrics_csv import RunLogger

    def keep(name, method):
        """Keeps every checkpoint that a kill could leave behind."""

        def kept(self, *args, **kwargs):
            before = self._path.stat().st_ino if self._path.exists() else None
            result = method(self, *args, **kwargs)
            if self._path.exists() and self._path.stat().st_ino != before:
                number = len(list(folder.iterdir()))
                (folder / f"{number:03d}.ckpt").write_bytes(self._path.read_bytes())
            return result

        patch.setattr(LastCheckpoint, name, kept)

    def fit(run, ckpt_path=None):
        step = None if ckpt_path is None else load_checkpoint(ckpt_path)["global_step"]
        model = tiny_model()
        job = trainer(
            tmp_path, max_steps=8, logger=RunLogger(run, step),
            callbacks=[EMA(0.9), NoiseLevelLoss(3), LastCheckpoint(1)],
            accumulate_grad_batches=accumulate, **arguments,
        )  # fmt: skip
        job.fit(model, tiny_data(steps_per_epoch=epoch), ckpt_path=ckpt_path)
        if step == job.global_step:
            measure_again(job, model)  # as the command line does

    # The figures are not compared, and they would take most of the time.
    monkeypatch.setattr(
        "lit_diffusion.training.callbacks.noise_level_loss.save_figure", lambda *_: None
    )
    folder, whole = tmp_path / "kept", tmp_path / "runs" / "whole"
    folder.mkdir()
    with monkeypatch.context() as patch:
        keep("_save", LastCheckpoint._save)
        keep("_publish", LastCheckpoint._publish)
        fit(whole)
    kept = sorted(folder.glob("*.ckpt"))
    assert len(kept) >= 4
    for path in kept:
        run = tmp_path / "runs" / path.stem
        run.mkdir()
        for name in ("metrics.csv", "noise_levels.csv"):
            if (whole / name).exists():
                (run / name).write_bytes((whole / name).read_bytes())
        (run / "checkpoints").mkdir()
        (run / "checkpoints" / "last.ckpt").write_bytes(path.read_bytes())
        fit(run, path)
        paths = [run / "checkpoints" / "last.ckpt", whole / "checkpoints" / "last.ckpt"]
        assert resume.compare(*paths) == "", f"from step {load_checkpoint(path)['global_step']}"


def start(folder, *words):
    """The command, in a process of its own with a small job that would take minutes."""
    folder.mkdir(exist_ok=True)
    words = [*resume.command(list(words), folder), "--trainer.max_steps=100000"]
    with (folder / "log.txt").open("w") as log:
        process = warm.Popen(
            [sys.executable, "-m", "lit_diffusion", *words],
            cwd=folder, env=ENVIRONMENT, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    STARTED.append(process.pid)
    return process


STARTED = []


@pytest.fixture(autouse=True)
def ended():
    """End what a test has started, also if it fails: each would run for hours."""
    yield
    while STARTED:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(STARTED.pop(), signal.SIGKILL)


def wait_for(condition, process, seconds=120):
    for _ in range(seconds * 20):
        if found := condition():
            return found
        assert process.poll() is None, "it ended before its time"
        time.sleep(0.05)
    raise AssertionError("waited too long")


def step_of(folder):
    path = resume.checkpoint(folder)
    return 0 if path is None else load_checkpoint(path)["global_step"]


def group(process):
    """The processes of a job, by the kernel's word."""
    found = subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


def lives(pid):
    """Whether a process is there, and not only its name in the table."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        ("SIGINT", 1),
        ("SIGTERM", 1),
        ("SIGUSR1", 1),
        pytest.param("SIGINT", 2, marks=pytest.mark.slow),
        pytest.param("SIGTERM", 2, marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_and_leaves(tmp_path, name, ranks):
    # Without a signal there are checkpoints at validations only, which would hide nothing.
    ddp = ["--trainer.devices=2", "--trainer.strategy=ddp"] if ranks == 2 else []
    process = start(
        tmp_path, "--data.num_workers=2", "--trainer.callbacks.every_n_steps=100000", *ddp
    )
    wait_for(lambda: step_of(tmp_path) > 0, process)
    members = group(process)
    if name == "SIGINT":
        os.killpg(process.pid, signal.SIGINT)  # as a terminal: to all ranks and workers
    else:
        os.kill(process.pid, getattr(signal, name))  # with 2 ranks, only one of them is told
    code = process.wait(timeout=60)
    log = (tmp_path / "log.txt").read_text()
    assert code == 128 + getattr(signal, name), log[-3000:]
    assert ("Ctrl-C: saving after this step" in log) == (name == "SIGINT")
    told = re.search(rf"{name}: step (\d+) is saved; continue with --ckpt_path last", log)
    assert told, log[-3000:]
    assert step_of(tmp_path) == int(told[1])
    assert "Traceback" not in log
    gone(members)  # ranks and workers


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_to_the_whole_group_saves_and_leaves(tmp_path, name):
    """As `timeout`, systemd and SLURM send it: the workers leave it to their parent."""
    words = ["--data.num_workers=2", "--trainer.callbacks.every_n_steps=100000"]
    process = start(tmp_path, *words)
    wait_for(lambda: step_of(tmp_path) > 0, process)
    members = group(process)
    assert len(members) >= 3
    os.kill(process.pid, getattr(signal, name))
    os.killpg(process.pid, getattr(signal, name))
    code = process.wait(timeout=60)
    log = (tmp_path / "log.txt").read_text()
    assert code == 128 + getattr(signal, name), log[-3000:]
    assert step_of(tmp_path) == int(re.search(r"step (\d+) is saved; continue", log)[1])
    assert "Traceback" not in log
    assert "Exception" not in log
    gone(members)


@pytest.mark.slow
def test_workers_end_with_their_parent(tmp_path):
    """However it ended, and whatever they are doing; a stopped one ends when it is let go on."""
    process = start(tmp_path, "--data.num_workers=3")
    wait_for(lambda: step_of(tmp_path) > 0, process)
    members = group(process)
    workers = [pid for pid in members if pid != process.pid]
    assert len(workers) >= 3
    for pid in workers:
        for name in ("SIGTERM", "SIGUSR1", "SIGINT"):
            os.kill(pid, getattr(signal, name))
    before = step_of(tmp_path)
    wait_for(lambda: step_of(tmp_path) > before, process)
    assert all(lives(pid) for pid in workers)
    process.kill()
    process.wait(timeout=60)
    gone(members)


def gone(members, seconds=30):
    deadline = time.monotonic() + seconds
    while left := [pid for pid in members if lives(pid)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def test_a_second_signal_ends_it_at_once(tmp_path):
    process = start(tmp_path)
    wait_for(lambda: step_of(tmp_path) > 0, process)
    script = (
        "import os, signal, sys, time; pid = int(sys.argv[1]); os.kill(pid, signal.SIGTERM); "
        "os.kill(pid, signal.SIGSTOP); time.sleep(1.2); os.kill(pid, signal.SIGTERM); "
        "os.kill(pid, signal.SIGCONT)"
    )
    subprocess.run([sys.executable, "-c", script, str(process.pid)], check=True)
    assert process.wait(timeout=60) in (143, -signal.SIGTERM)
    assert load_checkpoint(resume.checkpoint(tmp_path))


@pytest.mark.slow
def test_a_run_that_was_told_to_leave_goes_on_exactly(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(Path(resume.__file__).parent)!r})
import json, resume, signal, time
from pathlib import Path
resume.torch.set_num_threads(1)
folder = Path({str(tmp_path)!r})
reference, _ = resume.undisturbed([], folder / "alone")
there = folder / "told"
there.mkdir()
run = resume.Run(resume.command([], there), there)
while resume.checkpoint(there) is None:
    time.sleep(0.01)
resume.os.kill(run.pid, signal.SIGUSR1)
code = run.wait()
again = resume.Run(resume.command([], there), there).wait()
print(json.dumps([code, again, resume.compare(resume.checkpoint(there), reference)]))
""")
    done = warm.run([sys.executable, script], env=ENVIRONMENT)
    assert json.loads(done.stdout.splitlines()[-1]) == [138, 0, ""], done.stderr[-2000:]


# The file -------------------------------------------------------------------------------------


FULL = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from lit_diffusion.training.run.checkpoints import WholeCheckpointIO
import torch
io = WholeCheckpointIO()
io.save_checkpoint({"a": torch.zeros(10)}, sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    io.save_checkpoint({"a": torch.ones(1_000_000)}, sys.argv[1])
except OSError as error:
    print(error)
"""


def test_a_full_disk_leaves_the_one_before(tmp_path):
    path = tmp_path / "checkpoints" / "last.ckpt"
    done = warm.run([sys.executable, "-c", FULL, path], env=ENVIRONMENT)
    assert "cannot be written" in done.stdout, done.stderr[-2000:]
    assert "the previous one is intact" in done.stdout
    assert "Free some space" in done.stdout
    assert "\n" not in done.stdout.strip()
    assert torch.equal(torch.load(path, weights_only=True)["a"], torch.zeros(10))
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


def test_a_run_survives_a_checkpoint_that_cannot_be_written(tmp_path, monkeypatch):
    from test_module import tiny_data, tiny_model, trainer

    from lit_diffusion.training import LastCheckpoint
    from lit_diffusion.training.run.checkpoints import WholeCheckpointIO

    whole, full = WholeCheckpointIO.save_checkpoint, {2, 5}

    def save(self, checkpoint, path, storage_options=None):
        if checkpoint["global_step"] in full:
            raise OSError("The checkpoint cannot be written: No space left on device.")
        whole(self, checkpoint, path, storage_options)

    monkeypatch.setattr(WholeCheckpointIO, "save_checkpoint", save)
    last = LastCheckpoint(2)
    run = trainer(tmp_path, max_steps=4, callbacks=[last], limit_val_batches=0)
    with pytest.warns(UserWarning, match=r"No space left on device. Training continues\."):
        run.fit(tiny_model(), tiny_data(steps_per_epoch=9))
    assert load_checkpoint(last._path)["global_step"] == 4
    run = trainer(tmp_path, max_steps=5, callbacks=[LastCheckpoint(2)], limit_val_batches=0)
    with pytest.raises(OSError, match="No space left"):  # nobody would go on from that one
        run.fit(tiny_model(), tiny_data(steps_per_epoch=9), ckpt_path=last._path)
    assert load_checkpoint(last._path)["global_step"] == 4


def test_epochs_of_one_batch_are_warned_of(tmp_path):
    from test_module import tiny_data, tiny_model, trainer

    from lit_diffusion.training import LastCheckpoint

    run = trainer(tmp_path, max_steps=3, callbacks=[LastCheckpoint(1)])
    with pytest.warns(UserWarning, match="set data.steps_per_epoch to 2 or more"):
        run.fit(tiny_model(), tiny_data(steps_per_epoch=1))


def test_without_its_plugin_the_callback_warns(tmp_path):
    from test_module import tiny_data, tiny_model, trainer

    from lit_diffusion.training import LastCheckpoint

    last = LastCheckpoint()
    run = trainer(tmp_path, max_steps=1, callbacks=[last], plugins=[])
    with pytest.warns(UserWarning, match=r"give the trainer plugins=\[WholeCheckpointIO\(\)\]"):
        run.fit(tiny_model(), tiny_data())
    assert load_checkpoint(last._path)["global_step"] == 1


def test_the_command_line_hands_the_plugin_to_the_trainer(cli, configs, monkeypatch):
    import lightning as L

    from lit_diffusion.training.run.checkpoints import WholeCheckpointIO

    found, fit = [], L.Trainer.fit

    @functools.wraps(fit)
    def watched(self, *args, **kwargs):
        found.append(self.strategy.checkpoint_io)
        return fit(self, *args, **kwargs)

    monkeypatch.setattr(L.Trainer, "fit", watched)
    words = ["fit", "--config", configs / "digits.yaml", "--trainer.fast_dev_run=1"]
    small = ["--model.network.channels=[8,8]", "--model.network.attention=[]"]
    code, _, err = cli(*words, *small, "--model.sampler.steps=2", "--trainer.accelerator=cpu")
    assert code == 0, err
    assert [type(io) for io in found] == [WholeCheckpointIO]


def test_orphans_are_cleaned(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    orphan, other = (unfinished_path(tmp_path / f"{name}.ckpt") for name in ("last", "best"))
    orphan = orphan.with_name(orphan.name.replace(f".{os.getpid()}.", f".{ended.pid}."))
    orphan.write_bytes(b"half")
    other.write_bytes(b"of another checkpoint, being written")
    from lit_diffusion.training.run.checkpoints import WholeCheckpointIO

    WholeCheckpointIO().save_checkpoint({"a": 1}, tmp_path / "last.ckpt")
    assert sorted(path.name for path in tmp_path.iterdir()) == [other.name, "last.ckpt"]


def test_nothing_in_a_checkpoint_is_executed(tmp_path):
    import lightning as L

    from lit_diffusion.training import DataModule, LitDiffusion, WholeCheckpointIO

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": {}, "epoch": 0, "global_step": 1, "evil": Evil()}, path)
    # With our plug-in, even where one asks for it.
    for plugins, weights_only in ([], None), ([WholeCheckpointIO()], False):
        trainer = L.Trainer(
            max_steps=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            plugins=plugins,
        )
        with pytest.raises((ValueError, pickle.UnpicklingError), match=r"safely|weights_only"):
            trainer.fit(LitDiffusion(), DataModule(), ckpt_path=path, weights_only=weights_only)
    assert not (tmp_path / "executed").exists()
