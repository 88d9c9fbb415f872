"""The command `new`: from a folder of images, or other data, to a configuration that trains.

    lit-diffusion new photos        →  what is in it, a contact sheet, photos.yaml
    lit-diffusion fit --config photos.yaml

It reads the data as training will, and changes nothing in them.
"""

from __future__ import annotations

import os
import re
import shlex
import textwrap
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor

from lit_diffusion.training.callbacks.sample_grid import save_grid
from lit_diffusion.training.commands.proposal.config import config_text
from lit_diffusion.training.commands.proposal.look import look
from lit_diffusion.training.commands.proposal.recipe import (
    Recipe,
    Shape,
    propose_recipe,
)
from lit_diffusion.training.commands.proposal.trial_steps import Trial, try_steps
from lit_diffusion.training.commands.shell.choices import find_device
from lit_diffusion.training.commands.shell.errors import UsageError
from lit_diffusion.training.data.decoding.survey import (
    Pixels,
)
from lit_diffusion.training.reporting.survey import Survey, subject_lines, survey_lines
from lit_diffusion.training.run.secrets import without_secrets
from lit_diffusion.training.run.whole_file import write_whole

PICTURES = ("image", "latents")  # kinds that a contact sheet shows as pictures

__all__ = ["Proposed", "new"]


class Proposed(NamedTuple):
    """A written configuration, and what it is based on.

    Attributes:
        config: The file.
        contact_sheet: A picture of some examples as training sees them.
        survey: What was found in the data.
        trial: The measured steps.
        text: All of it for a reader.
    """

    config: Path
    contact_sheet: Path
    survey: Survey
    trial: Trial
    text: str

    def __str__(self) -> str:
        return self.text


def new(
    path: str | Path,
    out: str | Path | None = None,
    *,
    size: int | None = None,
    horizontal_flip: bool = False,
    looks: int = 1000,
) -> Proposed:
    """Look at a data set of images or numbers and write a configuration that trains on it.

    It reports what is in the data and what training could not use, writes a contact sheet of
    images as training will see them, proposes network, objective and length, and measures a few
    steps of the proposed training on this machine.

    Args:
        path: A folder of images or of parquet, tar or .npy files, one such file or an .npz file, a
            shipped data set, or a name on the Hugging Face hub.
        out: The config to write, a new .yaml file; by default named after the data, in the working
            directory. The contact sheet is a PNG of the same name.
        size: Side of the pictures in training; by default chosen from their sizes.
        horizontal_flip: Mirror each training image with probability one half.
        looks: Number of examples to look at, in random order, at least 1.

    Raises:
        ValueError: If there are no usable examples, or out is not a new .yaml file.
    """
    if looks < 1 or (size is not None and size < 1):
        raise UsageError(f"--looks and --size must be at least 1, got {looks} and {size}.")
    where = _where(str(path))
    title = _title(str(path))
    name = re.sub(r"[^\w.-]+", "-", title).strip("-.") or "images"
    config, sheet = _outputs(out, name, where["path"])
    fast = find_device("auto").type != "cpu"
    found = look(where, title, looks, fast, size)
    survey, shape, data = found.survey, found.shape, found.data
    if horizontal_flip and shape.kind != "image":
        raise UsageError(
            f"--horizontal_flip mirrors pictures, and {title} holds data of kind {shape.kind}: "
            "leave it out."
        )
    if horizontal_flip:
        data["horizontal_flip"] = True
    recipe = propose_recipe(shape, survey.pixels, survey.total, fast)
    write = partial(
        config_text,
        title=title,
        file=str(config),
        name=name,
        data=data,
        shape=shape,
        recipe=recipe,
        num_classes=survey.num_classes,
        total=survey.total,
    )
    trial = _try(yaml.safe_load(write(remarks=[])), survey.pixels, recipe.batch_size)
    estimate = (
        f"Measured here: {trial}: {_duration(trial.seconds * recipe.steps)} for {recipe.steps:,} "
        "steps, validations and samples not counted."
    )
    write_whole(config, write(remarks=textwrap.wrap(estimate, 98)))
    shown = survey.pixels.images if shape.kind not in PICTURES else _as_trained(survey.pixels)
    save_grid(shown, sheet, columns=8, kind=shape.kind)
    text = "\n".join(
        [
            *survey_lines(survey),
            "",
            *subject_lines("proposal", f"{_proposal(shape, recipe)}\n{estimate}"),
            "",
            f"Contact sheet: {sheet}",
            f"Config: {config}",
            f"Next: lit-diffusion fit --config {shlex.quote(str(config))}",
        ]
    )
    return Proposed(config, sheet, survey, trial, text)


# Before anything is read -------------------------------------------------------------------------


def _where(path: str) -> dict[str, Any]:
    """The data module's arguments that name the data.

    Raises:
        UsageError: If nothing there can be images.
    """
    if without_secrets(path) != path:
        raise UsageError(
            "an address with a password or key would be written into the config: write a config "
            "by hand, and give the address as --data.path (docs/guide/data.md)."
        )
    local = Path(path).expanduser()
    if local.is_dir():
        found = [file for _, _, names in os.walk(local) for file in names]
        if not found:
            raise UsageError(f"{path} is an empty folder: put images into it, or name another.")
        return {"path": str(local.resolve())}
    kinds = {".tar": "webdataset", ".zip": "imagefolder"}
    if local.is_file() and local.suffix in kinds:
        return {"path": kinds[local.suffix], "data_files": {"train": str(local.resolve())}}
    return {"path": str(local.resolve()) if local.is_file() else path}


def _title(path: str) -> str:
    """What the data are called: the last part of their path or name."""
    local = Path(path).expanduser()
    if local.exists():
        return local.resolve().stem if local.is_file() else local.resolve().name
    return path.rstrip("/").rpartition("/")[2]


def _outputs(out: str | Path | None, name: str, data: str) -> tuple[Path, Path]:
    """The paths of the config and of the contact sheet, neither of which exists.

    Raises:
        UsageError: If one does, or if they or the runs would become part of the data.
    """
    config = Path(f"{name}.yaml" if out is None else out)
    if config.suffix not in (".yaml", ".yml"):
        raise UsageError(f"--out must be a .yaml file, got {config}.")
    sheet = config.with_suffix(".png")
    for file in (config, sheet):
        if file.exists():
            raise UsageError(f"{file} exists already: remove it, or give another name as --out.")
    folder = Path(data)
    for place in (config.resolve().parent, Path.cwd()):
        if folder.is_dir() and place.is_relative_to(folder):
            raise UsageError(
                f"{place} is in the folder of the images, to which the contact sheet and the "
                "samples of a run would be added: start from another folder."
            )
    return config, sheet


# The proposal ------------------------------------------------------------------------------------


def _try(config: dict[str, Any], pixels: Pixels, batch_size: int) -> Trial:
    """Measure steps of a proposed training on the examples looked at."""
    model, trainer = config["model"], config["trainer"]
    shape = config["data"]["shape"]
    model["network"]["init_args"]["shape"] = shape
    rows = torch.arange(batch_size) % len(pixels.images)
    images = pixels.images
    if images.is_floating_point():
        images = _as_trained(pixels)
    batch = {"image": images[rows]}
    if config["data"]["label_key"] is not None:
        assert pixels.image_labels is not None
        batch["label"] = pixels.image_labels[rows]
    return try_steps(model, trainer, batch)


def _as_trained(pixels: Pixels) -> Tensor:
    """The examples kept, bytes in [−1, 1] and floats about as large as the noise."""
    if pixels.images.is_floating_point():
        return (pixels.images.float() - pixels.mean) / max(pixels.std, 1e-12)
    return pixels.images.float() / 127.5 - 1


def _proposal(shape: Shape, recipe: Recipe) -> str:
    objective = "sigmoid weighting" if recipe.levels is None else "the bound, with a decoder"
    objective = objective if shape.kind == "image" else "flow matching"
    fit = "" if shape.fit is None else f", {shape.fit.replace('_', ' ')}"
    scale = "" if shape.normalize is None else f", normalised by {shape.normalize}"
    size = recipe.arguments.get("channels", recipe.arguments.get("width", ""))
    return (
        f"{shape.kind} of {' × '.join(map(str, shape.shape))}{fit}{scale} ({shape.why}); "
        f"{f'{recipe.network} {size}'.strip()}, batches of {recipe.batch_size}, {objective}, "
        f"{recipe.steps:,} steps"
    )


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"about {seconds / length:.3g} {unit}"
    return f"about {seconds:.2g} seconds"
