"""The command `sample`: sample images from a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lit_diffusion.samplers import Sampler
from lit_diffusion.training.callbacks.sample_grid import save_samples
from lit_diffusion.training.commands.shell.choices import (
    find_device,
    resolve_checkpoint,
    run_of,
)
from lit_diffusion.training.commands.shell.errors import UsageError
from lit_diffusion.training.commands.shell.experiment import own_data, read_experiment
from lit_diffusion.training.commands.shell.load import load_model
from lit_diffusion.training.data.reading.columns import TEXT
from lit_diffusion.training.evaluation.features import fingerprint
from lit_diffusion.training.evaluation.row_conditions import RowConditions, check_enough
from lit_diffusion.training.evaluation.sample_files import ArrayFile, ImageFolder
from lit_diffusion.training.module import LitDiffusion
from lit_diffusion.training.run.messages import inform, warn
from lit_diffusion.training.step import randomness
from lit_diffusion.training.step.compilation import compile_in_place
from lit_diffusion.training.step.conditions import prompt_bytes

__all__ = ["NO_GUIDANCE", "Samples", "sample"]

MANY = 64  # images by default
NO_GUIDANCE = (
    "--guidance_interval has no effect with --guidance 1, which means none: give --guidance."
)


class Samples(NamedTuple):
    """Sampled images, (n, C, H, W), and their file or folder; a folder's images are in it only."""

    images: Tensor | None
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
    config: str | Path | None = None,
    split: str | None = None,
    label: int | list[int | str] | str | None = None,
    per_class: int | None = None,
    prompt: list[str] | str | None = None,
    guidance: float = 1.0,
    guidance_interval: tuple[float, float] | None = None,
    size: int | list[int] | str | None = None,
    batch_size: int = 256,
    device: str = "auto",
    compile: bool = False,
) -> Samples:
    """Sample images from a checkpoint.

    A folder and a .npy file are written as the images are made, and a command that was stopped
    goes on where it was.

    Args:
        ckpt_path: The checkpoint: a file, a run folder, or `last` for that of the newest run.
        name: With `last`: only runs of this name.
        root: With `last`: the folder of all runs; runs/ by default.
        num_samples: Number of images; 64 by default.
        out: A .png file for one grid, a folder for one file per image, or a .npy file, which is in
            the unit of the data if they were normalised.
        sampler: The sampler, such as DDIMSampler; the model's own by default.
        seed: Image i is a function of (seed, i).
        config: For a model with conditions besides the class: the config that describes the data;
            the run's own by default.
        split: The split of these data whose example i has the conditions of image i; by default
            the validation split.
        label: Class of all images, by number or name; or a list such as [0,1,2] to cycle through,
            one per column of a grid; none or -1 for no class. Sampled by default.
        per_class: Number of images of each class, or of each in label: a grid with one column, or
            a folder with one subfolder, such as 3-roses, per class.
        prompt: Text of all images, such as "a three"; or a list such as ["a three","a six"] to
            cycle through, one per column of a grid. Without one, a model that reads texts is given
            the captions of examples.
        guidance: Scale of classifier-free guidance; 1 for none.
        guidance_interval: Guide only for λ in this interval, such as [-3,5]; by default
            everywhere.
        size: Size of the images, height x width such as 48x64, or the length of series, or depth x
            height x width of volumes, if the network takes it; that of training by default.
        batch_size: Images per batch.
        device: auto, cpu, cuda, cuda:1, mps.
        compile: Whether to compile the network, which pays off for many images on a GPU.

    Raises:
        ValueError: If an argument does not fit the model, the checkpoint cannot be read, or out
            has samples of another command.
    """
    out = Path(out)
    _check(num_samples, per_class, batch_size, guidance, guidance_interval, out)
    path = resolve_checkpoint(ckpt_path, name, root)
    model = load_model(path, find_device(device))
    model.check_guidance(guidance)
    shape = _shape(model, size, out)
    if compile:
        compile_in_place(model, model.device)
    classes = _classes(model, label, per_class)
    n = MANY if num_samples is None else num_samples
    if per_class is not None:
        n = per_class * len(classes)

    prompts = _prompts(model, prompt)
    rows = _rows(model, path, config, split, n, batch_size, bool(prompts))
    about = _about(path, model, sampler, seed, classes, guidance, guidance_interval, shape)
    about |= {} if rows is None else {"config": str(config), "split": split}
    about |= {"prompt": prompts} if prompts else {}
    files = _open(out, about, model, (n, *shape), classes, per_class is not None)
    sampling: dict[str, Any] = {
        "sampler": sampler,
        "guidance": guidance,
        "guidance_interval": guidance_interval,
    }
    if shape != model.shape:
        sampling["size"] = shape[1:]
    kept = _sample_all(
        model, files, rows, classes, prompts, torch.arange(n).split(batch_size), seed, sampling
    )
    if files is None:
        per_column = len(classes) if per_class is not None or len(classes) > 1 else len(prompts)
        columns = per_column if per_class or per_column > 1 else max(1, round(n**0.5))
        names = [_name(c, model) for c in classes] if columns == len(classes) else []
        shown = [prompts[i % len(prompts)] for i in range(n)] if prompts else []
        images = torch.cat(kept)
        save_samples(model, images, out, columns, names, shown)
        return Samples(model.restored(images), out)
    files.finish()
    found = torch.from_numpy(np.load(out, mmap_mode="c")) if out.suffix == ".npy" else None
    return Samples(found, out)


def _sample_all(
    model: LitDiffusion,
    files: ImageFolder | ArrayFile | None,
    rows: RowConditions | None,
    classes: list[int],
    prompts: list[str],
    batches: Sequence[Tensor],
    seed: int,
    sampling: dict[str, Any],
) -> list[Tensor]:
    """Sample what is not in the files yet and write it; return it if there are no files."""
    kept: list[Tensor] = []
    there = 0
    for number, index in enumerate(batches):
        indices = index.tolist()
        if files is not None and files.has(indices):
            there += len(indices)
            continue
        cond = {} if rows is None else rows(number, len(indices))
        label: Any = cond.pop("label", None)
        if classes:
            label = [classes[i % len(classes)] for i in indices]
        if prompts:
            cond[TEXT] = prompt_bytes(model, [prompts[i % len(prompts)] for i in indices])
        images = model.sample(
            len(indices),
            randomness.generators(seed, "sample", indices),
            label,
            progress=partial(tqdm, desc=f"images {indices[0]}-{indices[-1]}", disable=None),
            cond=cond,
            **sampling,
        ).cpu()
        if files is None:
            kept.append(images)
        else:
            files.write(indices, model.restored(images))
    if there:
        inform(f"{there} of the images were there already.")
    return kept


def _rows(
    model: LitDiffusion,
    path: Path,
    config: str | Path | None,
    split: str | None,
    n: int,
    batch_size: int,
    prompted: bool,
) -> RowConditions | None:
    """The conditions of the images, of a model that has more than classes and prompts."""
    if not set(model.conditions) - ({TEXT} if prompted else set()):
        if config is not None or split is not None:
            given = "the class and the prompt" if prompted else "the class"
            raise UsageError(
                f"this model has no conditions besides {given}, which it would take from data: "
                "omit --config and --split."
            )
        return None
    data = own_data(read_experiment(config, run_of(path)), path)
    split = split or data.splits_in_use()[-1]
    check_enough(data, split, n)
    return RowConditions(model, data, split, batch_size)


def _about(
    path: Path,
    model: LitDiffusion,
    sampler: Sampler | None,
    seed: int,
    classes: list[int],
    guidance: float,
    guidance_interval: tuple[float, float] | None,
    shape: tuple[int, ...],
) -> dict[str, Any]:
    """All that an image depends on besides its number, as plain data."""
    return {
        "checkpoint": path.name,
        "weights": f"{model.weights}, {fingerprint(model.denoiser)}",
        "sampler": repr(model.sampler_in_range(sampler)),
        "seed": seed,
        "label": classes or None,
        "guidance": guidance,
        "guidance_interval": None if guidance_interval is None else list(guidance_interval),
        "size": None if shape == model.shape else list(shape[1:]),
    }


def _open(
    out: Path,
    about: dict[str, Any],
    model: LitDiffusion,
    shape: tuple[int, ...],
    classes: list[int],
    per_class: bool,
) -> ImageFolder | ArrayFile | None:
    """The files that take the images as they are made; None for a grid, which takes all."""
    if out.suffix == ".png":
        return None
    if out.suffix == ".npy":
        return ArrayFile(out, about, shape)
    names = [_folder(c, model) for c in classes] if per_class else [""]
    return ImageFolder(out, about | {"folders": names}, lambda i: names[i % len(names)])


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


def _shape(model: LitDiffusion, size: int | list[int] | str | None, out: Path) -> tuple[int, ...]:
    """The shape of a sample of a size such as 48x64."""
    if not out.suffix and model.kind not in ("image", "latents"):
        raise UsageError(
            f"examples of kind {model.kind} cannot be written as images: give a .npy file as "
            "--out."
        )
    if not out.suffix and model.shape[0] not in (1, 3):
        raise UsageError(
            f"examples of {model.shape[0]} channels cannot be written as images: give a "
            ".npy file as --out, and decode latents with `lit-diffusion decode`."
        )
    if isinstance(size, str):
        try:
            size = [int(side) for side in size.lower().replace("×", "x").split("x")]
        except ValueError:
            raise UsageError(
                f"--size must be whole numbers with x between them, such as 48x64, got {size!r}."
            ) from None
    return model.shape_of_size(size)


def _number(model: LitDiffusion, label: int | str) -> int:
    """The number of a class, given by number or name."""
    if isinstance(label, int):
        return label
    names = model.class_names or []
    if label not in names:
        known = (
            f"one of {', '.join(names[:20])}" if names else "a number: the data name no classes"
        )
        raise UsageError(f"--label must be {known}, got {label!r}.")
    return names.index(label)


def _classes(
    model: LitDiffusion, label: int | list[int | str] | str | None, per_class: int | None
) -> list[int]:
    """The classes to cycle through, −1 for none; an empty list if they are sampled."""
    known = model.num_classes
    if known is None:
        if label is not None or per_class is not None:
            raise UsageError(
                "this model was trained without classes: omit --label and --per_class."
            )
        return []
    if label is None:
        return [] if per_class is None else list(range(known))
    given = label if isinstance(label, list) else [label]
    classes = [-1 if one == "none" else _number(model, one) for one in given]
    if -1 in classes and model.label_dropout == 0:
        warn(
            "this model was trained with label_dropout=0, so it knows images without a class only "
            "if there were some in the data."
        )
    if not classes or min(classes) < -1 or max(classes) >= known:
        raise UsageError(f"--label must name classes from 0 to {known - 1}, or none, got {label}.")
    return classes


def _prompts(model: LitDiffusion, prompt: list[str] | str | None) -> list[str]:
    """The prompts to cycle through, checked; an empty list if there are none."""
    if prompt is None:
        return []
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not prompts:
        raise UsageError("--prompt must be a text or a list of texts, got an empty list.")
    prompt_bytes(model, prompts)
    return prompts


def _folder(label: int, model: LitDiffusion) -> str:
    """The folder of a class: its number, zero-padded so that names sort like numbers; its name."""
    if label < 0:
        return "none"
    number = str(label).zfill(len(str((model.num_classes or 1) - 1)))
    name = re.sub(r"[^\w ,.()-]", "_", _name(label, model))[:80].rstrip(" .")
    return number if name == str(label) else f"{number}-{name}"


def _name(label: int, model: LitDiffusion) -> str:
    """The name of a class; its number if the data name no classes."""
    names = model.class_names or []
    return "none" if label < 0 else names[label] if label < len(names) else str(label)
