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

import glob
import os
import time
from pathlib import Path

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from lit_diffusion.training.run.checkpoints import load_checkpoint
from lit_diffusion.training.run.dashboard import Dashboard
from lit_diffusion.training.run.messages import warn
from lit_diffusion.training.run.metrics_csv import RunLogger

__all__ = ["is_first_rank", "last_checkpoint", "new_run_folder", "run_loggers"]


def is_first_rank() -> bool:
    """Whether this process is rank 0, which is known before a trainer is made."""
    return getattr(rank_zero_only, "rank", 0) == 0


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
    runs = name if name == "*" else glob.escape(name)
    found = sorted(root.glob(f"{runs}/*/checkpoints/last.ckpt"), key=lambda p: p.stat().st_mtime)
    for path in reversed(found):
        try:
            load_checkpoint(path)
        except ValueError as error:
            warn(f"Skipped a checkpoint: {error}")
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
    if os.environ.get("WANDB_MODE") != "disabled" and is_first_rank():
        if wandb_id is None and resume_step is not None:
            wandb_id = f"{folder.parent.name}-{folder.name}"  # of checkpoints that do not name it
        loggers.append(Dashboard(folder, wandb_id))
    return loggers
