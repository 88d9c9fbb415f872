"""The command `lit-diffusion objective`: what a config's objective does, before it is trained.

    config or checkpoint → schedule, weighting, prediction, steps → Objective → a table, a figure

Nothing is trained and no data are read; of a whole experiment only the model's part matters.
"""

from __future__ import annotations

from pathlib import Path

import yaml
from jsonargparse import ActionConfigFile
from lightning.pytorch import LightningDataModule, Trainer

from lit_diffusion.objective import Objective
from lit_diffusion.training.commands.parsing import DiffusionParser, fail, find_checkpoint
from lit_diffusion.training.module import LitDiffusion, check_data_std
from lit_diffusion.training.reporting.objective import objective_of, objective_text, save_objective

__all__ = ["objective"]


def objective(
    argv: list[str],
    model_class: type[LitDiffusion],
    data_class: type[LightningDataModule],
) -> str:
    """Explain the objective of a config or a checkpoint; return the report.

    Args:
        argv: The command line after `objective`.
        model_class: Whose arguments a config may name.
        data_class: The same for the data, which are not read.
    """
    parser = DiffusionParser(
        prog="lit-diffusion objective",
        description="Say what an objective does; configs and --model.* as for fit.",
    )
    parser.add_argument(
        "-c", "--config", action=ActionConfigFile, help="A config; several make one."
    )
    # A whole experiment is accepted, so all of its keys must be known.
    parser.add_lightning_class_args(Trainer, "trainer")
    parser.add_lightning_class_args(model_class, "model")
    parser.add_lightning_class_args(data_class, "data")
    parser.link_arguments("data.image_shape", "model.image_shape")
    parser.add_argument("--seed_everything", type=bool | int, default=0, help="Not used.")
    parser.add_argument("--name", type=str, default="run", help="Of runs, for `last`.")
    parser.add_argument("--plugins", type=list[str] | str, default=[], help="As for fit.")
    parser.add_argument(
        "--ckpt_path",
        type=str | None,
        default=None,
        help="A checkpoint, not a config; `last`: in runs/.",
    )
    parser.add_argument(
        "--out", type=str | None, default=None, help="Draw it, too: a .png or .pdf file."
    )
    config = parser.parse_args(argv)
    out = None if config.out is None else Path(config.out)
    if out is not None and out.suffix not in (".png", ".pdf"):
        fail(f"--out must be a .png or .pdf file, got {out}.")
    asked = [word.partition("=")[0] for word in argv]
    if "--ckpt_path" in asked:
        if other := [word for word in asked if word in ("-c", "--config") or "--model" in word]:
            fail(f"a checkpoint has its own objective: give --ckpt_path or {other[0]}, not both.")
        path = find_checkpoint(config.ckpt_path, config.name if "--name" in asked else "*")
        model = LitDiffusion.load_from_checkpoint(path)  # a schedule may have learned
        loss, decoder = model.loss, model.loss.decoder
        found = Objective(
            loss.schedule, loss.weighting, model.denoiser.prediction, loss.num_timesteps
        )
    else:
        given = yaml.safe_load(parser.dump(config, skip_none=False))["model"]
        found, decoder = objective_of(given)
        check_data_std(found.weighting, found.prediction)
    text = objective_text(found, decoder)
    if out is not None:
        save_objective(found, out)
        text += f"\n\nFigure: {out}"
    return text
