"""The run folder: where everything that a run writes is found.

    runs/<name>/<time>/config.yaml              the whole config, every default written out
                       checkpoints/last.ckpt    to resume from, or to sample from
                       samples/step-….png       sample grids along the run
                       metrics.csv              every number that was logged
                       wandb/                   the W&B run (offline unless WANDB_MODE says else)

A resumed run continues in its folder: the rows of metrics.csv after the checkpoint, which will be
logged again, are removed, and the W&B run is the one that the checkpoint names.
"""

from __future__ import annotations

import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from lit_diffusion.description import public_path
from lit_diffusion.training.run.checkpoints import load_checkpoint
from lit_diffusion.training.run.dashboard import Dashboard
from lit_diffusion.training.run.metrics_csv import RunLogger
from lit_diffusion.training.run.whole_file import write_whole

__all__ = [
    "SaveConfig",
    "last_checkpoint",
    "new_run_folder",
    "run_loggers",
    "with_public_paths",
]


def new_run_folder(root: Path) -> Path:
    """The path of a new run, root/<time>, which no other run has.

    Args:
        root: The folder of all runs of one name.
    """
    name = time.strftime("%Y-%m-%d_%H-%M-%S")
    folder, copy = root / name, 1
    while folder.exists():
        folder, copy = root / f"{name}_{copy}", copy + 1
    return folder


def last_checkpoint(root: Path, name: str = "*") -> Path | None:
    """The newest readable last.ckpt among the runs of a name; None if there is none.

    Args:
        root: The folder of all runs.
        name: Name of the runs; * for any.
    """
    found = sorted(root.glob(f"{name}/*/checkpoints/last.ckpt"), key=lambda p: p.stat().st_mtime)
    for path in reversed(found):
        try:
            load_checkpoint(path)
        except ValueError as error:
            rank_zero_warn(f"Skipped a checkpoint: {error}")
        else:
            return path
    return None


def run_loggers(
    folder: Path, resume_step: int | None = None, wandb_id: str | None = None
) -> list[Logger]:
    """The loggers of a run: metrics.csv, and Weights & Biases unless it is disabled.

    Args:
        folder: The run folder.
        resume_step: Step of the checkpoint that is resumed from.
        wandb_id: The W&B run to continue, which that checkpoint names.
    """
    loggers: list[Logger] = [RunLogger(folder, resume_step)]
    if os.environ.get("WANDB_MODE") != "disabled" and rank_zero_only.rank == 0:
        if wandb_id is None and resume_step is not None:
            wandb_id = f"{folder.parent.name}-{folder.name}"  # of checkpoints that do not name it
        loggers.append(Dashboard(folder, wandb_id))
    return loggers


def with_public_paths(config: str) -> str:
    """A config in which each class has the shortest path from which it can be imported.

    The parser keeps a longer path as the user wrote it, which may name a file that moves.

    Args:
        config: The text of a config whose classes have been imported.

    Example:
        >>> with_public_paths("class_path: lit_diffusion.weightings.base.Weighting")
        'class_path: lit_diffusion.Weighting'
    """

    def shortest(found: re.Match[str]) -> str:
        module, _, name = found[2].rpartition(".")
        cls = getattr(sys.modules.get(module), name, None)
        return found[1] + (public_path(cls) if isinstance(cls, type) else found[2])

    return re.sub(r"(\bclass_path: )([\w.]+)", shortest, config)


class SaveConfig(SaveConfigCallback):
    """Saves the whole config as config.yaml in the run folder, and to W&B."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "save_to_log_dir": False})

    def save_config(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Save the config, on rank 0.

        Args:
            trainer: Has the loggers.
            pl_module: The model.
            stage: fit, validate, test or predict.
        """
        text = with_public_paths(self.parser.dump(self.config, skip_none=False))
        for logger in trainer.loggers:
            if isinstance(logger, RunLogger):
                folder = Path(logger.log_dir)
                folder.mkdir(parents=True, exist_ok=True)
                file = folder / "config.yaml"
                if file.is_file() and file.read_text() != text:
                    # A run resumed with other settings: keep what the first steps were run with.
                    file = folder / f"config-{time.strftime('%Y-%m-%d_%H-%M-%S')}.yaml"
                write_whole(file, text)
            elif isinstance(logger, Dashboard):
                logger.log_config(yaml.safe_load(text))
            elif isinstance(logger, WandbLogger):
                logger.experiment.config.update(yaml.safe_load(text), allow_val_change=True)
