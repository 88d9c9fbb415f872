"""The run folder: where everything that a run writes is found.

    runs/<name>/<time>/config.yaml              the whole config, every default written out
                       checkpoints/last.ckpt    to resume from, or to sample from
                       samples/step-….png       sample grids along the run
                       metrics.csv              every number that was logged
                       wandb/                   the W&B run (offline unless WANDB_MODE says else)

It is the same whatever else a run is logged to, and no two runs share one, even if they start at
the same moment: rank 0 creates it, and the other ranks are told its path by `trainer.log_dir`.

A resumed run continues in its folder: the rows of metrics.csv after the checkpoint, which will be
logged again, are removed, and the W&B run is the one that the checkpoint names.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from lit_diffusion.training.run.dashboard import Dashboard
from lit_diffusion.training.run.metrics_csv import RunLogger

__all__ = [
    "TIME",
    "TRACES",
    "NewFolder",
    "check_name",
    "from_here",
    "is_first_rank",
    "is_run_folder",
    "new_run_folder",
    "run_loggers",
]

TIME = "%Y-%m-%d_%H-%M-%S"  # when a run began, the name of its folder
#: Any run has one of them.
TRACES = ("config.yaml", "metrics.csv", "checkpoints", "environment.json", "noise_levels.csv")
ATTEMPTS = 10_000  # to find a name that no other run takes at the same moment


def is_first_rank() -> bool:
    """Whether this process is rank 0; on several nodes it is known once a trainer is made."""
    return getattr(rank_zero_only, "rank", 0) == 0


def is_run_folder(folder: Path) -> bool:
    """Whether a folder has what a run writes.

    Args:
        folder: Any path.
    """
    return any((folder / trace).exists() for trace in TRACES)


def from_here(path: Path) -> Path:
    """A path as it is shown: relative to the working directory, if it lies below it.

    The folder of a run is absolute, so that a run goes on if its working directory is removed.

    Args:
        path: An absolute path.

    Example:
        >>> from_here(Path("runs/digits").absolute()).as_posix()
        'runs/digits'
    """
    try:
        return path.relative_to(Path.cwd())
    except (ValueError, FileNotFoundError):
        return path


def check_name(name: str) -> None:
    """Reject a name of runs that is not the path of a folder below the folder of all runs.

    Args:
        name: Such as digits, or sweep/a for runs/sweep/a.

    Raises:
        ValueError: If it is empty or absolute, or a part of it is empty or begins with a dot.

    Example:
        >>> check_name("sweep/lr[1e-3]")
        >>> check_name("../digits")
        Traceback (most recent call last):
        ValueError: --name must be a name such as digits or sweep/a, of parts that are neither ...
    """
    parts = name.split("/")
    if not name.isprintable() or not all(part.strip() and part[0] != "." for part in parts):
        raise ValueError(
            "--name must be a name such as digits or sweep/a, of parts that are neither empty nor "
            f"begin with a dot, and without control characters, got {name!r}."
        )


class NewFolder(NamedTuple):
    """A run folder that this process has created.

    Args:
        path: The folder.
        parents: The folders above it that were created with it, the outermost first.
    """

    path: Path
    parents: list[Path]

    def remove(self) -> None:
        """Remove the folder with its contents, and those above it that are empty again."""
        shutil.rmtree(self.path, ignore_errors=True)
        for parent in reversed(self.parents):
            with contextlib.suppress(OSError):
                parent.rmdir()


def new_run_folder(root: Path) -> NewFolder:
    """Create the folder of a new run, root/<time>, which is then no other run's.

    Args:
        root: The folder of all runs of one name.

    Raises:
        OSError: If it cannot be created.

    Example:
        >>> import tempfile
        >>> root = Path(tempfile.mkdtemp()) / "digits"
        >>> one, other = new_run_folder(root), new_run_folder(root)
        >>> one.path != other.path, one.path.is_dir(), [folder.name for folder in one.parents]
        (True, True, ['digits'])
    """
    parents: list[Path] = []
    name = time.strftime(TIME)
    for copy in range(ATTEMPTS):
        folder = root / (f"{name}_{copy}" if copy else name)
        try:
            _create(root, parents)
            folder.mkdir()
        except (FileExistsError, FileNotFoundError):  # taken; or another run removed its own name
            if root.exists() and not root.is_dir():
                raise
        else:
            return NewFolder(folder, parents)
    raise OSError(f"A folder for the run cannot be created in {root}.")


def _create(folder: Path, created: list[Path]) -> None:
    """Create a folder and those above it; those that did not exist are added to `created`."""
    for one in (*reversed(folder.parents), folder):
        if not one.is_dir():
            with contextlib.suppress(FileExistsError):
                one.mkdir()
                created.append(one)


def run_loggers(
    folder: Path,
    resume_step: int | None = None,
    wandb_id: str | None = None,
    given: Sequence[Logger] = (),
    further: bool = True,
) -> list[Logger]:
    """The loggers of a run: metrics.csv, the user's, and Weights & Biases unless it is disabled.

    The first of them is the one that tells `trainer.log_dir` the run folder.

    Args:
        folder: The run folder.
        resume_step: Step of the checkpoint that is resumed from.
        wandb_id: The W&B run to continue, which that checkpoint names.
        given: The user's loggers; with a WandbLogger among them there is no other W&B run.
        further: Whether there are loggers besides that of metrics.csv.
    """
    loggers: list[Logger] = [RunLogger(folder, resume_step), *(given if further else ())]
    own = any(isinstance(logger, WandbLogger) for logger in given)
    enabled = further and not own and os.environ.get("WANDB_MODE") != "disabled"
    if enabled and is_first_rank():
        if wandb_id is None and resume_step is not None:
            wandb_id = f"{folder.parent.name}-{folder.name}"  # of checkpoints that do not name it
        loggers.append(Dashboard(folder, wandb_id))
    return loggers
