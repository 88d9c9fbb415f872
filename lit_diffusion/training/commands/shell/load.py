"""Load the model that a command is about, and report which it is."""

from __future__ import annotations

from pathlib import Path

import torch

from lit_diffusion.training.commands.shell.choices import name_checkpoint
from lit_diffusion.training.module import LitDiffusion

__all__ = ["load_model"]


def load_model(path: Path, device: torch.device | str = "cpu") -> LitDiffusion:
    """The model of a checkpoint, which is read once, with a message that names file and step.

    Args:
        path: The file.
        device: Where the model is put.

    Raises:
        ValueError: If the file is no checkpoint, or damaged.
    """
    model = LitDiffusion.load_from_checkpoint(path).to(device)
    name_checkpoint(path, model.trained_steps)
    return model
