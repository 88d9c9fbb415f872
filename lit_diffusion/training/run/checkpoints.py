"""Checkpoints: written whole or not at all, checked, and read without executing anything."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped]
import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule

from lit_diffusion.training.run.archive import check_archive
from lit_diffusion.training.run.whole_file import remove_orphans, replacing

__all__ = [
    "ABOUT_DATA",
    "CLASS_NAMES",
    "MODEL_CLASS",
    "SAVED_AT",
    "WholeCheckpointIO",
    "load_checkpoint",
    "model_class",
    "with_whole_checkpoints",
]

ABOUT_DATA = "about_data"  # key of the kind of the data and their normalisation
CLASS_NAMES = "class_names"  # key of the names of the classes, by their numbers
MODEL_CLASS = "model_class"  # key of the path of the class that was trained
SAVED_AT = "saved_at"  # key of the time at which a checkpoint was written, Unix time in seconds


class WholeCheckpointIO(TorchCheckpointIO):
    """Replaces checkpoints in one step, so that a kill never leaves half of one.

    Lightning's own plug-in writes to the system's temporary folder first. That may be another
    disk; the move is then a copy, and a kill during it leaves half a file under the checkpoint's
    name. And it executes what a checkpoint from a URL contains, where this one reads data only.

    The command line uses it for every run. In Python, hand it to the trainer:
    ``Trainer(plugins=[WholeCheckpointIO()])``.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Write a checkpoint; if that fails, the previous one of that name stays as it is.

        Args:
            checkpoint: Its contents.
            path: The file, which only one process at a time may write. Remote paths, such as
                s3://…, are left to Lightning.
            storage_options: If given, Lightning writes the checkpoint.

        Raises:
            OSError: If it cannot be written.
        """
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        try:
            remove_orphans(path)
            with replacing(path, durable=True) as unfinished, unfinished.open("wb") as file:
                # The file's own time would change when it is copied.
                dated = checkpoint | {SAVED_AT: time.time()}
                torch.save(dated, file)  # given a path it would hide why a write fails
        except (OSError, RuntimeError) as error:  # torch hides an OSError in a RuntimeError
            before = f"the previous one is intact ({path})" if path.is_file() else "none exists"
            cause: BaseException = error
            while cause.__context__ is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            raise OSError(
                f"The checkpoint cannot be written to {path.parent}: {cause}; {before}. Free some "
                "space there, or set trainer.default_root_dir to another disk."
            ) from error

    def load_checkpoint(
        self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Read a checkpoint as data, checked first: nothing in it is executed.

        Args:
            path: The file, or a remote path, which is copied to a temporary file.
            map_location: Device for its tensors.
            weights_only: Ignored; it is always True.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is damaged.
        """
        return _read(path, map_location)


def with_whole_checkpoints(plugins: Any) -> list[Any]:
    """Complete the plug-ins of a trainer by `WholeCheckpointIO`, unless one of them has its task.

    Args:
        plugins: The user's: None, one, or several.

    Example:
        >>> [type(one).__name__ for one in with_whole_checkpoints(None)]
        ['WholeCheckpointIO']
        >>> [type(one).__name__ for one in with_whole_checkpoints(TorchCheckpointIO())]
        ['TorchCheckpointIO']
    """
    given = list(plugins) if isinstance(plugins, list | tuple) else [plugins]
    given = [plugin for plugin in given if plugin is not None]
    if any(isinstance(plugin, CheckpointIO) for plugin in given):
        return given
    return [*given, WholeCheckpointIO()]


def load_checkpoint(path: str | Path, map_location: Any = None) -> dict[str, Any]:
    """Read a checkpoint of this library without executing anything in it.

    Args:
        path: The file.
        map_location: Device for its tensors; None means the CPU.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or not a checkpoint of this library.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No checkpoint at {path}.")
    checkpoint = _read(path, map_location)
    try:
        described = checkpoint[LightningModule.CHECKPOINT_HYPER_PARAMS_KEY]
        if not {"schedule", "weighting", "prediction"} <= set(described):
            raise KeyError("schedule")
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a checkpoint of lit_diffusion.") from error
    return checkpoint


def model_class(checkpoint: Mapping[str, Any]) -> str:
    """The path of the class that a checkpoint's model has.

    Args:
        checkpoint: As `load_checkpoint` returns it.

    Example:
        >>> model_class({})
        'lit_diffusion.training.LitDiffusion'
    """
    return str(checkpoint.get(MODEL_CLASS, "lit_diffusion.training.LitDiffusion"))


def _read(path: Any, map_location: Any = None) -> dict[str, Any]:
    """Check a local or remote checkpoint, then read it without executing anything in it."""
    with contextlib.ExitStack() as stack:
        if "://" in str(path):
            remote = stack.enter_context(fsspec.open(str(path), "rb"))
            opened: Any = stack.enter_context(tempfile.TemporaryFile())
            shutil.copyfileobj(remote, opened, 1 << 20)
        else:
            opened = stack.enter_context(Path(path).open("rb"))
        try:
            check_archive(opened)
        except ValueError as error:
            raise ValueError(
                f"{path} is damaged, or not a checkpoint: {error}. Use another checkpoint of the "
                "run, or copy the file again."
            ) from error
        try:
            read: dict[str, Any] = torch.load(
                opened, map_location=map_location or "cpu", weights_only=True
            )
        except Exception as error:
            raise ValueError(
                f"{path} is not a checkpoint of lit_diffusion, or not one that can be read safely."
            ) from error
    return read
