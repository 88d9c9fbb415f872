"""The command `import`: convert a published model of diffusers to a checkpoint.

    lit-diffusion import ddpm-cifar10 --out ddpm-cifar10.ckpt
    lit-diffusion test --ckpt_path ddpm-cifar10.ckpt --config cifar10

The checkpoint can be tested, evaluated, sampled and exported like any other, and training in
Python can start from it.
"""

from __future__ import annotations

from pathlib import Path

from lit_diffusion.models import from_diffusers
from lit_diffusion.registry import arguments
from lit_diffusion.training.commands.shell.errors import UsageError
from lit_diffusion.training.module import LitDiffusion
from lit_diffusion.training.run.checkpoints import WholeCheckpointIO
from lit_diffusion.training.run.weights import AS_PUBLISHED, weights_alone

__all__ = ["import_diffusers"]


def import_diffusers(folder: str | Path, *, out: str | Path) -> Path:
    """Write a published unconditional model of diffusers as a checkpoint; return its path.

    Args:
        folder: The folder of a pipeline, downloaded by `hf download NAME --local-dir`.
        out: The checkpoint: a new .ckpt file.

    Raises:
        ValueError: If the folder does not contain a supported pipeline, or out exists.
    """
    out = Path(out)
    if out.suffix != ".ckpt" or out.exists():
        raise UsageError(f"--out must be a new .ckpt file, got {out}.")
    model = LitDiffusion(**arguments(from_diffusers(folder)))
    checkpoint = weights_alone(model.state_dict(), AS_PUBLISHED, 0, model.hparams)
    WholeCheckpointIO().save_checkpoint(checkpoint, out)
    return out
