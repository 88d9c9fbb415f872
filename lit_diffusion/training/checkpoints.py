"""Reading checkpoints: a file is data, and nothing in it is executed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule

__all__ = ["load_checkpoint"]


def load_checkpoint(path: str | Path, map_location: Any = None) -> dict[str, Any]:
    """Read a checkpoint without executing anything in it.

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
