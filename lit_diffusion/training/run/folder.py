"""Where a run leaves its traces.

    runs/<name>/<time>/config.yaml              the whole config, every default written out
                       checkpoints/last.ckpt    to go on from, or to sample from
                       samples/step-….png       grids along the run
                       metrics.csv              every number that was logged
                       wandb/                   the W&B run (offline unless WANDB_MODE says else)

A resumed run goes on in its folder: rows of metrics.csv from after the checkpoint, which will be
logged again, are dropped, and the W&B run is the one that the checkpoint names.
"""

from __future__ import annotations

import csv
import io
import os
import time
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from lit_diffusion.training.run.checkpoints import load_checkpoint
from lit_diffusion.training.run.dashboard import Dashboard
from lit_diffusion.training.run.whole_file import write_whole

__all__ = [
    "RunLogger",
    "SaveConfig",
    "last_checkpoint",
    "new_run_folder",
    "run_loggers",
]


def new_run_folder(root: Path) -> Path:
    """A name for a new run that no other has: root/<time>.

    Args:
        root: The folder of all runs of that name.
    """
    name = time.strftime("%Y-%m-%d_%H-%M-%S")
    folder, copy = root / name, 1
    while folder.exists():
        folder, copy = root / f"{name}_{copy}", copy + 1
    return folder


def last_checkpoint(root: Path, name: str = "*") -> Path | None:
    """The newest last.ckpt of the runs of a name that can be read; None if there is none.

    Args:
        root: The folder of all runs.
        name: The name of the runs; * for any.
    """
    found = sorted(root.glob(f"{name}/*/checkpoints/last.ckpt"), key=lambda p: p.stat().st_mtime)
    for path in reversed(found):
        try:
            load_checkpoint(path)
        except ValueError as error:
            rank_zero_warn(f"Passed over: {error}")
        else:
            return path
    return None


class _Rows(ExperimentWriter):
    """metrics.csv, of which a kill at any moment costs no row but the one being written."""

    def start(self, rows: list[dict[str, Any]]) -> None:
        """Begin the file with the rows of a run that is resumed."""
        self.metrics_keys = sorted(set().union(*rows))
        self._replace(rows, self.metrics_keys)

    def _check_log_dir_exists(self) -> None:
        """Keep what is there: Lightning would delete it and begin again."""

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        with open(self.metrics_file_path, newline="") as lines:
            self._replace(list(csv.DictReader(lines)), fieldnames)

    def _replace(self, rows: list[dict[str, Any]], fieldnames: list[str]) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=fieldnames)
        writer.writeheader()
        writer.writerows(rows)
        write_whole(Path(self.metrics_file_path), text.getvalue())


class RunLogger(CSVLogger):
    """metrics.csv in the run folder; a resumed run continues it at the checkpoint's step.

    Args:
        folder: The run folder.
        resume_step: Step of the checkpoint; rows from it on, which the run logs again, go.
    """

    def __init__(self, folder: Path, resume_step: int | None = None) -> None:
        super().__init__(
            folder.parent.parent,
            name=folder.parent.name,
            version=folder.name,
            flush_logs_every_n_steps=1,
        )
        self._resume_step = resume_step
        self._last: tuple[Any, ...] = ()

    @property
    def experiment(self) -> Any:
        """The writer of the file."""
        if self._experiment is None and rank_zero_only.rank == 0:
            self._experiment = _Rows(self.log_dir)
            if rows := self._earlier_rows():
                self._experiment.start(rows)
            else:
                Path(self.log_dir, "metrics.csv").unlink(missing_ok=True)
        return super().experiment

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Write a row, once: a checkpoint has its step written before the trainer does.

        Args:
            metrics: Names and numbers.
            step: Where they stand.
        """
        if (row := (step, dict(metrics))) != self._last:
            self._last = row
            super().log_metrics(metrics, step)

    def log_hyperparams(self, params: Any = None, *args: Any, **kwargs: Any) -> None:
        """Leave them to config.yaml."""

    def _earlier_rows(self) -> list[dict[str, Any]]:
        file = Path(self.log_dir) / "metrics.csv"
        if self._resume_step is None or not file.is_file():
            return []
        with file.open(newline="") as lines:
            reader = csv.DictReader(lines)
            # A row that a kill cut short is one that will be logged again.
            whole = [row for row in reader if None not in row.values() and row["step"].isdigit()]
        rows = [{k: v for k, v in row.items() if v != ""} for row in whole]
        return [row for row in rows if int(row["step"]) < self._resume_step]


def run_loggers(
    folder: Path, resume_step: int | None = None, wandb_id: str | None = None
) -> list[Logger]:
    """The loggers of a run: metrics.csv, and Weights & Biases unless it is disabled.

    Args:
        folder: The run folder.
        resume_step: Step of the checkpoint that is resumed from.
        wandb_id: The W&B run to go on with, which that checkpoint names.
    """
    loggers: list[Logger] = [RunLogger(folder, resume_step)]
    if os.environ.get("WANDB_MODE") != "disabled" and rank_zero_only.rank == 0:
        if wandb_id is None and resume_step is not None:
            wandb_id = f"{folder.parent.name}-{folder.name}"  # before checkpoints named it
        loggers.append(Dashboard(folder, wandb_id))
    return loggers


class SaveConfig(SaveConfigCallback):
    """Writes the whole config to config.yaml in the run folder, and to W&B."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "save_to_log_dir": False})

    def save_config(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Write it, on rank 0.

        Args:
            trainer: Has the loggers.
            pl_module: The model.
            stage: fit, validate, test or predict.
        """
        text = self.parser.dump(self.config, skip_none=False)
        for logger in trainer.loggers:
            if isinstance(logger, RunLogger):
                folder = Path(logger.log_dir)
                folder.mkdir(parents=True, exist_ok=True)
                file = folder / "config.yaml"
                if file.is_file() and file.read_text() != text:
                    # A resumed run with other settings: what the first steps had stays on record.
                    file = folder / f"config-{time.strftime('%Y-%m-%d_%H-%M-%S')}.yaml"
                write_whole(file, text)
            elif isinstance(logger, Dashboard):
                logger.log_config(yaml.safe_load(text))
            elif isinstance(logger, WandbLogger):
                logger.experiment.config.update(yaml.safe_load(text), allow_val_change=True)
