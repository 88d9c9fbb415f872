"""Checkpoints: written whole or not at all, and read as data of which nothing is executed.

A checkpoint goes into a temporary file beside the one it is to replace, is forced onto the disk,
and takes the other's name in one step. Whatever happens in between, a kill, a full disk, a power
cut, the name stands for a whole file: the old one or the new one.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule

__all__ = ["WholeCheckpointIO", "load_checkpoint", "sync", "write_whole"]


class WholeCheckpointIO(TorchCheckpointIO):
    """Lightning's way to the disk, with checkpoints that are replaced in one step.

    Lightning's own goes through the system's temporary folder, which may be another disk: then a
    move is a copy, and a kill leaves half of one under the checkpoint's name.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Write a checkpoint, or leave the one of that name as it is.

        Args:
            checkpoint: What is saved.
            path: The file. Only one process at a time may write it. What is no local path, such
                as s3://…, is left to Lightning.
            storage_options: For Lightning's own way only.

        Raises:
            OSError: If it cannot be written.
        """
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            for orphan in path.parent.glob(f".{path.name}.*.tmp"):  # of a process that was killed
                orphan.unlink(missing_ok=True)
            with unfinished.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
            sync(path.parent)
        except (OSError, RuntimeError) as error:  # torch hides an OSError in a RuntimeError
            unfinished.unlink(missing_ok=True)
            kept = f"the one before it is intact ({path})" if path.is_file() else "there is none"
            while error.__context__ is not None and not isinstance(error, OSError):
                error = error.__context__  # type: ignore[assignment]
            raise OSError(
                f"The checkpoint cannot be written to {path.parent}: {error}; {kept}. Make room "
                "there, or set trainer.default_root_dir to another disk."
            ) from error

    def load_checkpoint(
        self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Read a checkpoint as data; nothing in it is executed, whatever is asked for.

        Args:
            path: The file.
            map_location: Device for its tensors.
            weights_only: True is the only way.
        """
        return super().load_checkpoint(path, map_location, weights_only=True)


def sync(path: Path) -> None:
    """Force a file, or the names in a folder, onto the disk.

    Args:
        path: The file, or the folder, where the system can open folders.
    """
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        if path.is_dir():
            return
        raise
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, text: str) -> None:
    """Write a small file so that whoever looks finds the old text or the new one, never half.

    Args:
        path: The file.
        text: All of it.
    """
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.write_text(text, newline="")
    unfinished.replace(path)


def load_checkpoint(path: str | Path, map_location: Any = None) -> dict[str, Any]:
    """Read a checkpoint of this library without executing anything in it.

    Args:
        path: The file.
        map_location: Device for its tensors; None means the CPU.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a checkpoint of this library.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No checkpoint at {path}.")
    try:
        checkpoint = torch.load(path, map_location=map_location or "cpu", weights_only=True)
        described = checkpoint[LightningModule.CHECKPOINT_HYPER_PARAMS_KEY]
        if not {"schedule", "weighting", "prediction"} <= set(described):
            raise KeyError("schedule")
    except Exception as error:
        raise ValueError(
            f"{path} is not a checkpoint of lit_diffusion, or not one that can be read safely."
        ) from error
    return checkpoint
