"""The command `lit-diffusion import`: a published model of diffusers as an ordinary checkpoint.

    lit-diffusion import ddpm-cifar10 --out ddpm-cifar10.ckpt
    lit-diffusion test --ckpt_path ddpm-cifar10.ckpt --config configs/cifar10.yaml

From then on it is a model like any other: it is tested, evaluated, sampled, exported, and a
training in Python can begin from it.
"""

from __future__ import annotations

from pathlib import Path

from lit_diffusion.models import from_diffusers
from lit_diffusion.registry import arguments
from lit_diffusion.training.commands.parsing import DiffusionParser, fail
from lit_diffusion.training.module import LitDiffusion
from lit_diffusion.training.run.checkpoints import WholeCheckpointIO
from lit_diffusion.training.run.weights import AS_PUBLISHED, weights_alone

__all__ = ["import_pipeline"]


def import_pipeline(argv: list[str]) -> Path:
    """Write the checkpoint of a diffusers pipeline; return where it is.

    Args:
        argv: The command line after `import`.
    """
    parser = DiffusionParser(
        prog="lit-diffusion import",
        description="Make a checkpoint of a published unconditional model of diffusers.",
    )
    parser.add_argument(
        "folder", type=str, help="A pipeline's folder, fetched by `hf download NAME --local-dir`."
    )
    parser.add_argument("--out", type=str, required=True, help="The checkpoint: a new .ckpt file.")
    config = parser.parse_args(argv)
    out = Path(config.out)
    if out.suffix != ".ckpt" or out.exists():
        fail(f"--out must be a new .ckpt file, got {out}.")
    model = LitDiffusion(**arguments(from_diffusers(config.folder)))
    checkpoint = weights_alone(model.state_dict(), AS_PUBLISHED, 0, model.hparams)
    WholeCheckpointIO().save_checkpoint(checkpoint, out)
    return out
