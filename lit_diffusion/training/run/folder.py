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
from collections.abc import Iterable
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
    """The newest readable checkpoint among the runs of a name; None if there is none.

    It is last.ckpt of `LastCheckpoint`, or one of Lightning's `ModelCheckpoint` that has more
    steps. One with weights alone is none to continue from, and left out.

    Args:
        root: The folder of all runs.
        name: Name of the runs; * for any.
    """
    runs = name if name == "*" else glob.escape(name)
    ages = {path: path.stat().st_mtime for path in root.glob(f"{runs}/*/checkpoints/*.ckpt")}
    newest_first = sorted(ages, key=lambda path: ages[path], reverse=True)
    for folder in dict.fromkeys(path.parent for path in newest_first):
        last = folder / "last.ckpt"
        others = [path for path in newest_first if path.parent == folder and path != last]
        found = _first_readable([last] if last in ages else [])
        if newer := [path for path in others if not found or ages[path] > ages[last]]:
            found |= _first_readable(newer)
        if found:
            return max(found, key=lambda path: (found[path], path == last))
    return None


def _first_readable(paths: Iterable[Path]) -> dict[Path, int]:
    """The first checkpoint that a run can continue from, with its step; empty if none can."""
    for path in paths:
        try:
            checkpoint = load_checkpoint(path)
        except ValueError as error:
            warn(f"Skipped a checkpoint: {error}")
        else:
            if "optimizer_states" in checkpoint:
                return {path: checkpoint["global_step"]}
    return {}


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
