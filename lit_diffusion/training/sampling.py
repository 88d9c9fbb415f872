"""The command `lit-diffusion sample`: images from a checkpoint alone."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from lit_diffusion.samplers import Sampler
from lit_diffusion.training import randomness
from lit_diffusion.training.callbacks.sample_grid import save_grid
from lit_diffusion.training.logging import last_checkpoint
from lit_diffusion.training.module import LitDiffusion
from lit_diffusion.training.parsing import DiffusionParser, fail

__all__ = ["sample"]


def sample(argv: list[str]) -> Path:
    """Draw images from a checkpoint, with its average weights; return where they are.

    Args:
        argv: The command line after `sample`.
    """
    parser = DiffusionParser(
        prog="lit-diffusion sample", description="Draw images from a checkpoint alone."
    )
    parser.add_argument(
        "--ckpt_path",
        type=str,
        required=True,
        help="The checkpoint; `last` is the newest in runs/.",
    )
    parser.add_argument("--name", type=str, default="*", help="With `last`: runs of this name.")
    parser.add_argument("--num_samples", type=int, default=64, help="How many images.")
    parser.add_argument(
        "--out", type=str, default="samples.png", help="A .png for one grid, or a folder for many."
    )
    parser.add_subclass_arguments(
        Sampler,
        "sampler",
        required=False,
        help="How to draw, such as DDIMSampler; the model's own by default.",
    )
    parser.add_argument("--seed", type=int, default=0, help="Image i is a function of (seed, i).")
    parser.add_argument(
        "--label", type=int | None, default=None, help="Class of all images; drawn by default."
    )
    parser.add_argument("--guidance", type=float, default=1.0, help="Strength; 1 for none.")
    parser.add_argument("--batch_size", type=int, default=256, help="Images at a time.")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1, mps.")
    parser.add_argument("--plugins", type=list[str] | str, default=[], help="As for fit.")
    config = parser.instantiate(parser.parse_args(argv))
    out = Path(config.out)
    if config.num_samples < 1 or config.batch_size < 1:
        fail(
            "--num_samples and --batch_size must be at least 1, "
            f"got {config.num_samples} and {config.batch_size}."
        )
    if out.suffix not in ("", ".png"):
        fail(f"--out must be a .png file or a folder, got {out}.")
    path = config.ckpt_path
    if path == "last":
        path = last_checkpoint(Path("runs"), config.name)
        if path is None:
            fail(
                f"there is no checkpoint below runs/{config.name}; train first, or give its path."
            )
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model = LitDiffusion.load_from_checkpoint(path).to(device)

    images = []
    for indices in torch.arange(config.num_samples).split(config.batch_size):
        first, last = int(indices[0]), int(indices[-1])
        batch = model.sample(
            len(indices),
            randomness.generators(config.seed, "sample", indices.tolist()),
            label=config.label,
            sampler=config.get("sampler"),
            guidance=config.guidance,
            progress=partial(tqdm, desc=f"images {first}-{last}"),
        )
        images.append(batch.cpu())
    whole = torch.cat(images)
    if out.suffix == ".png":
        save_grid(whole, out, columns=max(1, round(len(whole) ** 0.5)))
        return out
    from torchvision.transforms.functional import to_pil_image

    out.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(whole):
        pixels = ((image + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        to_pil_image(pixels).save(out / f"{i:06d}.png")
    return out
