"""The cost of callbacks per step: adaptive schedule, noise levels and throughput.

    python benchmarks/callbacks.py [--steps 600]

Runs configs/digits.yaml with a network of about 20 ms per step and the overlays with/adaptive.yaml
and with/noise-levels.yaml, and measures the time spent in the hooks of the two callbacks and of
Throughput, and between the starts of two steps. Means are over steps without the slowest
hundredth; what a validation writes is listed separately.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import lightning as L

from lit_diffusion.training import AdaptiveScheduleUpdate, NoiseLevelLoss, Throughput

ROOT = Path(__file__).parents[1]
RESULT = "CALLBACKS_RESULT"


class Stopwatch(L.Callback):
    """Times the hooks of the callbacks, and the steps."""

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = defaultdict(list)
        self.since: float | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Put a watch around each hook."""
        for callback in trainer.callbacks:
            if isinstance(callback, (AdaptiveScheduleUpdate, NoiseLevelLoss)):
                for hook in ("on_train_batch_end", "on_validation_epoch_end"):
                    self.watch(callback, hook)
            if isinstance(callback, Throughput):
                self.watch(callback, "on_train_batch_start")
                self.watch(callback, "on_train_batch_end")

    def watch(self, owner: Any, hook: str) -> None:
        """Put a watch around a hook."""
        setattr(owner, hook, self.timed(f"{type(owner).__name__}.{hook}", getattr(owner, hook)))

    def timed(self, name: str, hook: Any) -> Any:
        """The same hook, whose time is kept."""

        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = hook(*args, **kwargs)
            self.times[name].append(1e3 * (time.perf_counter() - start))
            return result

        return run

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """The time since the last step began, a validation's left out."""
        now = time.perf_counter()
        if self.since is not None:
            self.times["step"].append(1e3 * (now - self.since))
        self.since = now

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """The next step does not follow on the last one."""
        self.since = None

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Report, the first fifty steps left out."""
        step = statistics.median(self.times.pop("step")[50:])
        result = {"ms per step": step}
        each = 0.0
        for name, times in self.times.items():
            if not name.endswith("on_validation_epoch_end"):
                times = sorted(times[50:])
                kept = times[: max(1, int(0.99 * len(times)))]  # the machine's own pauses
                result[name] = statistics.mean(kept)
                if name.startswith((AdaptiveScheduleUpdate.__name__, NoiseLevelLoss.__name__)):
                    each += result[name]
            else:
                result[name] = statistics.median(times)
        result["share of a step, %"] = 100 * each / step
        print(RESULT, json.dumps(result), flush=True)


def main() -> None:
    """Measure once, by the command that a user runs."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=600)
    chosen = parser.parse_args()
    words = [
        *(sys.executable, "-m", "lit_diffusion", "fit", "--plugins", "callbacks"),
        *("--config", str(ROOT / "configs" / "digits.yaml")),
        *("--config", str(ROOT / "configs" / "with" / "adaptive.yaml")),
        *("--config", str(ROOT / "configs" / "with" / "noise-levels.yaml")),
        *("--model.network.channels=[16,32]", "--trainer.callbacks+=callbacks.Stopwatch"),
        *(f"--trainer.max_steps={chosen.steps}", "--data.steps_per_epoch=200"),
        "--trainer.enable_progress_bar=false",
    ]
    environment = {**os.environ, "WANDB_MODE": "disabled", "PYTHONPATH": str(ROOT / "benchmarks")}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        if RESULT in line:
            print(json.dumps(json.loads(line.partition(RESULT)[2]), indent=1))
            return
    raise SystemExit(done.stdout[-2000:] + done.stderr[-4000:])


if __name__ == "__main__":
    main()
