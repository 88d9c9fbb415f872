"""The callbacks of a run from the command line: the user's, then the usual ones, in one list."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint, ProgressBar, TQDMProgressBar

from lit_diffusion.training.callbacks.guard import Guard
from lit_diffusion.training.callbacks.last_checkpoint import LastCheckpoint
from lit_diffusion.training.callbacks.overview import Overview
from lit_diffusion.training.callbacks.throughput import Throughput

__all__ = ["RunProgressBar", "with_defaults"]


class RunProgressBar(TQDMProgressBar):
    """Lightning's progress bar, with the time until the end of the whole run."""

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """Add `left`, as h:mm:ss.

        Args:
            trainer: Knows the steps, and has `Throughput`, which knows the time of one.
            pl_module: The model.
        """
        metrics: dict[str, Any] = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)  # of a logger: the run folder's name cut short
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Throughput) and (left := callback.time_left(trainer)):
                metrics["left"] = left
        return metrics


def with_defaults(
    callbacks: Iterable[L.Callback], checkpoints: bool = True, progress_bar: bool = True
) -> list[L.Callback]:
    """Complete a list of callbacks by those of the usual ones whose kind it lacks.

    Hooks are called in the order of this list, except that Lightning calls checkpoints last, and
    the model's own `BatchFit`, which explains that memory ran out, just before them::

        the user's         in the order of the config
        RunProgressBar     refreshed every 20 steps: at each step it would cost most of 1 ms
        Guard              reads the loss from the device at a log step, so that …
        Throughput         … measures time when the device has finished
        Overview           logs the objective's curves, and the table of measurements
        BatchFit           from `LitDiffusion.configure_callbacks`
        LastCheckpoint     saves what all others have done at this step

    Args:
        callbacks: The user's.
        checkpoints: Whether checkpoints are written.
        progress_bar: Whether there is a progress bar.

    Example:
        >>> [type(callback).__name__ for callback in with_defaults([Guard(skip=True)])]
        ['Guard', 'RunProgressBar', 'Throughput', 'Overview', 'LastCheckpoint']
    """
    given = list(callbacks)
    usual: list[tuple[bool, type[L.Callback], Any]] = [
        (progress_bar, ProgressBar, lambda: RunProgressBar(refresh_rate=20)),
        (True, Guard, Guard),
        (True, Throughput, Throughput),
        (True, Overview, Overview),
        (checkpoints, Checkpoint, LastCheckpoint),
    ]
    lacking = [
        make
        for wanted, kind, make in usual
        if wanted and not any(isinstance(callback, kind) for callback in given)
    ]
    return [*given, *(make() for make in lacking)]
