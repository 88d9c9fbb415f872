"""The memory of a run: whether it grows, and how far it is above a bare loop.

    python benchmarks/memory.py [--steps 2000] [--every 10] [--device cuda] [--seconds 600]
        [--config configs/digits.yaml] [--json FILE] [-- further words for fit]

Three runs, each in its own process: the bare loop of benchmarks/overhead.py in place of the
training, `lit-diffusion fit` without validation, which does the same work, and `fit` with four
validations and everything that belongs to them. On the CPU the resident memory of the process is
measured, most of which are the imports, the same in all three; so `growth`, above the level before
the first step, is given beside the peak. On a GPU it is the memory that torch has allocated there.

There is no leak if a slope, fitted to the last three quarters of the steps, and a difference of
medians, last quarter minus first, are close to zero.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from measuring import CONFIGS, arguments, machine, report
from overhead import BareLoop

from lit_diffusion.training import DataModule, LitDiffusion
from lit_diffusion.training.commands.fit import DiffusionCLI

HERE, MIB = Path(__file__).parent, 2**20
RESULT = "MEMORY_RESULT"
BARE = "import memory; memory.bare()"
FIT = "import lit_diffusion.__main__ as command; command.main()"


class Watch:
    """Looks at the memory of this process now and then.

    Args:
        device: Whose memory counts beside the process's.
        every: Looks at every so many steps.
        seconds: After which it asks to stop.
    """

    def __init__(self, device: torch.device, every: int, seconds: float) -> None:
        self.device, self.every, self.end = device, every, time.monotonic() + seconds
        self.before = self.now()
        self.steps: list[int] = []
        self.seen: dict[str, list[float]] = {name: [] for name in self.before}

    def now(self) -> dict[str, float]:
        """What is held, in MiB."""
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        found = {"resident": pages * os.sysconf("SC_PAGE_SIZE") / MIB}
        if self.device.type == "cuda":
            found["allocated"] = torch.cuda.memory_allocated(self.device) / MIB
        return found

    def most(self) -> dict[str, float]:
        """What was held at most, in MiB, between two looks as well."""
        status = Path("/proc/self/status").read_text()
        found = {"resident": int(status.partition("VmHWM:")[2].split()[0]) / 1024}
        if self.device.type == "cuda":
            found["allocated"] = torch.cuda.max_memory_allocated(self.device) / MIB
        return found

    def step(self, done: int) -> bool:
        """Look, if it is time to, after so many steps; return whether to go on."""
        if done % self.every == 0:
            self.steps.append(done)
            for name, value in self.now().items():
                self.seen[name].append(value)
        return time.monotonic() < self.end

    def tell(self) -> None:
        """Print all of it, for the process that waits."""
        result = {"before": self.before, "most": self.most(), "steps": self.steps}
        print(f"\n{RESULT} {json.dumps({**result, 'seen': self.seen})}", flush=True)


class MemoryWatch(L.Callback):
    """Watches a `fit`.

    Args:
        every: Looks at every so many steps.
        seconds: After which it stops the run.
    """

    def __init__(self, every: int = 10, seconds: float = 600.0) -> None:
        self.every = every
        self.seconds = seconds

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """All is imported and made, and no step done."""
        self.watch = Watch(trainer.strategy.root_device, self.every, self.seconds)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """Look."""
        if not self.watch.step(trainer.global_step):
            trainer.should_stop = True

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Report."""
        self.watch.tell()


class BareFit(DiffusionCLI):
    """All that `fit` imports and makes; but then the bare loop."""

    def _run_subcommand(self, subcommand: str) -> None:
        device = self.trainer.strategy.root_device
        (chosen,) = (c for c in self.trainer.callbacks if isinstance(c, MemoryWatch))
        self.datamodule.setup("fit")
        watch = Watch(device, chosen.every, chosen.seconds)
        loop = BareLoop(self.model.to(device), self.datamodule)
        self.model.denoiser.network = torch.nn.Identity()  # the loop has a copy
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        for done in range(1, self.trainer.max_steps + 1):
            loop.step()
            if not watch.step(done):
                break
        watch.tell()


def bare() -> None:
    """What runs in the bare loop's process."""
    BareFit(LitDiffusion, DataModule)


def run(code: str, words: Sequence[str]) -> dict[str, Any]:
    """Run `fit`, or what stands for it, in a process of its own."""
    path = os.pathsep.join([str(HERE), str(HERE.parent)])
    environment = {**os.environ, "WANDB_MODE": "disabled", "PYTHONPATH": path}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-c", code, "fit", "--plugins", "memory", *words],
            cwd=folder, env=environment, capture_output=True, text=True,
        )  # fmt: skip
    for line in done.stdout.splitlines():
        if line.startswith(RESULT):
            return json.loads(line.removeprefix(RESULT))
    raise SystemExit(done.stdout[-2000:] + done.stderr[-4000:])


def summary(
    name: str, memory: str, found: Mapping[str, Any], base: Mapping[str, Any]
) -> dict[str, Any]:
    """One row of the table.

    Args:
        name: Of the run.
        memory: Which memory.
        found: What the run reported.
        base: What the bare loop reported.
    """
    steps, seen = found["steps"], found["seen"][memory]
    quarter = max(1, len(seen) // 4)
    growth, alone = (each["most"][memory] - each["before"][memory] for each in (found, base))
    slope, _ = statistics.linear_regression(steps[quarter:], seen[quarter:])
    return {
        "run": name,
        "memory": memory,
        "steps": steps[-1],
        "before": found["before"][memory],
        "peak": found["most"][memory],
        "peak relative to bare": found["most"][memory] / base["most"][memory],
        "growth": growth,
        "growth relative to bare": growth / alone,
        "per 1,000 steps": slope * 1000,
        "last minus first quarter": statistics.median(seen[-quarter:])
        - statistics.median(seen[:quarter]),
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, and print a table."""
    parser = arguments(__doc__, seconds=600)
    parser.add_argument("--config", type=Path, default=CONFIGS / "digits.yaml")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--every", type=int, default=10, help="steps between two looks")
    parser.add_argument("words", nargs="*", help="further words for fit, after --")
    chosen = parser.parse_args(argv)
    words = [
        *("--config", str(chosen.config.resolve()), *chosen.words),
        *("--trainer.callbacks+=memory.MemoryWatch", f"--trainer.callbacks.every={chosen.every}"),
        *(f"--trainer.callbacks.seconds={chosen.seconds}", f"--trainer.max_steps={chosen.steps}"),
        *("--trainer.devices=1", f"--trainer.accelerator={chosen.device.partition(':')[0]}"),
    ]
    alone = f"--data.steps_per_epoch={chosen.steps + 1}"
    runs = {
        "bare loop": run(BARE, [*words, alone]),
        "fit": run(FIT, [*words, alone]),
        "fit, 4 validations": run(FIT, [*words, f"--data.steps_per_epoch={chosen.steps // 4}"]),
    }
    base = runs["bare loop"]
    rows = [
        summary(name, memory, found, base)
        for memory in base["seen"]
        for name, found in runs.items()
    ]
    title = f"Memory of {chosen.config.name} in MiB, looked at every {chosen.every} steps"
    result = report(title, machine(chosen.device), rows, None)
    result["runs"] = runs
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main()
