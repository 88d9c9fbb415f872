"""The callbacks of a run from the command line: the user's, then the defaults, in one list."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint, ProgressBar, TQDMProgressBar

from lit_diffusion.training.callbacks.guard import Guard
from lit_diffusion.training.callbacks.last_checkpoint import LastCheckpoint
from lit_diffusion.training.callbacks.overview import Overview
from lit_diffusion.training.callbacks.predictions import Predictions
from lit_diffusion.training.callbacks.throughput import Throughput
from lit_diffusion.training.run.trainer import all_callbacks

__all__ = ["RunProgressBar", "with_defaults"]


class RunProgressBar(TQDMProgressBar):
    """Lightning's progress bar, with the time left until the end of the run."""

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """Add `left`, as h:mm:ss.

        Args:
            trainer: Has the number of steps, and `Throughput`, which times them.
            pl_module: The model.
        """
        metrics: dict[str, Any] = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)  # of a logger: the truncated name of the run folder
        for callback in all_callbacks(trainer):
            if isinstance(callback, Throughput) and (left := callback.time_left(trainer)):
                metrics["left"] = left
        return metrics


def with_defaults(
    callbacks: Iterable[L.Callback], checkpoints: bool = True, progress_bar: bool = True
) -> list[L.Callback]:
    """Add the default callbacks to a list that has none of their kind.

    Hooks are called in the order of this list, except that Lightning calls checkpoints last, and
    the model's own `BatchFit`, which handles out-of-memory errors, just before them::

        the user's         in the order of the config
        RunProgressBar     refreshed every 20 steps: at each step it would cost nearly 1 ms
        Guard              reads the loss from the device at a log step, so that …
        Throughput         … measures time when the device has finished
        Overview           logs the objective's curves and the table of measurements
        Predictions        writes the samples of `predict`
        BatchFit           from `LitDiffusion.configure_callbacks`
        LastCheckpoint     saves the state that all others have left at this step

    Args:
        callbacks: The user's callbacks.
        checkpoints: Whether checkpoints are written.
        progress_bar: Whether there is a progress bar.

    Example:
        >>> [type(callback).__name__ for callback in with_defaults([Guard()])]
        ['Guard', 'RunProgressBar', 'Throughput', 'Overview', 'Predictions', 'LastCheckpoint']
    """
    given = list(callbacks)
    defaults: list[tuple[bool, type[L.Callback], Any]] = [
        (progress_bar, ProgressBar, lambda: RunProgressBar(refresh_rate=20)),
        (True, Guard, Guard),
        (True, Throughput, Throughput),
        (True, Overview, Overview),
        (True, Predictions, Predictions),
        (checkpoints, Checkpoint, LastCheckpoint),
    ]
    missing = [
        make
        for wanted, kind, make in defaults
        if wanted and not any(isinstance(callback, kind) for callback in given)
    ]
    return [*given, *(make() for make in missing)]
