"""Ours as a user runs it: LitDiffusion with the trainer and the callbacks of the command line.

EMA, Guard, Throughput, the progress bar and metrics.csv; the optimizer of configs/cifar10.yaml.
For the compiled variant, the callback `Compile`.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from lit_diffusion import CosineSchedule, SigmoidWeighting, VPrediction
from lit_diffusion.nn import UNet
from lit_diffusion.training import LitDiffusion
from lit_diffusion.training.callbacks import EMA, Compile, Guard, Throughput
from peers.bare_loop import arguments, forward
from peers.task import Task, measure
from peers.worker import Turns


class Batches:
    """Batches as our data has them, without end."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """One after the other."""
        return ({"image": x} for x in self.task.batches())


class TakeTurns(L.Callback):
    """Holds the trainer before a step until the next turn, and stops it after the last one.

    Args:
        turns: How many steps there are to go, each time.
    """

    def __init__(self, turns: Turns) -> None:
        self.turns = iter(turns)
        self.left = 0

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        """Wait if the turn is over; the step in which the trainer stops is in no turn."""
        if self.left == 0:
            self.left = next(self.turns, 0)
            trainer.should_stop = self.left == 0
        self.left -= 1


def train(task: Task, turns: Turns) -> None:
    """Train in turns."""
    chosen = arguments(task)
    network = UNet(**chosen, channels_last=task.channels_last)
    turns.introduce("lightning", measure(network, forward, task), chosen)
    callbacks: list[L.Callback] = [EMA(decay=0.9999), Guard(), Throughput()]
    if task.compiled:
        callbacks.append(Compile(required=True))
    model = LitDiffusion(
        network=network,
        schedule=CosineSchedule(),
        weighting=SigmoidWeighting(bias=2.0),
        prediction=VPrediction(),
        optimizer=lambda parameters: torch.optim.AdamW(
            parameters, lr=2e-4, betas=(0.9, 0.99), weight_decay=0.0, fused=True
        ),
        shape=task.shape,
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="gpu" if task.device == "cuda" else "cpu",
            devices=1,
            precision="bf16-mixed" if task.precision == "bf16" else "32-true",
            max_epochs=1,
            gradient_clip_val=1.0,
            log_every_n_steps=50,
            enable_checkpointing=False,
            logger=CSVLogger(folder),
            callbacks=[*callbacks, TQDMProgressBar(refresh_rate=20), TakeTurns(turns)],
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(model, train_dataloaders=Batches(task))
