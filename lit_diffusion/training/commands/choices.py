"""Which checkpoint and which device an argument means."""

from __future__ import annotations

from pathlib import Path

import torch

from lit_diffusion.training.commands.errors import UsageError
from lit_diffusion.training.run.folder import last_checkpoint
from lit_diffusion.training.run.messages import inform

__all__ = ["find_checkpoint", "find_device"]


def find_checkpoint(given: str | Path, name: str = "*") -> Path:
    """The checkpoint that is meant.

    Args:
        given: Its path; `last` for the newest below runs/.
        name: With `last`: only runs of this name.

    Raises:
        ValueError: If there is none below runs/.
    """
    if given != "last":
        return Path(given)
    found = last_checkpoint(Path("runs"), name)
    if found is None:
        raise UsageError(
            f"there is no checkpoint below runs/{name}; train first, or give its path."
        )
    inform(f"The newest checkpoint is {found}.")
    return found


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
