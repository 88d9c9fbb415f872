"""A training step compared with other libraries, for networks of the same size.

    python benchmarks/training_step.py --peers .venv-peers/bin/python [--compile]
        [--precision bf16] [--device cuda] [--json FILE]

Each candidate is a separate process, started with an interpreter that has its library: ours, or
that of `--peers` (benchmarks/peers.txt). They take turns of a second or two, in a new random order
in each round, and wait in a blocking read otherwise. A step is the same work for all: a batch from
memory to the device, noise, loss, backward pass, gradients clipped to norm 1, optimizer, average
of the weights. Optimizer and average are those of the users of each library; the files of
benchmarks/peers/ state what each one does. No network has labels or dropout.

Networks have our levels, blocks and attention as far as their design allows, and are chosen to
have as many parameters as ours (`peers/task.py: nearest`). Equal numbers of parameters do not mean
equal work, so the table also has the operations of the forward and backward pass. The last two
columns state how many times as fast ours is: the median over rounds of the ratio within a round,
`fit` for the framework, `bare` for a loop by hand; compiled against compiled.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import select
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from measuring import arguments, machine, ratio, report
from peers.task import Task

HERE = Path(__file__).parent
BARE, FIT = "bare loop", "lit-diffusion"
CONTESTANTS = {  # by name: the module of benchmarks/peers
    BARE: "bare_loop",
    FIT: "lit_diffusion_fit",
    "denoising-diffusion-pytorch": "denoising_loop",
    "diffusers": "diffusers_loop",
    "k-diffusion": "k_diffusion_loop",
}
OURS = (BARE, FIT)
PATIENCE = 600.0  # seconds for an answer; the first turn may compile
LEAST_ROUNDS = 3


class ContestantError(Exception):
    """A contestant that cannot go on; its sentence says why."""


class Worker:
    """A contestant, as the driver sees it.

    Args:
        name: In the table.
        module: In benchmarks/peers.
        task: What it trains.
        python: Its interpreter.

    Raises:
        ContestantError: If it does not come so far as to say what it has built, or has no library.
    """

    def __init__(self, name: str, module: str, task: Task, python: str) -> None:
        self.name, self.task = name, task
        self.seconds: list[float] = []  # of a step, in each round
        self.steps = 1
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 -- lives as long as the worker
        path = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [python, "-m", "peers.worker", module, json.dumps(asdict(task))],
            env={**os.environ, "PYTHONPATH": path.rstrip(os.pathsep)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )
        self.about = self.answer()

    def answer(self) -> dict[str, Any]:
        """The next line that it says."""
        assert self.process.stdout
        ready, _, _ = select.select([self.process.stdout], [], [], PATIENCE)
        line = self.process.stdout.readline() if ready else ""
        said = json.loads(line) if line else {}
        if "missing" in said:
            self.close()
            raise ContestantError(f"{self.name}: not installed (no module {said['missing']})")
        if not said:
            self.errors.seek(0)
            last = [text.strip() for text in self.errors.read().splitlines() if text.strip()]
            why = f"no answer within {PATIENCE:.0f} s" if not ready else "its process ended"
            self.close()
            raise ContestantError(f"{self.name} failed: {last[-1] if ready and last else why}")
        return said

    def train(self, steps: int) -> float:
        """Have it train, and return the seconds of a step."""
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):  # `answer` will say why
            print(steps, file=self.process.stdin, flush=True)
        return self.answer()["seconds"] / steps

    def end(self) -> float:
        """Let it go, and return its peak of memory in MiB."""
        assert self.process.stdin
        self.process.stdin.close()
        peak: float = self.answer()["peak_mib"]
        self.close()
        return peak

    def close(self) -> None:
        """End its process, if it has not ended, and leave nothing open."""
        assert self.process.stdin
        assert self.process.stdout
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.errors.close()

    def row(self, peak: float, fit: Worker | None, bare: Worker | None) -> dict[str, Any]:
        """Its line of the table."""
        step = statistics.median(self.seconds)
        gflop = self.about["flops"] / 1e9
        return {
            "contestant": self.name,
            "library": self.about["version"] or None,
            "parameters": self.about["parameters"],
            "GFLOP/image": gflop,
            "ms/step": 1e3 * step,
            "images/s": self.task.batch / step,
            "GFLOP/s": gflop * self.task.batch / step,
            "peak MiB": peak,
            "rounds": len(self.seconds),
            "fit is × as fast": ratio(self.seconds, fit.seconds) if fit else None,
            "bare is × as fast": ratio(self.seconds, bare.seconds) if bare else None,
        }


def start(task: Task, chosen: argparse.Namespace) -> tuple[list[Worker], list[str]]:
    """All that are asked for and can be had, and sentences about the others.

    The bare loop comes first, since it says how large the networks are to be.
    """
    workers, notes = [], []
    names = [BARE] + [name for name in chosen.contestants if name != BARE]
    for name in names:
        for compiled in (False, True) if chosen.compile else (False,):
            full = f"{name}, compiled" if compiled else name
            python = sys.executable if name in OURS or not chosen.peers else chosen.peers
            print(f"building {full} …", file=sys.stderr, flush=True)
            try:
                worker = Worker(full, CONTESTANTS[name], replace(task, compiled=compiled), python)
            except ContestantError as error:
                if name == BARE and not compiled:
                    raise
                notes.append(str(error))
                break
            if worker.about["torch"] != torch.__version__:
                notes.append(f"{full} has torch {worker.about['torch']}.")
            workers.append(worker)
            if name == BARE:
                size = {key: worker.about[key] for key in ("parameters", "flops")}
                task = replace(task, **size)
    return workers, notes


def contest(workers: list[Worker], chosen: argparse.Namespace, notes: list[str]) -> None:
    """Warm up, then take turns until the time is over; whoever fails is left out from there on.

    The time is `--seconds` for each contestant, without the warm-up, in which graphs are compiled.
    """

    def turn(worker: Worker, steps: int) -> float | None:
        try:
            return worker.train(steps)
        except ContestantError as error:
            notes.append(str(error))
            workers.remove(worker)
            return None

    for worker in list(workers):
        print(f"warming up {worker.name} …", file=sys.stderr, flush=True)
        turn(worker, 2)
        if (seconds := turn(worker, 2) if worker in workers else None) is not None:
            worker.steps = max(1, round(chosen.block / seconds))
    order = random.Random(0)
    end = time.perf_counter() + chosen.seconds * len(workers)
    rounds = 0
    while workers and (rounds < LEAST_ROUNDS or time.perf_counter() < end):
        for worker in order.sample(workers, len(workers)):
            if (seconds := turn(worker, worker.steps)) is not None:
                worker.seconds.append(seconds)
        rounds += 1


def parse(words: list[str] | None) -> argparse.Namespace:
    """The arguments; what is not given depends on the device."""
    parser = arguments(__doc__, seconds=45.0)
    parser.add_argument("--peers", default=None, help="interpreter that has the peers")
    parser.add_argument(
        "--contestants", nargs="+", choices=list(CONTESTANTS), default=list(CONTESTANTS)
    )
    parser.add_argument("--compile", action="store_true", help="each compiled as well")
    parser.add_argument("--precision", choices=["32", "bf16"], default="32")
    parser.add_argument("--channels_last", action="store_true", help="every network in it")
    parser.add_argument("--image", type=int, nargs=3, default=[3, 32, 32], metavar=("C", "H", "W"))
    parser.add_argument("--channels", type=int, nargs="+", help="default: by the device")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--attention", type=int, nargs="*", help="heights; default: by the device")
    parser.add_argument("--batch", type=int, help="default: by the device")
    parser.add_argument("--block", type=float, default=1.5, help="seconds of a turn")
    chosen = parser.parse_args(words)
    if chosen.device.startswith("cuda"):
        usual = {"channels": [128, 256, 256, 256], "attention": [16], "batch": 128}  # cifar10.yaml
    else:
        usual = {"channels": [64, 128, 128], "attention": [8], "batch": 16}
    for name, value in usual.items():
        if getattr(chosen, name) is None:
            setattr(chosen, name, value)
    if chosen.peers and not Path(chosen.peers).exists():
        parser.error(
            f"--peers: expected the interpreter of an environment with benchmarks/peers.txt, got "
            f"{chosen.peers}, which does not exist; make it as that file says, or leave it out."
        )
    return chosen


def main(words: list[str] | None = None) -> int:
    """Hold the contest; 1 if a contestant failed that is installed."""
    chosen = parse(words)
    task = Task(
        shape=tuple(chosen.image),
        channels=tuple(chosen.channels),
        blocks=chosen.blocks,
        attention=tuple(chosen.attention),
        batch=chosen.batch,
        device="cuda" if chosen.device.startswith("cuda") else chosen.device,
        precision=chosen.precision,
        compiled=False,
        channels_last=chosen.channels_last,
    )
    try:
        workers, notes = start(task, chosen)
    except ContestantError as error:
        print(error, file=sys.stderr)
        return 1
    contest(workers, chosen, notes)
    by_name = {worker.name: worker for worker in workers}
    rows, details = [], {}
    for worker in workers:
        suffix = ", compiled" if worker.task.compiled else ""
        fit, bare = by_name.get(FIT + suffix), by_name.get(BARE + suffix)
        rows.append(worker.row(worker.end(), fit, bare))
        rounds = [1e3 * seconds for seconds in worker.seconds]
        details[worker.name] = worker.about | {
            "steps of a turn": worker.steps,
            "ms/step of each round": rounds,
        }
    shape = "×".join(map(str, task.shape))
    title = (
        f"Training step: {task.batch} images of {shape}, channels {list(task.channels)}, "
        f"{task.blocks} blocks, attention {list(task.attention)}, precision {task.precision}"
        + (", channels last" if task.channels_last else "")
    )
    result = report(title, machine(chosen.device), rows, None)
    for note in notes:
        print(note)
    if chosen.json is not None:
        chosen.json.write_text(
            json.dumps({**result, "contestants": details, "notes": notes}, indent=1) + "\n"
        )
    return int(any(" failed: " in note for note in notes))


if __name__ == "__main__":
    sys.exit(main())
