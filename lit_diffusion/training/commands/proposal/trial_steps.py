"""A few steps of a proposed training, to measure its time and memory on this machine."""

from __future__ import annotations

import logging
import os
import statistics
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import lightning as L
import torch
from torch.utils.data import DataLoader

from lit_diffusion.training.callbacks.throughput import peak_memory
from lit_diffusion.training.commands.shell.parsing import instantiate
from lit_diffusion.training.module import LitDiffusion
from lit_diffusion.training.run.environment import device_name
from lit_diffusion.training.step.learning_rates import WarmupDecayLR  # noqa: F401, a config names it

__all__ = ["Trial", "try_steps"]

WARM_UP, MEASURED = 2, 4  # steps


class Trial(NamedTuple):
    """The time and memory of a training step.

    Attributes:
        seconds: Of a step, the median of a few.
        memory: The most memory that was used, in GiB, as `peak_memory` defines it; None if the
            system does not report it.
        parameters: Number of parameters of the network.
        device: On which it was measured.
        load: The system's load in the last minute, if it exceeds the number of CPUs; else 0.
    """

    seconds: float
    memory: float | None
    parameters: int
    device: str
    load: float = 0.0

    def __str__(self) -> str:
        memory = "" if self.memory is None else f", {self.memory:.2f} GiB"
        busy = f"; the machine was busy, with a load of {self.load:.1f}" if self.load else ""
        return (
            f"{self.seconds:.3g} s a step{memory} on {self.device} "
            f"({MEASURED} steps after {WARM_UP}, {self.parameters / 1e6:.1f} M parameters{busy})"
        )


class _Clock(L.Callback):
    """Notes when each step ends, after the device has finished it."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        self.ends.append(time.perf_counter())


def try_steps(
    model: Mapping[str, Any], trainer: Mapping[str, Any], batch: Mapping[str, Any]
) -> Trial:
    """Train a few steps on one batch, without anything that a run writes.

    Args:
        model: The part `model` of a config, with the network's shape.
        trainer: The part `trainer`.
        batch: As from the data module: bytes, and labels if there are classes.
    """
    clock, lit = _Clock(), instantiate(LitDiffusion, model)
    steps = WARM_UP + MEASURED
    with _quietly():
        runner = L.Trainer(
            max_steps=steps,
            gradient_clip_val=trainer.get("gradient_clip_val"),
            precision=trainer.get("precision"),
            devices=1,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[clock],
        )
        batches: Any = [dict(batch)] * steps
        runner.fit(lit, DataLoader(batches, batch_size=None))
    times = [b - a for a, b in zip(clock.ends, clock.ends[1:], strict=False)][-MEASURED:]
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    device = runner.strategy.root_device
    where = (
        f"a CPU, threads: {torch.get_num_threads()}"
        if device.type == "cpu"
        else device_name(device)
    )
    cpus = os.cpu_count() or 1
    parameters = sum(p.numel() for p in lit.denoiser.network.parameters())
    return Trial(
        statistics.median(times),
        peak_memory(device),
        parameters,
        where,
        load if load > cpus else 0.0,
    )


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the messages of Lightning, which are about runs."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
