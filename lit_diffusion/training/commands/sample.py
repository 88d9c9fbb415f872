"""The command `sample`: sample images from a checkpoint."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lit_diffusion.samplers import Sampler
from lit_diffusion.training import randomness
from lit_diffusion.training.callbacks.sample_grid import save_grid
from lit_diffusion.training.commands.choices import (
    check_new_folder,
    find_checkpoint,
    find_device,
)
from lit_diffusion.training.commands.errors import UsageError
from lit_diffusion.training.compilation import compile_in_place
from lit_diffusion.training.evaluation.generation import to_bytes
from lit_diffusion.training.module import LitDiffusion
from lit_diffusion.training.run.messages import warn
from lit_diffusion.training.run.whole_file import replacing
from lit_diffusion.training.run.whole_folder import publish, unfinished_folder

__all__ = ["NO_GUIDANCE", "Samples", "sample", "write_images"]

MANY = 64  # images by default
NO_GUIDANCE = (
    "--guidance_interval has no effect with --guidance 1, which means none: give --guidance."
)


class Samples(NamedTuple):
    """Sampled images, (n, C, H, W) in [−1, 1], and their file or folder."""

    images: Tensor
    path: Path

    def __str__(self) -> str:
        return str(self.path)


def sample(
    ckpt_path: str | Path,
    name: str | None = None,
    root: str | Path | None = None,
    num_samples: int | None = None,
    out: str | Path = "samples.png",
    sampler: Sampler | None = None,
    seed: int = 0,
    label: int | list[int] | Literal["none"] | None = None,
    per_class: int | None = None,
    guidance: float = 1.0,
    guidance_interval: tuple[float, float] | None = None,
    batch_size: int = 256,
    device: str = "auto",
    compile: bool = False,
) -> Samples:
    """Sample images from a checkpoint.

    Args:
        ckpt_path: The checkpoint: a file, a run folder, or `last` for that of the newest run.
        name: With `last`: only runs of this name.
        root: With `last`: the folder of all runs; runs/ by default.
        num_samples: Number of images; 64 by default.
        out: A .png file for one grid, a new or empty folder for one file per image,
            or a .npy file.
        sampler: The sampler, such as DDIMSampler; the model's own by default.
        seed: Image i is a function of (seed, i).
        label: Class of all images; or a list such as [0,1,2] to cycle through, one per column of a
            grid; none or -1 for no class. Sampled by default.
        per_class: Number of images of each class, or of each in label: a grid with one column, or
            a folder with one subfolder, per class.
        guidance: Scale of classifier-free guidance; 1 for none.
        guidance_interval: Guide only for λ in this interval, such as [-3,5]; by default
            everywhere.
        batch_size: Images per batch.
        device: auto, cpu, cuda, cuda:1, mps.
        compile: Whether to compile the network, which pays off for many images on a GPU.

    Raises:
        ValueError: If an argument does not fit the model, or the checkpoint cannot be read.
    """
    out = Path(out)
    _check(num_samples, per_class, batch_size, guidance, guidance_interval, out)
    path = find_checkpoint(ckpt_path, name, root)
    model = LitDiffusion.load_from_checkpoint(path).to(find_device(device))
    if not out.suffix and model.image_shape[0] not in (1, 3):
        raise UsageError(
            f"examples of {model.image_shape[0]} channels cannot be written as images: give a "
            ".npy file as --out, and decode latents with `lit-diffusion decode`."
        )
    model.check_guidance(guidance)
    if compile:
        compile_in_place(model, model.device)
    classes = _classes(model, label, per_class)
    n = MANY if num_samples is None else num_samples
    if per_class is not None:
        n = per_class * len(classes)

    batches = []
    for indices in torch.arange(n).split(batch_size):
        first, last = int(indices[0]), int(indices[-1])
        batch = model.sample(
            len(indices),
            randomness.generators(seed, "sample", indices.tolist()),
            label=[classes[i % len(classes)] for i in indices.tolist()] if classes else None,
            sampler=sampler,
            guidance=guidance,
            guidance_interval=guidance_interval,
            progress=partial(tqdm, desc=f"images {first}-{last}", disable=None),
        )
        batches.append(batch.cpu())
    images = torch.cat(batches)
    if out.suffix == ".npy":
        _save(images, out)
    elif out.suffix == ".png":
        columns = max(1, round(n**0.5))
        if per_class is not None or len(classes) > 1:
            columns = len(classes)
        save_grid(images, out, columns)
    else:
        with unfinished_folder(out) as unfinished:
            folders = [_folder(c, model) for c in classes] if per_class else [""]
            write_images(images, unfinished, folders)
            publish(unfinished, out, durable=False)
    return Samples(images, out)


def _check(
    num_samples: int | None,
    per_class: int | None,
    batch_size: int,
    guidance: float,
    guidance_interval: tuple[float, float] | None,
    out: Path,
) -> None:
    """Reject arguments that are wrong for any checkpoint, before one is read."""
    counts = {"num_samples": num_samples, "per_class": per_class, "batch_size": batch_size}
    for name, number in counts.items():
        if number is not None and number < 1:
            raise UsageError(f"--{name} must be at least 1, got {number}.")
    if num_samples is not None and per_class is not None:
        raise UsageError("--per_class determines the number of images: omit --num_samples.")
    if guidance_interval is not None and guidance == 1:
        raise UsageError(NO_GUIDANCE)
    if out.suffix not in ("", ".png", ".npy"):
        raise UsageError(f"--out must be a .png file, a .npy file or a folder, got {out}.")
    if not out.suffix:
        check_new_folder(out)


def _classes(
    model: LitDiffusion, label: int | list[int] | Literal["none"] | None, per_class: int | None
) -> list[int]:
    """The classes to cycle through, −1 for none; an empty list if they are sampled."""
    if model.conditions:
        raise UsageError(
            f"this model is conditioned on {', '.join(model.conditions)}, which is not in its "
            "checkpoint: `lit-diffusion predict` takes it from the validation examples, and in "
            "Python you can pass it to model.sample(cond=…)."
        )
    known = model.num_classes
    if known is None:
        if label is not None or per_class is not None:
            raise UsageError(
                "this model was trained without classes: omit --label and --per_class."
            )
        return []
    if label is None:
        return [] if per_class is None else list(range(known))
    classes = [-1] if label == "none" else label if isinstance(label, list) else [label]
    if -1 in classes and model.label_dropout == 0:
        warn(
            "this model was trained with label_dropout=0, so it knows images without a class only "
            "if there were some in the data."
        )
    if not classes or min(classes) < -1 or max(classes) >= known:
        raise UsageError(f"--label must name classes from 0 to {known - 1}, or none, got {label}.")
    return classes


def _folder(label: int, model: LitDiffusion) -> str:
    """Name of a class's folder, zero-padded so that names sort like numbers."""
    return "none" if label < 0 else str(label).zfill(len(str((model.num_classes or 1) - 1)))


def _save(numbers: Tensor, out: Path) -> None:
    """Write the array, (n, C, H, W) float32, completely or not at all."""
    with replacing(out) as unfinished, unfinished.open("wb") as file:
        np.save(file, numbers.float().numpy())


def write_images(images: Tensor, out: Path, folders: list[str], first: int = 0) -> None:
    """Write each image as a PNG file named by its number, cycling through the folders.

    Args:
        images: In [−1, 1].
        out: The folder.
        folders: Names of subfolders, or "" for the folder itself.
        first: Number of the first image.

    Shapes:
        images (n, C, H, W), C of 1 or 3.
    """
    from torchvision.transforms.functional import to_pil_image  # type: ignore[import-untyped]

    for i, image in enumerate(images, first):
        folder = out / folders[i % len(folders)]
        folder.mkdir(parents=True, exist_ok=True)
        to_pil_image(to_bytes(image)).save(folder / f"{i:06d}.png")
