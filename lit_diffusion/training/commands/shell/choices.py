"""Which checkpoint, run and device an argument means: the one place where commands look it up.

A checkpoint is given as its file, as a run folder, whose last.ckpt it is, or as `last`: that of
the newest run. A run is given in the same three ways.
"""

from __future__ import annotations

from pathlib import Path

import torch

from lit_diffusion.models.pretrained import CONFIG
from lit_diffusion.training.commands.shell.errors import UsageError
from lit_diffusion.training.run.folder import TRACES, is_run_folder
from lit_diffusion.training.run.messages import inform
from lit_diffusion.training.run.newest import LAST, last_checkpoint

__all__ = [
    "find_device",
    "find_run",
    "name_checkpoint",
    "resolve_checkpoint",
    "resolve_weights",
    "run_of",
]

ROOT = "runs"  # the folder of all runs


def name_checkpoint(path: Path, step: int) -> None:
    """Report the checkpoint that a command has read, by its file and its step.

    Args:
        path: Its file.
        step: Optimizer steps behind its weights.
    """
    inform(f"Using {path}, step {step}.")


def resolve_checkpoint(
    given: str | Path, name: str | None = None, root: str | Path | None = None
) -> Path:
    """The path of the checkpoint that is meant, without reading it.

    Args:
        given: Its file, a run folder, or `last`: the newest below root.
        name: With `last`: only runs of this name.
        root: With `last`: the folder of all runs; None for runs/.

    Raises:
        ValueError: If there is no run, or a run has no checkpoint.
    """
    path = Path(given)
    if given == "last":
        root = Path(root or ROOT)
        found = last_checkpoint(root, name)
        if found is None:
            below = root / (name or "")
            raise UsageError(
                f"there is no checkpoint below {below}; train first, or give its path."
            )
        return found
    if name is not None or root is not None:
        raise UsageError(
            "--name and --root say which checkpoint is `last`: omit them, or give `last`, "
            f"not {given}."
        )
    if path.is_dir() and not (path / LAST).is_file():
        raise UsageError(
            f"{path} has no {LAST}: expected a checkpoint, the folder of a run, or `last`."
        )
    if not path.exists():
        raise UsageError(
            f"No checkpoint at {path}: expected a checkpoint, the folder of a run, or `last`."
        )
    return path / LAST if path.is_dir() else path


def resolve_weights(given: str | Path) -> Path:
    """The path of the weights that are meant, without reading them.

    Args:
        given: A checkpoint, a run folder, `last`, or a folder that `lit-diffusion export` wrote.

    Raises:
        ValueError: If there is none.
    """
    return Path(given) if (Path(given) / CONFIG).is_file() else resolve_checkpoint(given)


def find_run(given: str | Path, name: str | None = None, root: str | Path | None = None) -> Path:
    """The run folder that is meant, which need not have a checkpoint, unless it is `last`.

    Args:
        given: The folder, a checkpoint in it, or `last`: the run of the newest checkpoint.
        name: With `last`: only runs of this name.
        root: With `last`: the folder of all runs; None for runs/.

    Raises:
        ValueError: If there is none.
    """
    folder = Path(given)
    if given == "last" or folder.is_file() or not (name is None and root is None):
        path = resolve_checkpoint(given, name, root)
        folder = run_of(path) or path
    if not is_run_folder(folder):
        raise UsageError(
            f"{folder} is not a run folder: expected one with {', '.join(TRACES)}, or `last`."
        )
    if given == "last":
        inform(f"Using {folder}.")
    return folder


def run_of(checkpoint: Path) -> Path | None:
    """The run folder that contains a checkpoint; None if there is none.

    Args:
        checkpoint: The path of the checkpoint.
    """
    folder = checkpoint.parent.parent
    return folder if checkpoint.parent.name == LAST.parent.name and folder.is_dir() else None


def find_device(name: str) -> torch.device:
    """The device of a name.

    Args:
        name: As PyTorch calls it; auto for the first GPU, or the CPU where there is none.

    Raises:
        ValueError: If this machine does not have it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"--device {name} is not available: {str(error).partition('. ')[0]}."
        ) from error
