"""Log the objective's curves and the measurements table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L

from lit_diffusion.loss import DiffusionLoss
from lit_diffusion.objective import Objective
from lit_diffusion.predictions import Prediction
from lit_diffusion.training.lightning_internals import logged_step
from lit_diffusion.training.reporting.objective import save_objective
from lit_diffusion.training.run.dashboard import Dashboard, show
from lit_diffusion.training.run.measurements import Measurement, read_measurements
from lit_diffusion.training.run.messages import warn
from lit_diffusion.training.run.tolerance import may_fail
from lit_diffusion.training.run.trainer import output_folder
from lit_diffusion.training.run.whole_file import write_whole

__all__ = ["Overview"]

CLASS_NAMES = "class_names.json"


class Overview(L.Callback):
    """Plots the objective at the start, logs the measurements to W&B, and stores the W&B run id.

    class_names.json in the run folder has the names of the classes, by their numbers, if the data
    name them and the network knows classes. objective.png is the plot of `lit-diffusion objective`
    for the schedule, weighting and prediction that are trained. The records of metrics.json are
    logged as a table, each with its protocol, after a validation that added to them and at the
    end. The id of the W&B run is stored in every checkpoint, so that a resumed run continues the
    same W&B run.
    """

    def __init__(self) -> None:
        self._id: str | None = None
        self._measured: list[Measurement] = []
        self._folder: Path | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Plot the objective, and record the classes; neither may stop a run."""
        folder = output_folder(trainer)
        if not trainer.is_global_zero or not trainer.loggers or folder is None:
            return
        self._folder = folder
        if (names := getattr(pl_module, "class_names", None)) is not None:
            with may_fail(folder / CLASS_NAMES):
                text = json.dumps(names, indent=1, ensure_ascii=False)
                write_whole(folder / CLASS_NAMES, text + "\n")
        path = folder / "objective.png"
        try:
            loss: DiffusionLoss = pl_module.loss
            prediction: Prediction = pl_module.denoiser.prediction
            found = Objective(loss.schedule, loss.weighting, prediction, loss.num_timesteps)
            save_objective(found, path)
        except Exception as error:
            warn(f"The objective could not be plotted: {type(error).__name__}: {error}")
        else:
            show(trainer, "objective", path)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the new measurements of all callbacks."""
        self._log_measurements(trainer)

    on_train_end = on_validation_end

    def _log_measurements(self, trainer: L.Trainer) -> None:
        if self._folder is None or trainer.sanity_checking:
            return
        try:
            measured = read_measurements(self._folder)
        except ValueError as error:
            warn(str(error))
            return
        if measured == self._measured:
            return
        self._measured = measured
        columns = list(Measurement._fields)
        rows = [[*one[:-1], json.dumps(one.protocol, ensure_ascii=False)] for one in measured]
        step = logged_step(trainer)
        for logger in trainer.loggers:
            if hasattr(logger, "log_table"):
                logger.log_table("measurements", columns, rows, step=step)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Store the id of the W&B run, even if W&B has been disabled since."""
        for logger in trainer.loggers:
            if isinstance(logger, Dashboard):
                self._id = logger.version
        if self._id is not None:
            checkpoint["wandb_id"] = self._id

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restore the id of the W&B run."""
        self._id = checkpoint.get("wandb_id")
