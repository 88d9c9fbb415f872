"""The command `objective`: analyse an objective before training.

    schedule, weighting, prediction, steps  →  Objective  →  text with a table, figure

It reads no data and trains nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from lit_diffusion.decoders import Decoder
from lit_diffusion.loss import DiffusionLoss
from lit_diffusion.objective import Objective
from lit_diffusion.predictions import Prediction, VPrediction
from lit_diffusion.schedules import NoiseSchedule
from lit_diffusion.training.commands.shell.choices import resolve_checkpoint
from lit_diffusion.training.commands.shell.errors import UsageError
from lit_diffusion.training.commands.shell.load import load_model
from lit_diffusion.training.reporting.objective import objective_text, save_objective
from lit_diffusion.training.step.parts import check_data_std
from lit_diffusion.weightings import Weighting

__all__ = ["Described", "objective"]


class Described(NamedTuple):
    """An objective, the decoder of its loss, and the path of its figure."""

    objective: Objective
    decoder: Decoder | None
    figure: Path | None

    def __str__(self) -> str:
        text = objective_text(self.objective, self.decoder)
        return text if self.figure is None else f"{text}\n\nFigure: {self.figure}"


def objective(
    schedule: NoiseSchedule | None = None,
    weighting: Weighting | None = None,
    prediction: Prediction | None = None,
    num_timesteps: int | None = None,
    decoder: Decoder | None = None,
    *,
    ckpt_path: str | Path | None = None,
    name: str | None = None,
    root: str | Path | None = None,
    out: str | Path | None = None,
) -> Described:
    """Analyse an objective: its curves over λ, whether it is an ELBO, its variance.

    Args:
        schedule: Density p(λ) that training samples from; None means `CosineSchedule()`.
        weighting: Weight w(λ) on the squared error of ε; None means `SigmoidWeighting()`, or with
            a decoder `ELBOWeighting()`.
        prediction: What the network outputs; None means `VPrediction()`.
        num_timesteps: Number T of steps of a discrete chain; None means continuous time.
        decoder: The decoder, if the loss is the full bound.
        ckpt_path: Analyse the objective of a checkpoint instead: a file, a run folder, or `last`
            for that of the newest run.
        name: With `last`: only runs of this name.
        root: With `last`: the folder of all runs; runs/ by default.
        out: File for a figure, .png, .pdf or .svg; None means no figure.

    Raises:
        ValueError: If the parts are incompatible, or the checkpoint cannot be read.

    Example:
        >>> from lit_diffusion import SigmoidWeighting
        >>> described = objective(weighting=SigmoidWeighting())
        >>> described.objective.monotone
        True
    """
    out = None if out is None else Path(out)
    if out is not None and out.suffix not in (".png", ".pdf", ".svg"):
        raise UsageError(f"--out must be a .png, .pdf or .svg file, got {out}.")
    if ckpt_path is not None:
        # With its weights, since a schedule may have learned its shape.
        path = resolve_checkpoint(ckpt_path, name, root)
        model = load_model(path)
        loss, prediction = model.loss, model.denoiser.prediction
    else:
        loss = DiffusionLoss(schedule, weighting, num_timesteps, decoder)
        prediction = prediction or VPrediction()
        check_data_std(loss.weighting, prediction)
    found = Objective(loss.schedule, loss.weighting, prediction, loss.num_timesteps)
    if out is not None:
        save_objective(found, out)
    return Described(found, loss.decoder, out)
