"""The command `lit-diffusion sample`: images from a checkpoint alone."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lit_diffusion.samplers import Sampler
from lit_diffusion.training import randomness
from lit_diffusion.training.callbacks.sample_grid import save_grid
from lit_diffusion.training.commands.parsing import (
    DiffusionParser,
    fail,
    find_checkpoint,
    find_device,
)
from lit_diffusion.training.compilation import compile_in_place
from lit_diffusion.training.evaluation.generation import to_bytes
from lit_diffusion.training.module import LitDiffusion
from lit_diffusion.training.run.whole_file import replacing

__all__ = ["sample", "write_images"]

MANY = 64  # images, where nobody says how many


def sample(argv: list[str]) -> Path:
    """Draw images from a checkpoint, with its average weights; return where they are.

    Args:
        argv: The command line after `sample`.
    """
    parser = _parser()
    config = parser.instantiate(parser.parse_args(argv))
    out = Path(config.out)
    _check(config, out)
    path = find_checkpoint(config.ckpt_path, config.name)
    model = LitDiffusion.load_from_checkpoint(path).to(find_device(config.device))
    if not out.suffix and model.image_shape[0] not in (1, 3):
        fail(
            f"examples of {model.image_shape[0]} channels are no image files: give --out a .npy "
            "file, and for latents decode it by `lit-diffusion decode`."
        )
    if config.compile:
        compile_in_place(model, model.device)
    classes = _classes(model, config)
    n = MANY if config.num_samples is None else config.num_samples
    if config.per_class is not None:
        n = config.per_class * len(classes)

    images = []
    for indices in torch.arange(n).split(config.batch_size):
        first, last = int(indices[0]), int(indices[-1])
        batch = model.sample(
            len(indices),
            randomness.generators(config.seed, "sample", indices.tolist()),
            label=[classes[i % len(classes)] for i in indices.tolist()] if classes else None,
            sampler=config.get("sampler"),
            guidance=config.guidance,
            guidance_interval=config.guidance_interval,
            progress=partial(tqdm, desc=f"images {first}-{last}", disable=None),
        )
        images.append(batch.cpu())
    whole = torch.cat(images)
    if out.suffix == ".npy":
        _save(whole, out)
    elif out.suffix == ".png":
        columns = max(1, round(n**0.5))
        if config.per_class is not None or len(classes) > 1:
            columns = len(classes)
        save_grid(whole, out, columns)
    else:
        folders = [_folder(c, model) for c in classes] if config.per_class else [""]
        write_images(whole, out, folders)
    return out


def _parser() -> DiffusionParser:
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
    parser.add_argument(
        "--num_samples", type=int | None, default=None, help=f"How many images; {MANY} by default."
    )
    parser.add_argument(
        "--out",
        type=str,
        default="samples.png",
        help="A .png for one grid, a folder for many files, or a .npy for the numbers.",
    )
    parser.add_subclass_arguments(
        Sampler,
        "sampler",
        required=False,
        help="How to draw, such as DDIMSampler; the model's own by default.",
    )
    parser.add_argument("--seed", type=int, default=0, help="Image i is a function of (seed, i).")
    parser.add_argument(
        "--label",
        type=int | list[int] | Literal["none"] | None,
        default=None,
        help="Class of all images; or classes, such as [0,1,2], that take turns, in a grid one "
        "for each column; none or -1 for no class. Drawn by default.",
    )
    parser.add_argument(
        "--per_class",
        type=int | None,
        default=None,
        help="So many images of each class, or of each that --label names: a grid with a column, "
        "or a folder with a subfolder, for each.",
    )
    parser.add_argument("--guidance", type=float, default=1.0, help="Strength; 1 for none.")
    parser.add_argument(
        "--guidance_interval",
        type=tuple[float, float] | None,
        default=None,
        help="Guide only where λ is between, such as [-3,5]; everywhere by default.",
    )
    parser.add_argument("--batch_size", type=int, default=256, help="Images at a time.")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1, mps.")
    parser.add_argument(
        "--compile", type=bool, default=False, help="Compile the network: for many, on a GPU."
    )
    parser.add_argument("--plugins", type=list[str] | str, default=[], help="As for fit.")
    return parser


def _check(config: Any, out: Path) -> None:
    """Refuse what no checkpoint can make right."""
    for name in ("num_samples", "per_class", "batch_size"):
        if (number := config[name]) is not None and number < 1:
            fail(f"--{name} must be at least 1, got {number}.")
    if config.num_samples is not None and config.per_class is not None:
        fail("--per_class says how many images there are: leave --num_samples out.")
    if config.guidance_interval is not None and config.guidance == 1:
        fail("--guidance_interval says where to guide, and --guidance 1 is none: give --guidance.")
    if out.suffix not in ("", ".png", ".npy"):
        fail(f"--out must be a .png file, a .npy file or a folder, got {out}.")


def _classes(model: LitDiffusion, config: Any) -> list[int]:
    """The classes that take turns, −1 for none; no classes where they are drawn."""
    if model.conditions:
        fail(
            f"this model is conditioned on {', '.join(model.conditions)}, which is not in its "
            "checkpoint: `lit-diffusion predict` takes it from the validation examples, and "
            "model.sample(cond=…) in Python from you."
        )
    label, known = config.label, model.num_classes
    if known is None:
        if label is not None or config.per_class is not None:
            fail("this model was trained without classes: leave --label and --per_class out.")
        return []
    if label is None:
        return [] if config.per_class is None else list(range(known))
    classes = [-1] if label == "none" else label if isinstance(label, list) else [label]
    if not classes or min(classes) < -1 or max(classes) >= known:
        fail(f"--label must name classes from 0 to {known - 1}, or none, got {label}.")
    return classes


def _folder(label: int, model: LitDiffusion) -> str:
    """Name of a class's folder, of one length for all, so that names sort as numbers do."""
    return "none" if label < 0 else str(label).zfill(len(str(model.num_classes - 1)))


def _save(numbers: Tensor, out: Path) -> None:
    """Write the numbers themselves, (n, C, H, W) float32, whole or not at all."""
    with replacing(out) as unfinished, unfinished.open("wb") as file:
        np.save(file, numbers.float().numpy())


def write_images(images: Tensor, out: Path, folders: list[str], first: int = 0) -> None:
    """Write each image as a PNG file that its number names; the folders take turns.

    Args:
        images: In [−1, 1].
        out: The folder.
        folders: Names of folders in it, or "" for itself.
        first: Number of the first image.

    Shapes:
        images (n, C, H, W), C of 1 or 3.
    """
    from torchvision.transforms.functional import to_pil_image

    for i, image in enumerate(images, first):
        folder = out / folders[i % len(folders)]
        folder.mkdir(parents=True, exist_ok=True)
        to_pil_image(to_bytes(image)).save(folder / f"{i:06d}.png")
