"""Kill runs at random moments, resume them until they are done, and compare bit for bit.

    python benchmarks/resume.py [--runs 50] [--kills 12] [--seed 0]

Each run is `lit-diffusion fit --ckpt_path last` on the digits with a small network, killed by
SIGKILL repeatedly: half of the time at a random moment, half of the time while a checkpoint is
being written. It resumes from the last checkpoint as often as necessary. In the end its checkpoint
(weights, average, optimizer, schedule, positions in the data) and its metrics.csv must equal those
of an uninterrupted run. A run counts if it was resumed at least once from a step above 0.

The runs are forked from one process that has imported everything, so each starts at once; those
with two ranks are separate commands.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lit_diffusion.training.cli import main as lit_diffusion
from lit_diffusion.training.run.checkpoints import load_checkpoint

CONFIGS = Path(__file__).parents[1] / "configs"
STEPS = 24
SMALL = [
    *("--config", str(CONFIGS / "digits.yaml")),
    *("--model.network.channels=[8,8]", "--model.network.attention=[]", "--data.batch_size=8"),
    *("--data.steps_per_epoch=7", "--data.val_examples=16", "--data.shuffle_window=64"),
    *(f"--trainer.max_steps={STEPS}", "--trainer.log_every_n_steps=1"),
    *("--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu", "--trainer.devices=1"),
]
CALLBACKS = {
    "trainer": {
        "callbacks": [
            {"class_path": "EMA", "init_args": {"decay": 0.9}},
            {"class_path": "NoiseLevelLoss", "init_args": {"bins": 5}},
            {"class_path": "LastCheckpoint", "init_args": {"every_n_steps": 2}},
        ]
    }
}
ADAPTIVE = [
    *("--config", str(CONFIGS / "with" / "adaptive.yaml")),
    "--trainer.callbacks.every_n_steps=3",
]
LEARNED = [
    *("--model.schedule=LearnedSchedule", "--model.schedule.logsnr_min=-5"),
    *("--model.schedule.logsnr_max=13.3", "--model.schedule.learn=both"),
    *("--model.decoder=SoftmaxDecoder", "--model.decoder.levels=17"),
]
KINDS: dict[str, list[str]] = {
    "streamed": [],
    "streamed, 2 workers, adaptive": ["--data.num_workers=2", *ADAPTIVE],
    "streamed, accumulation 2, learned": ["--trainer.accumulate_grad_batches=2", *LEARNED],
    "in memory, adaptive": ["--data.streaming=false", *ADAPTIVE],
    "in memory, 2 workers": ["--data.streaming=false", "--data.num_workers=2"],
    "in memory, accumulation 2, validation between": [
        *("--data.streaming=false", "--trainer.accumulate_grad_batches=2"),
        "--trainer.val_check_interval=3",
    ],
}
TWO_RANKS = {
    "2 ranks, streamed, adaptive": ["--trainer.devices=2", "--trainer.strategy=ddp", *ADAPTIVE],
}


class Outcome(NamedTuple):
    """What became of a run."""

    kills: int
    in_a_save: int  # kills while a checkpoint was being written
    resumed_at: list[int]  # steps above 0 from which it went on
    unreadable: int  # checkpoints of its name that could not be read
    equal: bool
    problem: str = ""


class Run:
    """A process group that trains, forked or started."""

    def __init__(self, words: list[str], folder: Path) -> None:
        self.folder = folder
        log = (folder / "log.txt").open("ab")
        if "--trainer.devices=2" in words:
            command = [sys.executable, "-m", "lit_diffusion", *words]
            started = subprocess.Popen(
                command, cwd=folder, stdout=log, stderr=log, start_new_session=True
            )
            self.pid = started.pid
        else:
            self.pid = os.fork()
            if self.pid == 0:
                _train(words, folder, log.fileno())
        log.close()

    def ended(self) -> int | None:
        """The exit status, None while it runs; negative for a signal."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None

    def wait(self) -> int:
        """The exit status, once it has ended."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def saving(self) -> bool:
        """Whether it is writing a checkpoint, or was when it was killed."""
        return any(self.folder.glob(f"digits/*/checkpoints/.*.{self.pid}.*.tmp"))

    def kill(self) -> None:
        """SIGKILL to all of its processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.wait()


def _train(words: list[str], folder: Path, log: int) -> None:
    """What a forked process does: the command, and nothing of the parent's afterwards."""
    code = 1
    try:
        os.setsid()
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(folder)
        sys.argv = ["lit-diffusion", *words]
        lit_diffusion()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def command(kind: list[str], folder: Path) -> list[str]:
    """The words of a run whose folder of runs is `folder`."""
    callbacks = folder / "callbacks.json"
    callbacks.write_text(json.dumps(CALLBACKS))
    start = ["fit", *SMALL, "--config", str(callbacks), *kind]
    return [*start, f"--trainer.default_root_dir={folder}", "--ckpt_path=last"]


def checkpoint(folder: Path) -> Path | None:
    """The last checkpoint of the runs in a folder."""
    found = sorted(folder.glob("digits/*/checkpoints/last.ckpt"), key=lambda p: p.stat().st_mtime)
    return found[-1] if found else None


#: What may differ: the path of the run folder, the time, and how many validation batches there
#: were since the
#: last start, which Lightning counts and nobody reads.
FREE = ("run", "saved_at", "epoch_loop.val_loop.batch_progress")


def differences(a: Any, b: Any, where: str = "") -> Iterator[str]:
    """The places at which two checkpoints differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(key for key in b if key not in a)]:
            if key not in a or key not in b:
                yield f"{where}/{key} is only in one"
            elif key not in FREE:
                yield from differences(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        for i, pair in enumerate(zip(a, b, strict=True)):
            yield from differences(*pair, f"{where}/{i}")
    elif isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if a.shape != b.shape or not torch.equal(a.nan_to_num(7.5), b.nan_to_num(7.5)):
            yield where
    elif a != b:
        yield f"{where}: {a!r} and {b!r}"


def repeatable(path: Path) -> str:
    """A table of a run without its columns throughput/…: how fast it went is never the same."""
    with path.open(newline="") as lines:
        rows = list(csv.reader(lines))
    kept = [i for i, name in enumerate(rows[0]) if not name.startswith("throughput/")]
    return "\n".join(",".join(row[i] for i in kept) for row in rows)


def compare(ours: Path, theirs: Path) -> str:
    """What differs between two runs by their last checkpoints, "" if nothing does."""
    found = list(differences(load_checkpoint(ours), load_checkpoint(theirs)))
    for name in ("metrics.csv", "noise_levels.csv"):
        texts = [repeatable(path.parents[1] / name) for path in (ours, theirs)]
        if texts[0] != texts[1]:
            pairs = zip(*(text.splitlines() for text in texts), strict=False)
            first = next((" | ".join(pair) for pair in pairs if pair[0] != pair[1]), "lengths")
            found.append(f"{name}: {first}")
    return "; ".join(found[:4])


def undisturbed(kind: list[str], folder: Path) -> tuple[Path, float]:
    """A run that is left alone: its last checkpoint and how long it took."""
    folder.mkdir(parents=True)
    start = time.perf_counter()
    code = Run(command(kind, folder), folder).wait()
    path = checkpoint(folder)
    if code != 0 or path is None:
        raise SystemExit((folder / "log.txt").read_text()[-4000:])
    return path, time.perf_counter() - start


def tormented(
    kind: list[str], folder: Path, reference: Path, length: float, chance: random.Random, most: int
) -> Outcome:
    """A run that is killed at random moments, at most so often, and resumed until it is done."""
    folder.mkdir(parents=True)
    kills = in_a_save = unreadable = 0
    resumed_at: list[int] = []
    while True:
        path = checkpoint(folder)
        if path is not None:
            try:
                step = load_checkpoint(path)["global_step"]
                resumed_at += [step] if step > 0 else []
            except ValueError:
                unreadable += 1
        run = Run(command(kind, folder), folder)
        patient = kills >= most
        in_save, start = chance.random() < 0.5, time.perf_counter()
        moment = chance.uniform(0.2, 0.9) * length
        saves, before = chance.randrange(5), False
        while (code := run.ended()) is None:
            if in_save and not patient:
                now = run.saving()
                if now and not before:
                    if saves == 0:
                        break
                    saves -= 1
                before = now
            elif time.perf_counter() - start > moment and not patient:
                break
            time.sleep(0.0005)
        if code == 0:
            break
        if code is not None:
            log = (folder / "log.txt").read_text()[-600:]
            return Outcome(kills, in_a_save, resumed_at, unreadable, False, f"exit {code}: {log}")
        run.kill()
        kills += 1
        in_a_save += run.saving()
    path = checkpoint(folder)
    problem = "no checkpoint" if path is None else compare(path, reference)
    return Outcome(kills, in_a_save, resumed_at, unreadable, not problem, problem)


def torment(
    kinds: dict[str, list[str]], runs: int, most: int, seed: int, root: Path
) -> Iterator[Any]:
    """Outcomes of runs that count, kind after kind in turn: (kind, outcome)."""
    chance = random.Random(seed)
    references: dict[str, tuple[Path, float]] = {}
    done = tried = 0
    while done < runs:
        name = list(kinds)[done % len(kinds)]
        if name not in references:
            references[name] = undisturbed(kinds[name], root / f"reference-{len(references)}")
        tried += 1
        outcome = tormented(kinds[name], root / f"run-{tried}", *references[name], chance, most)
        if outcome.resumed_at or not outcome.equal:
            done += 1
            yield name, outcome


def main() -> None:
    """Torment, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--kills", type=int, default=12, help="The most that a run suffers.")
    parser.add_argument("--ranks", type=int, default=1, choices=(1, 2))
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", WANDB_MODE="disabled")
    torch.set_num_threads(1)
    print("| run | kills | of them in a save | resumed at steps | unreadable | equal |")
    print("| --- | --- | --- | --- | --- | --- |")
    outcomes = []
    kinds = KINDS if chosen.ranks == 1 else TWO_RANKS
    with tempfile.TemporaryDirectory() as root:
        for name, outcome in torment(kinds, chosen.runs, chosen.kills, chosen.seed, Path(root)):
            outcomes.append(outcome)
            steps = ", ".join(map(str, outcome.resumed_at))
            row = (name, outcome.kills, outcome.in_a_save, steps, outcome.unreadable)
            print(
                f"| {' | '.join(map(str, row))} | {outcome.equal} |", outcome.problem, flush=True
            )
    equal = sum(outcome.equal for outcome in outcomes)
    kills, saves, bad = (sum(outcome[i] for outcome in outcomes) for i in (0, 1, 3))
    print(
        f"{equal} of {len(outcomes)} equal bit for bit; {kills} kills, {saves} of them in a save; "
        f"{bad} unreadable checkpoints"
    )


if __name__ == "__main__":
    main()
