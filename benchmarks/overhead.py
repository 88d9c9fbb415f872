"""The overhead of the framework: `lit-diffusion fit` against a bare PyTorch loop, step for step.

    python benchmarks/overhead.py [--seconds 60] [--block 20] [--device cpu]

Both run in one process and alternate, a block of steps each, so that a noisy machine affects them
alike. The bare loop has a copy of the same network, the same optimizer, batch and data loader, and
does the same work: λ and ε, label dropout, weighted loss, clipping, learning rate, EMA. The other
side is what a user runs: the trainer, callbacks, logging to metrics.csv, the progress bar. The
output are medians over blocks: with the network of the demo, where a noisy machine hides a
millisecond, and with a single convolution, where it is visible; with images decoded between the
steps, as in the demo, which evicts both loops from the caches, and with images from memory. The
last row has neither the callbacks of the config nor logger nor progress bar.
"""

from __future__ import annotations

import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from measuring import arguments, machine, ratio, report
from torch import Tensor

ROOT = Path(__file__).parents[1]
RESULT = "OVERHEAD_RESULT"


class OneConvolution(torch.nn.Module):
    """Almost no network at all, so that what is left is the framework.

    Args:
        shape: Channels, height and width.
        num_classes: Accepted and not used.
    """

    def __init__(self, shape: tuple[int, int, int] = (1, 8, 8), num_classes: int = 10) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.num_classes = num_classes
        self.layer = torch.nn.Conv2d(shape[0], shape[0], 3, padding=1)

    def forward(self, z: Tensor, logsnr: Tensor, label: Tensor | None = None) -> Tensor:
        """One convolution."""
        return self.layer(z)


class BareLoop:
    """The loop one would write by hand for configs/digits.yaml."""

    def __init__(self, model: Any, datamodule: Any) -> None:
        self.network = copy.deepcopy(model.denoiser.network)
        self.parameters = [p for p in self.network.parameters() if p.requires_grad]
        self.average = [p.detach().clone() for p in self.parameters]
        self.optimizer = model.optimizer(self.parameters)
        self.rate = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min(1, step / 200)
        )
        twin = copy.copy(datamodule)
        twin._forget()
        twin.setup("fit")
        self.loader = twin.train_dataloader()
        self.batches = iter(self.loader)
        self.device = model.device
        self.low, self.high = model.loss.schedule.logsnr_min, model.loss.schedule.logsnr_max

    def batch(self) -> dict[str, Tensor]:
        """The next batch, epoch after epoch."""
        try:
            return next(self.batches)
        except StopIteration:
            self.batches = iter(self.loader)
            return next(self.batches)

    def step(self) -> None:
        """One optimizer step."""
        batch = self.batch()
        x = batch["image"].to(self.device) / 127.5 - 1
        label = batch["label"].to(self.device)
        n = len(x)
        label = torch.where(torch.rand(n, device=self.device) < 0.1, -1, label)
        t = (torch.rand((), device=self.device) + torch.arange(n, device=self.device) / n) % 1
        logsnr = self.high + (self.low - self.high) * t
        alpha = logsnr.sigmoid().sqrt().reshape(-1, 1, 1, 1)
        sigma = (-logsnr).sigmoid().sqrt().reshape(-1, 1, 1, 1)
        eps = torch.randn_like(x)
        z = alpha * x + sigma * eps
        v = self.network(z, logsnr, label)
        error = (sigma * z + alpha * v - eps).square().flatten(1).mean(1)
        loss = (0.5 * (self.high - self.low) * error).mean()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 5.0)
        self.optimizer.step()
        self.rate.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.parameters, 1e-3)


class Interleave(L.Callback):
    """Stops the trainer after every block of steps and runs a block of the bare loop.

    Args:
        block: Steps in a block.
        seconds: When to end the run.
        warmup: Blocks that are not counted.
    """

    def __init__(self, block: int = 20, seconds: float = 60.0, warmup: int = 3) -> None:
        self.block = block
        self.seconds = seconds
        self.warmup = warmup
        self.trainer_ms: list[float] = []
        self.bare_ms: list[float] = []
        self.since = 0.0

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Make the bare loop."""
        self.bare = BareLoop(pl_module, trainer.datamodule)
        self.start = self.since = self._now()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """Between two steps: close the trainer's block, and run a bare one."""
        if trainer.global_step == 0 or trainer.global_step % self.block:
            return
        now = self._now()
        self.trainer_ms.append((now - self.since) / self.block * 1e3)
        for _ in range(self.block):
            self.bare.step()
        self.since = self._now()
        self.bare_ms.append((self.since - now) / self.block * 1e3)
        enough = len(self.bare_ms) >= self.warmup + 3
        if enough and self.since - self.start > self.seconds:
            trainer.should_stop = True

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Report."""
        ours, bare = self.trainer_ms[self.warmup :], self.bare_ms[self.warmup :]
        extra = [a - b for a, b in zip(ours, bare, strict=True)]
        result = {
            "blocks": len(ours),
            "parameters": sum(p.numel() for p in pl_module.parameters()),
            "fit_ms": statistics.median(ours),
            "bare_ms": statistics.median(bare),
            "extra_ms": statistics.median(extra),
            "ratio": ratio(ours, bare),
        }
        print(RESULT, json.dumps(result), flush=True)


NETWORK = ["--model.network=overhead.OneConvolution"]
MEMORY = ["--data.streaming=false"]
ALONE = [
    *("--trainer.callbacks=[]", "--trainer.logger=false"),
    *("--trainer.enable_progress_bar=false", "--trainer.enable_checkpointing=false"),
]
CASES = {
    "configs/digits.yaml": [],
    "configs/digits.yaml, images from memory": MEMORY,
    "one convolution": NETWORK,
    "one convolution, images from memory": [*NETWORK, *MEMORY],
    "the same, fewest callbacks": [*NETWORK, *MEMORY, *ALONE],
}


def measure(case: list[str], chosen: Any) -> dict[str, float]:
    """Run the real command once, in a process of its own."""
    device = "gpu" if chosen.device.startswith("cuda") else "cpu"
    words = [
        *(sys.executable, "-m", "lit_diffusion", "fit", "--plugins", "overhead"),
        *("--config", str(ROOT / "configs" / "digits.yaml"), *case),
        *("--trainer.callbacks+=overhead.Interleave", f"--trainer.callbacks.block={chosen.block}"),
        f"--trainer.callbacks.seconds={chosen.seconds}",
        *("--trainer.max_steps=10000000", "--data.steps_per_epoch=10000000"),
        *("--trainer.limit_val_batches=0", f"--trainer.accelerator={device}"),
        "--trainer.devices=1",
    ]
    environment = {**os.environ, "WANDB_MODE": "disabled", "PYTHONPATH": str(ROOT / "benchmarks")}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        if RESULT in line:
            return json.loads(line.partition(RESULT)[2])
    raise SystemExit(done.stdout[-2000:] + done.stderr[-4000:])


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure and print a table, and the same as JSON."""
    parser = arguments(__doc__)
    parser.add_argument("--block", type=int, default=20, help="steps in a turn")
    chosen = parser.parse_args(argv)
    rows = []
    for name, case in CASES.items():
        r = measure(case, chosen)
        rows.append(
            {
                "network": name,
                "parameters": r["parameters"],
                "bare ms/step": r["bare_ms"],
                "fit ms/step": r["fit_ms"],
                "extra ms": r["extra_ms"],
                "ratio": r["ratio"],
                "blocks": r["blocks"],
            }
        )
    return report("Overhead over a bare loop", machine(chosen.device), rows, chosen.json)


if __name__ == "__main__":
    main()
