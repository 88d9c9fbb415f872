"""The command `export`: write a trained model as a self-contained folder.

    model.safetensors   the weights for sampling: the average, if the run has one
    config.json         the arguments of the model, as plain data, and the SHA-256 of the weights
    README.md           the model card: architecture, objective, measurements
    samples.png         the run's last samples, if there are any

`lit_diffusion.load_pretrained` reads it without importing Lightning; it can be pushed to the Hub
unchanged.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import LightningModule
from safetensors.torch import save_file

import lit_diffusion
from lit_diffusion.description import build
from lit_diffusion.models.pretrained import CONFIG, WEIGHTS, Pretrained
from lit_diffusion.training.commands.shell.choices import (
    name_checkpoint,
    resolve_checkpoint,
    run_of,
)
from lit_diffusion.training.commands.shell.errors import UsageError
from lit_diffusion.training.reporting.model_card import SAMPLES, model_card
from lit_diffusion.training.run.checkpoints import ABOUT_DATA, CLASS_NAMES, load_checkpoint
from lit_diffusion.training.run.measurements import Measurement, read_measurements
from lit_diffusion.training.run.weights import weights_name
from lit_diffusion.training.run.whole_folder import publish, unfinished_folder

__all__ = ["export"]


class _Trained(NamedTuple):
    """The model of a checkpoint, its description, and which weights it has."""

    model: Pretrained
    described: dict[str, Any]
    weights: str  # which average they are
    step: int


def export(
    run: str | Path,
    *,
    out: str | Path,
    name: str | None = None,
    root: str | Path | None = None,
    license: str = "unknown",
) -> Path:
    """Write a trained model to a self-contained folder that can be pushed to the Hub.

    Args:
        run: A run folder, a checkpoint, or `last` for the newest run.
        out: The folder; it must be new or empty.
        name: With `last`: only runs of this name.
        root: With `last`: the folder of all runs; runs/ by default.
        license: License of the weights, by its name on the Hub, such as mit.

    Raises:
        ValueError: If there is no such checkpoint, it does not describe its network, or out is not
            empty.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(
            f"--out must be a new or empty folder, got {out}: remove it, or give another."
        )
    path = resolve_checkpoint(run, name, root)
    inside = run_of(path)
    folder = path.parent if inside is None else inside
    trained = _read(path)
    name_checkpoint(path, trained.step)
    picture = _picture(folder, trained.step)
    card = model_card(
        trained.model,
        trained.described,
        title=path.stem if inside is None else folder.parent.name,
        license=license,
        weights=f"{trained.weights}, step {trained.step}",
        measured=_measured(folder, trained),
        picture=picture is not None,
    )
    about = {
        "library_name": "lit-diffusion",
        "lit_diffusion_version": lit_diffusion.__version__,
        "weights": trained.weights,
        "step": trained.step,
        "model": trained.described,
        "data": trained.model.about_data,
    }
    if trained.model.class_names is not None:
        about["class_names"] = trained.model.class_names
    _write(out, trained.model, about, card, picture)
    return out


def _read(path: Path) -> _Trained:
    """The model of a checkpoint, with the weights for sampling."""
    checkpoint = load_checkpoint(path)
    given = checkpoint[LightningModule.CHECKPOINT_HYPER_PARAMS_KEY]
    if "network" not in given:
        raise ValueError(
            f"{path} does not describe its network, so the folder could not be loaded: train with "
            "a network whose class keeps its arguments as attributes."
        )
    own = inspect.signature(Pretrained).parameters
    described = {
        "class_path": "lit_diffusion.Pretrained",
        "init_args": {name: value for name, value in given.items() if name in own},
    }
    model: Pretrained = build(described, Pretrained)
    model.load_state_dict(checkpoint["state_dict"])
    model.class_names = checkpoint.get(CLASS_NAMES)
    model.set_about_data(checkpoint.get(ABOUT_DATA))
    return _Trained(model.eval(), described, weights_name(checkpoint), checkpoint["global_step"])


def _measured(run: Path, trained: _Trained) -> list[Measurement]:
    """The measurements of exactly these weights."""
    return [
        one
        for one in read_measurements(run)
        if one.step == trained.step
        and one.protocol.get("weights", trained.weights) == trained.weights
    ]


def _picture(run: Path, step: int) -> Path | None:
    """The run's last grid of samples up to a step."""
    grids = sorted((run / "samples").glob("step-*.png"))
    found = [grid for grid in grids if int(grid.stem.removeprefix("step-")) <= step]
    return found[-1] if found else None


def _write(
    out: Path, model: Pretrained, about: dict[str, Any], card: str, picture: Path | None
) -> None:
    """Write the folder, completely or not at all."""
    with unfinished_folder(out) as unfinished:
        weights = {k: v.detach().clone().contiguous() for k, v in model.state_dict().items()}
        save_file(weights, unfinished / WEIGHTS, metadata={"format": "pt"})
        with (unfinished / WEIGHTS).open("rb") as file:
            about = {**about, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
        text = json.dumps(about, indent=2, ensure_ascii=False) + "\n"
        # JSON has no infinity, but 1e999 is read as infinite.
        text = re.sub(r"^(.*?)(-?)Infinity(,?)$", r"\g<1>\g<2>1e999\3", text, flags=re.MULTILINE)
        (unfinished / CONFIG).write_text(text, encoding="utf-8")
        (unfinished / "README.md").write_text(card, encoding="utf-8")
        if picture is not None:
            shutil.copyfile(picture, unfinished / SAMPLES)
        shutil.copymode(
            unfinished / CONFIG, unfinished / WEIGHTS
        )  # readable not only for the owner
        publish(unfinished, out)
